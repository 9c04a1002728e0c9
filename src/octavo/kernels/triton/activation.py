"""SwiGLU (Shazeer, 2020): silu(gate) * up, and the same quantised to float8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.fp8 import _fp8_outputs, _row_warps, _store_fp8_row
from octavo.kernels.triton.launch import _FEW_BEFORE_FP8, _after_previous, _cdiv, _launch, _power_of_two


@triton.jit
def _silu_times(gate, up):
    """silu(gate) * up in float32. For a very negative gate exp overflows to infinity, and the result is -0."""
    gate = gate.to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One program for BLOCK elements of a token; the programs of a token are neighbours."""
    chunks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    offsets = (program % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    _after_previous(OVERLAP)
    gate = tl.load(gate_up_ptr + row * (2 * SIZE) + offsets, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * (2 * SIZE) + SIZE + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + row * SIZE + offsets, _silu_times(gate, up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_and_mul_fp8_kernel(
    gate_up_ptr, out_ptr, scale_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """One program a token: the scale needs all of its row, which stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    _after_previous(OVERLAP, FEW=_FEW_BEFORE_FP8)
    gate = tl.load(gate_up_ptr + row * (2 * SIZE) + offsets, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * (2 * SIZE) + SIZE + offsets, mask=mask, other=0.0)
    rounded = _silu_times(gate, up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    _store_fp8_row(rounded, offsets, mask, out_ptr + row * SIZE, scale_ptr + row)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, float32 inside and rounded once. gate_up: [T, 2 * size], gate first, contiguous, of a floating
    dtype. Returns a new [T, size]."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, _power_of_two(size))
    programs = num_tokens * _cdiv(size, block)
    _launch(_silu_and_mul_kernel, programs, (gate_up, out), (), (size, block), 4)
    return out


def silu_and_mul_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_and_mul`, its result quantised as `quantize_fp8` does: (float8_e4m3fn [T, size], float32 scale [T, 1]).

    size: up to 32768.
    """
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out, scale = _fp8_outputs(num_tokens, size, gate_up.device)
    block = _power_of_two(size)
    _launch(_silu_and_mul_fp8_kernel, num_tokens, (gate_up, out, scale), (), (size, block), _row_warps(block))
    return out, scale
