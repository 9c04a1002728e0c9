"""RMSNorm (Zhang and Sennrich, 2019) fused with the addition before it and, where asked, the quantisation after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.fp8 import _fp8_outputs, _row_warps, _store_fp8_row
from octavo.kernels.triton.launch import _FEW_BEFORE_FP8, _FEW_PROGRAMS, _after_previous, _launch, _power_of_two


@triton.jit
def _rms_norm_kernel(
    residual_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    FP8: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program a token; the row stays in registers. Without a delta residual is only read; scale_ptr is read by
    FP8 alone. The sum is rounded to its dtype before the norm, which is float32 inside and rounded once."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    dtype = residual_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    _after_previous(OVERLAP, FEW=_FEW_BEFORE_FP8 if FP8 else _FEW_PROGRAMS)
    x = tl.load(residual_ptr + row * SIZE + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        total = (x + tl.load(delta_ptr + row * SIZE + offsets, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual_ptr + row * SIZE + offsets, total, mask=mask)
        x = total.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps) * weight
    if FP8:
        _store_fp8_row(normed.to(dtype).to(tl.float32), offsets, mask, out_ptr + row * SIZE, scale_ptr + row)
    else:
        tl.store(out_ptr + row * SIZE + offsets, normed.to(dtype), mask=mask)


def rms_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """residual += delta, in place, where there is a delta; returns RMSNorm(residual) * weight, a new tensor.

    residual, delta: [T, size], contiguous, of one floating dtype; weight: [size]. size: up to 16384.
    """
    out = torch.empty_like(residual)
    _launch_rms_norm(residual, delta, weight, out, out, eps)
    return out


def rms_norm_fp8(residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm`, its result quantised as `quantize_fp8` does: (float8_e4m3fn [T, size], float32 scale [T, 1])."""
    out, scale = _fp8_outputs(*residual.shape, residual.device)
    _launch_rms_norm(residual, delta, weight, out, scale, eps)
    return out, scale


def _launch_rms_norm(
    residual: Tensor, delta: Tensor | None, weight: Tensor, out: Tensor, scale: Tensor, eps: float
) -> None:
    """A float8 out gets the quantised norm, its scales go to scale; else scale is not touched."""
    num_tokens, size = residual.shape
    block = _power_of_two(size)
    tensors = residual, residual if delta is None else delta, weight, out, scale
    constants = size, block, delta is not None, out.dtype == torch.float8_e4m3fn
    _launch(_rms_norm_kernel, num_tokens, tensors, (float(eps),), constants, _row_warps(block))
