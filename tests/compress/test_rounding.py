"""Rounded weights: what they stand for, and how their bits lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.compress.rounding import quantize_fp8, quantize_int4


def weight(rows: int = 24, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()


def codes(packed: Tensor) -> Tensor:
    """int32 [N, K / 8] to float32 [N, K], by the layout's own words: code i of eight in bits 4i..4i+3, less 8."""
    rows = [[(number >> 4 * i & 15) - 8 for number in row for i in range(8)] for row in packed.tolist()]
    return torch.tensor(rows, dtype=torch.float32)


def test_fp8_keeps_three_bits_of_mantissa() -> None:
    wide = weight() * torch.logspace(-6, 4, 24)[:, None]
    made = quantize_fp8(wide)
    assert (made["weight"].dtype, made["weight_scale"].dtype) == (torch.float8_e4m3fn, torch.bfloat16)
    assert made["weight_scale"].shape == (24, 1)
    scale = made["weight_scale"].float()
    error = (made["weight"].float() * scale - wide.float()).abs()
    # Half a unit of the mantissa, or of the smallest number; and what a rounded scale takes off the largest weight.
    assert (error <= wide.abs() * 2**-4 * 1.01 + scale * 2**-10 * 1.01).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_the_nearest_code_under_a_good_scale(group_size: int) -> None:
    wide = weight()
    made = quantize_int4(wide, group_size)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in made.items()} == {
        "weight_packed": (torch.int32, (24, 16)),
        "weight_scale": (torch.bfloat16, (24, 128 // group_size)),
        "weight_shape": (torch.int64, (2,)),
    }
    assert made["weight_shape"].tolist() == [24, 128]
    scale = made["weight_scale"].float().repeat_interleave(group_size, 1)
    code = codes(made["weight_packed"])
    assert torch.equal(code, (wide.float() / scale).round().clamp(-8, 7))
    groups = wide.float().unflatten(1, (-1, group_size))
    full = (groups.abs().amax(2, keepdim=True) / 7.5).bfloat16().float()
    plain = (groups / full).round().clamp(-8, 7) * full
    squared = (code * scale - wide.float()).square().unflatten(1, (-1, group_size)).sum(2)
    assert (squared <= (plain - groups).square().sum(2) * 1.0001).all()
    assert squared.sum() < 0.95 * (plain - groups).square().sum()


def test_zeros_stay_zeros() -> None:
    assert not codes(quantize_int4(torch.zeros(2, 32), 32)["weight_packed"]).any()
    made = quantize_fp8(torch.zeros(2, 32))
    assert not made["weight"].float().any()
    assert (made["weight_scale"] > 0).all()


def test_long_weights_are_rounded_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_int4(weight(), 32)
    monkeypatch.setattr("octavo.compress.rounding._CHUNK_ELEMENTS", 5 * 128)
    assert all(torch.equal(part, whole[name]) for name, part in quantize_int4(weight(), 32).items())
