"""LoRA adapters for SmolLM2-135M, under the names that guides give theirs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, RANK = 576, 4
NAMES = ("cs-lora", "legal-lora", "coding-lora")


def put_adapters(folder: Path) -> Path:
    """A folder for each name, as PEFT saves it: random changes of the query projections of a few layers."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"]}
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(4):
            module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator) / HIDDEN**0.5
            tensors[f"{module}.lora_B.weight"] = torch.randn(HIDDEN, RANK, generator=generator) / RANK**0.5
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(json.dumps(config | {"layers_to_transform": [0, 1, 2, 3]}))
        save_file(tensors, folder / name / "adapter_model.safetensors")
    return folder
