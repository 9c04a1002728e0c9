"""Matrix products in plain torch: the oracle of the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.reference.activation import silu_and_mul


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Tensor:
    """x weightᵀ + bias in float64, rounded once to x's dtype. x: [M, K]; weight: [N, K]; bias: [N]. gated:
    `silu_and_mul` of that, [M, N / 2]."""
    product = x.double() @ weight.double().T
    rounded = (product if bias is None else product + bias.double()).to(x.dtype)
    return silu_and_mul(rounded) if gated else rounded


def skinny_linear_fp8(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, gated: bool = False
) -> Tensor:
    """x (weight · weight_scale)ᵀ + bias in float64, rounded once to x's dtype. weight: float8_e4m3fn [N, K];
    weight_scale: float32 [N] or [N, 1]; gated: as above."""
    return skinny_linear(x, weight.double() * weight_scale.double().view(-1, 1), bias, gated=gated)


def linear_fp8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(x x_scale) (weight weight_scale)ᵀ + bias in float64, rounded once to dtype. x: float8_e4m3fn [M, K];
    x_scale: float32 [M, 1]; weight: float8_e4m3fn [N, K]; weight_scale: float32 [N]; bias: [N]."""
    product = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()[:, None]).T
    return (product if bias is None else product + bias.double()).to(dtype)
