"""Quantisation to float8_e4m3fn in plain torch: the oracle of the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0  # the largest finite float8_e4m3fn


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, size] as (float8_e4m3fn [T, size], float32 scale [T, 1]); scale = max(largest magnitude, 1e-12) / 448."""
    wide = x.double()
    amax = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    return to_fp8(wide * FP8_MAX / amax), (amax / FP8_MAX).float()


def to_fp8(x: Tensor) -> Tensor:
    """The nearest float8_e4m3fn; values out of its range saturate."""
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
