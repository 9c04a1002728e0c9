"""Products by integer weights with a scale for every group of columns, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize_grouped(
    packed: Tensor, scale: Tensor, shift: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] in `dtype`. packed: uint8 [chunks, N, width], two 4-bit codes a byte (columns j and j + width
    of a chunk) or one of 8 bits; scale, shift: [groups, N]. shift: int8, of the codes, or float32, of the weights."""
    num_chunks, n, width = packed.shape
    k = scale.shape[0] * group_size
    if num_chunks * width == k:
        number = packed.double() - 128
    else:
        number = torch.cat((packed & 15, packed >> 4), -1).double() - 8
    number = number.transpose(0, 1).reshape(n, -1, group_size)
    scales = scale.double().t()[..., None]
    if shift is None:
        weight = number * scales
    else:
        shifts = shift.double().t()[..., None]
        weight = number * scales + shifts if shift.is_floating_point() else (number - shifts) * scales
    return weight.reshape(n, k).to(dtype)


def grouped_linear(
    x: Tensor, packed: Tensor, scale: Tensor, shift: Tensor | None, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """x Wᵀ + bias in float64, rounded once to x's dtype. x: [M, K]; bias: [N]."""
    product = x.double() @ dequantize_grouped(packed, scale, shift, group_size, torch.float64).T
    return (product if bias is None else product + bias.double()).to(x.dtype)
