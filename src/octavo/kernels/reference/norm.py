"""RMSNorm in plain torch: the oracle of the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(residual + delta, its RMSNorm), both in residual's dtype; the norm is taken in float64 of the rounded sum.

    residual, delta: [T, size]; weight: [size].
    """
    total = residual if delta is None else (residual.double() + delta.double()).to(residual.dtype)
    wide = total.double()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()
    return total, scaled.to(residual.dtype)
