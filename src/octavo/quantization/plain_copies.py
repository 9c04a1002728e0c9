"""Dequantized copies of packed weights, for steps of many tokens: cuBLAS multiplies those faster."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from octavo.kernels import triton as device_kernels
from octavo.quantization.grouped import GroupedWeight
from octavo.quantization.scheme import LinearLayer


def keep_plain_copies(layers: Iterable[LinearLayer], most_bytes: int | None) -> int:
    """Give each layer that holds packed integers its `weight` too, on a GPU. Returns the bytes that the copies take;
    0, with no copy made, where that is more than most_bytes, or where no layer holds any."""
    packed = [layer for layer in layers if isinstance(layer.held, tuple) and isinstance(layer.held[0], GroupedWeight)]
    num_bytes = sum(layer.out_features * layer.in_features * layer.dtype.itemsize for layer in packed)
    if most_bytes is not None and num_bytes > most_bytes:
        return 0
    for layer in packed:
        rows = [plain_copy(weight, layer.dtype) for weight in layer.held]
        layer.weight = nn.Parameter(torch.cat(rows) if len(rows) > 1 else rows[0], requires_grad=False)
    return num_bytes


def plain_copy(weight: GroupedWeight, dtype: torch.dtype) -> Tensor:
    """[N, in_features], the columns in the order of the activations."""
    plain: Tensor = device_kernels.get().dequantize_grouped(*weight[:5], dtype)
    return plain if weight.order is None else torch.empty_like(plain).index_copy_(1, weight.order, plain)
