"""Dequantized copies beside packed weights: the same product, for many tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.kernels import triton
from octavo.layers.linear import Linear
from octavo.quantization.plain_copies import keep_plain_copies
from octavo.quantization.registry import method_of

DTYPE = torch.bfloat16
CPU = torch.device("cpu")
FORMATS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True},
    "gptq, in the order of activations": {
        "quant_method": "gptq", "bits": 8, "group_size": 64, "sym": False, "desc_act": True,
    },
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}  # fmt: skip


def packed_layer(config: dict[str, Any]) -> Linear:
    made = Linear(128, {"gate_proj": 48, "up_proj": 16}, True, DTYPE, CPU)
    made.create_weights("model.layers.0.mlp.gate_up_proj", method_of(None, config))
    generator = torch.Generator().manual_seed(0)
    for slot in made.weight_slots("").values():
        slot.load(slot.spec.make_dummy(generator) if slot.spec.required or slot.spec.dummy else None)
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
@pytest.mark.parametrize("name", FORMATS)
def test_many_tokens_go_through_the_copy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton.load()
    for module in ("grouped", "four_bit"):
        monkeypatch.setattr(f"octavo.quantization.{module}.keeps_codes", lambda _: True)
    made = packed_layer(FORMATS[name])
    few, many = (torch.randn(count, 128, generator=torch.Generator().manual_seed(1)).to(DTYPE) for count in (3, 80))
    before = [made(x) for x in (few, many)]
    (layer,) = made.layers
    size = 64 * 128 * 2
    assert keep_plain_copies([layer], size - 1) == 0
    assert layer.weight is None
    assert keep_plain_copies([layer], size) == size
    after = [made(x) for x in (few, many)]
    assert torch.equal(after[0], before[0]), "few tokens go through the packed weight as before"
    assert torch.allclose(after[1], before[1], rtol=2e-2, atol=2e-2)
    layer.weight.data.zero_()
    assert torch.equal(made(many), layer.bias.expand(80, -1))


def test_without_packed_weights_there_is_nothing_to_copy() -> None:
    made = packed_layer(FORMATS["awq"])  # dequantized, on a CPU
    assert keep_plain_copies(made.layers, None) == 0
