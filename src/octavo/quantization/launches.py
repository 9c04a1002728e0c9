"""What products of few tokens are compiled for: tokens and rows enough to be compiled as the whole product will be."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.kernels import triton as device_kernels
from octavo.quantization.scheme import LinearShape

# x [m, K], zeros [N, K] in x's dtype, the plan, whether gated: runs the product by a weight of zeros.
Multiply = Callable[[Tensor, Tensor, Any, bool], object]


def skinny_launches(shape: LinearShape, element_size: int, multiply: Multiply) -> dict[Hashable, Callable[[], object]]:
    """One for each plan of skinny_gemm that a product of this shape follows for any number of tokens. element_size: of
    the weight, in bytes."""
    if shape.dtype.itemsize != 2:
        return {}
    kernels = device_kernels.get()
    found: dict[Hashable, Callable[[], object]] = {}
    for m in (1, 2, 8, kernels.SKINNY_MAX_M):
        plan = kernels.GemmPlan.of(m, shape.out_features, shape.in_features, element_size)
        num_tokens = m if plan.kind == "fma" else max(8, m)  # fewer are compiled as 8 are
        is_even = shape.in_features % plan.block_k == 0
        for gated in (False, True) if shape.is_gated else (False,):
            found["skinny", element_size, plan, num_tokens, is_even, gated] = partial(
                launch_skinny, shape, multiply, plan, num_tokens, is_even, gated
            )
    return found


def launch_skinny(
    shape: LinearShape, multiply: Multiply, plan: Any, num_tokens: int, is_even: bool, gated: bool
) -> None:
    """Two tiles of a product that is cut up by this plan. is_even: K is a multiple of its block_k."""
    size = 2 * plan.block_k * plan.split_k - (0 if is_even else 16)
    made = torch.zeros(num_tokens + 2 * plan.block_n, size, dtype=shape.dtype, device=shape.device)
    multiply(made[:num_tokens], made[num_tokens:], plan, gated)
