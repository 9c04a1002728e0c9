"""Matrix products in plain torch: the oracle of the fused kernels."""

from __future__ import annotations

from torch import Tensor


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias in float64, rounded once to x's dtype. x: [M, K]; weight: [N, K]; bias: [N]."""
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).to(x.dtype)


def skinny_linear_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (weight · weight_scale)ᵀ + bias in float64, rounded once to x's dtype. weight: float8_e4m3fn [N, K];
    weight_scale: float32 [N] or [N, 1]."""
    product = x.double() @ (weight.double() * weight_scale.double().view(-1, 1)).T
    return (product if bias is None else product + bias.double()).to(x.dtype)
