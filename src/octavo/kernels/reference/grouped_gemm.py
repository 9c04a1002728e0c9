"""Products by integer weights with a scale for every group of columns, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.reference.gemm import skinny_linear


def dequantize_grouped(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    group_size: int,
    table: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] in `dtype`: scale * (code - half - zero) + minimum, or scale * table[code].

    packed: uint8 [chunks, N, width], two 4-bit codes a byte (columns j and j + width of a chunk) or one of 8 bits;
    scale: [groups, N], float32, or int32 with the zero in its low byte and the rest of a float32 in the others;
    minimum: float32 [groups, N]; table: float32 [16].
    """
    num_chunks, n, width = packed.shape
    k = scale.shape[0] * group_size
    if num_chunks * width == k:
        number = packed.double() - 128
    else:
        code = torch.cat((packed & 15, packed >> 4), -1)
        number = code.double() - 8 if table is None else table.double()[code.int()]
    number = number.transpose(0, 1).reshape(n, -1, group_size)
    if scale.dtype == torch.int32:
        number -= scale.to(torch.int8).t()[..., None].double()
        scale = (scale & -256).view(torch.float32)
    weight = number * scale.t()[..., None].double()
    if minimum is not None:
        weight += minimum.t()[..., None].double()
    return weight.reshape(n, k).to(dtype)


def grouped_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    group_size: int,
    table: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
) -> Tensor:
    """`skinny_linear` by the weight that `dequantize_grouped` makes in float64."""
    weight = dequantize_grouped(packed, scale, minimum, group_size, table, torch.float64)
    return skinny_linear(x, weight, bias, gated=gated)
