"""Random LoRA adapters on disk, as PEFT lays them out, and a tiny model's weights with one of them merged in."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_adapter(folder: Path, weights: dict[str, Tensor], rng: random.Random, max_rank: int) -> None:
    """An adapter of a rank up to max_rank on some of the modules whose weights these are, with some other ranks."""
    folder.mkdir(parents=True)
    kinds = sorted({name.split(".")[-2] for name in weights if "norm" not in name})
    targets = rng.sample(kinds, rng.randint(1, len(kinds)))
    rank, alpha = rng.randint(1, max_rank), rng.choice([4, 16, 7])
    ranks = {kind: rng.randint(1, max_rank) for kind in targets if rng.random() < 0.3}
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        kind = module.rpartition(".")[2]
        if kind not in targets:
            continue
        r = ranks.get(kind, rank)
        rows, columns = weight.shape
        path = f"base_model.model.{module}"
        if kind == "embed_tokens":
            rows, columns = columns, rows
            names = f"{path}.lora_embedding_A", f"{path}.lora_embedding_B"
        else:
            names = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        tensors[names[0]] = torch.randn(r, columns, generator=generator) / columns**0.5
        tensors[names[1]] = torch.randn(rows, r, generator=generator) * 0.2 / alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "rank_pattern": ranks,
        "use_rslora": rng.random() < 0.3,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def merged(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights with what the adapter adds to them."""
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = dict(weights)
    for name, weight in weights.items():
        path = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = tensors.get(f"{path}.lora_A.weight"), tensors.get(f"{path}.lora_B.weight")
        is_embedding = a is None
        if a is None or b is None:
            a, b = tensors.get(f"{path}.lora_embedding_A"), tensors.get(f"{path}.lora_embedding_B")
        if a is None or b is None:
            continue
        scale = config["lora_alpha"] / (len(a) ** 0.5 if config["use_rslora"] else len(a))
        delta = scale * (b.double() @ a.double())
        found[name] = (weight.double() + (delta.T if is_embedding else delta)).float()
    return found
