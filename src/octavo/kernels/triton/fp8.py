"""Quantisation of activations to float8_e4m3fn with one scale a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _FEW_BEFORE_FP8, _after_previous, _launch, _power_of_two

_FP8_MAX = tl.constexpr(448.0)  # the largest finite float8_e4m3fn
_AMAX_MIN = tl.constexpr(1e-12)  # a row of zeros gets a tiny scale, not none
FP8_MAX_M = 384  # tokens that `linear_fp8` may be asked to multiply


@triton.jit
def _store_fp8_row(values, offsets, mask, row_ptr, scale_ptr):
    """Write one row as value / scale, and its scale, the row's largest magnitude / 448.

    values: float32 [BLOCK], 0 where not mask; row_ptr: float8e4nv; scale_ptr: float32, of this row.
    """
    amax = tl.maximum(tl.max(tl.abs(values), axis=0), _AMAX_MIN)
    fp8_max = tl.full((), _FP8_MAX, tl.float32)
    # Correctly rounded, so that values which are multiples of the scale by a power of two stay exact.
    tl.store(scale_ptr, tl.div_rn(amax, fp8_max))
    # The conversion saturates, should rounding carry the largest value past the range, and keeps NaN.
    tl.store(row_ptr + offsets, (values * tl.div_rn(fp8_max, amax)).to(tl.float8e4nv), mask=mask)


@triton.jit
def _quantize_fp8_kernel(x_ptr, out_ptr, scale_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One program a token; BLOCK >= SIZE elements, all in registers."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    _after_previous(OVERLAP, FEW=_FEW_BEFORE_FP8)
    x = tl.load(x_ptr + row * SIZE + offsets, mask=mask, other=0.0).to(tl.float32)
    _store_fp8_row(x, offsets, mask, out_ptr + row * SIZE, scale_ptr + row)


def _row_warps(block: int) -> int:
    """Warps of a program that keeps a row of `block` elements in registers: 16 to 32 elements a thread."""
    return max(4, min(block // 512, 32 if block > 16384 else 16))


def _fp8_outputs(num_tokens: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the quantised rows, float8_e4m3fn [num_tokens, size], and their scales, float32 [num_tokens, 1]. Behind
    few rows lies memory for FP8_MAX_M, which `linear_fp8` may read."""
    out = torch.empty(max(num_tokens, FP8_MAX_M), size, dtype=torch.float8_e4m3fn, device=device)[:num_tokens]
    return out, torch.empty(num_tokens, 1, dtype=torch.float32, device=device)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, size], contiguous, as (float8_e4m3fn [T, size], float32 scale [T, 1]): x ~ quantised * scale.

    scale = max(largest magnitude of the token, 1e-12) / 448. size: up to 32768. FP8 as in Micikevicius et al., 2022.
    """
    num_tokens, size = x.shape
    out, scale = _fp8_outputs(num_tokens, size, x.device)
    block = _power_of_two(size)
    _launch(_quantize_fp8_kernel, num_tokens, (x, out, scale), (), (size, block), _row_warps(block))
    return out, scale
