"""RMSNorm in plain torch: the oracle of the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.reference.fp8 import quantize_fp8


def rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + delta, its RMSNorm), both in residual's dtype; the norm is taken in float64 of the rounded sum.

    residual, delta: [T, size]; weight: [size].
    """
    total = residual if delta is None else (residual.double() + delta.double()).to(residual.dtype)
    wide = total.double()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()
    return total, scaled.to(residual.dtype)


def rms_norm_fp8(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(residual + delta, its RMSNorm as float8_e4m3fn [T, size], the scale of each token, float32 [T, 1])."""
    total, normed = rms_norm(residual, delta, weight, eps)
    return total, *quantize_fp8(normed)
