"""FP8 products with a scale for every 128 x 128 block of the weight, in plain torch: the fused kernels' oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.reference.fp8 import FP8_MAX, to_fp8

GROUP = 128  # features of a token that share a scale; rows and columns of a block


def quantize_fp8_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] as (float8_e4m3fn [T, K], float32 scale [T, ceil(K / 128)]), each group of 128 features as
    `quantize_fp8` does a token."""
    size = x.shape[1]
    groups = torch.nn.functional.pad(x.double(), (0, -size % GROUP)).view(len(x), -1, GROUP)
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    return to_fp8(groups * FP8_MAX / amax).view(len(x), -1)[:, :size].contiguous(), (amax[..., 0] / FP8_MAX).float()


def _plain(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """The weight in float64 [N, K]."""
    factors = scale_inv.double().repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    return weight.double() * factors[: weight.shape[0], : weight.shape[1]]


def block_fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale_inv: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(x x_scale) (weight scale_inv)ᵀ + bias in float64, rounded once to dtype.

    x: float8_e4m3fn [M, K]; x_scale: float32 [M, ceil(K / 128)]; weight: float8_e4m3fn [N, K];
    scale_inv: float32 [ceil(N / 128), ceil(K / 128)]; bias: [N].
    """
    wide = x.double() * x_scale.double().repeat_interleave(GROUP, 1)[:, : x.shape[1]]
    product = wide @ _plain(weight, scale_inv).T
    return (product if bias is None else product + bias.double()).to(dtype)


def skinny_linear_block_fp8(x: Tensor, weight: Tensor, scale_inv: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (weight scale_inv)ᵀ + bias in float64, rounded once to x's dtype. x: [M, K]; the rest as above."""
    product = x.double() @ _plain(weight, scale_inv).T
    return (product if bias is None else product + bias.double()).to(x.dtype)
