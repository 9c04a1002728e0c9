"""LoRA adapters add the same to a layer whatever format its weights are in, and however many formats it is cut into."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
import torch

from octavo.layers.linear import Linear
from octavo.layers.lora import ActiveAdapters, LinearAdapters
from octavo.quantization.registry import method_of

CPU, DTYPE = torch.device("cpu"), torch.float32
PARTS = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
COLUMNS, RANK, NUM_SLOTS = 256, 16, 2


def of_gguf(*types: str) -> dict[str, Any]:
    values = [gguf.GGMLQuantizationType[kind].value for kind in types]
    return {"quant_method": "gguf", "types": {f"layer.{name}": kind for name, kind in zip(PARTS, values)}}


def packed(bits: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": []}


FORMATS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False, "desc_act": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8 in blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "compressed-tensors": packed(4),
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gguf, three types": of_gguf("Q4_K", "Q6_K", "Q8_0"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_adapters_add_the_same_to_every_format(name: str) -> None:
    layer = Linear(COLUMNS, PARTS, False, DTYPE, CPU)
    layer.create_weights("layer.qkv_proj", method_of(None, FORMATS[name]))
    generator = torch.Generator().manual_seed(0)
    for slot in layer.weight_slots("").values():
        slot.load(slot.spec.make_dummy(generator) if slot.spec.required or slot.spec.dummy else None)
    rows = tuple(PARTS.values())
    a = torch.randn(NUM_SLOTS, len(rows), RANK, COLUMNS, generator=generator)
    b = torch.randn(NUM_SLOTS, sum(rows), RANK, generator=generator)
    ranks = torch.tensor([[RANK, 3], [0, RANK], [5, 5]], dtype=torch.int32)
    active = ActiveAdapters()
    layer.adapters = LinearAdapters(active, rows, a, b, ranks)
    x = torch.randn(5, COLUMNS, generator=generator)
    plain = layer(x)
    active.slots = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32)
    added = layer(x) - plain
    for token, slot in enumerate(active.slots.tolist()):
        first = 0
        for part, size in enumerate(rows):
            rank = int(ranks[part, slot]) if slot >= 0 else 0
            want = b[slot, first : first + size, :rank] @ (a[slot, part, :rank] @ x[token])
            assert torch.allclose(added[token, first : first + size], want, rtol=1e-4, atol=1e-3)
            first += size
