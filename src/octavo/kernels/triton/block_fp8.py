"""Products by FP8 weights with a scale for every 128 x 128 block (DeepSeek-V3 Technical Report, 2024, section 3.3).

Many tokens are FP8 too, with a scale for every 128 features: a program adds up the products of 128 features on the
tensor cores, scales them in float32 and adds them to its sum, which so keeps float32's precision. Few tokens stay as
they are: the weight's bytes are streamed once, become numbers in registers, and each product of 128 features is scaled
by its block's one scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.fp8 import _AMAX_MIN, _FP8_MAX
from octavo.kernels.triton.launch import _after_previous, _cdiv, _launch, _overlap, _power_of_two
from octavo.kernels.triton.skinny_gemm import (
    _MAX_TILES,
    _NUM_SMS,
    _WORKSPACE_FLOATS,
    _finish,
    _reduce,
    _to_operand,
    _workspace,
)

_GROUP = tl.constexpr(128)
_BLOCK = 128
_LIMIT_M = 64  # tokens that skinny_linear_block_fp8 takes
_ROWS = 8  # tokens that share a group of programs' columns in the second-level cache


@triton.jit
def _quantize_fp8_groups_kernel(
    x_ptr, out_ptr, scale_ptr, SIZE: tl.constexpr, GROUPS: tl.constexpr, OVERLAP: tl.constexpr
):
    """Program (token, eight groups of 128)."""
    programs: tl.constexpr = (GROUPS + 7) // 8
    token = (tl.program_id(0) // programs).to(tl.int64)
    group = (tl.program_id(0) % programs) * 8 + tl.arange(0, 8)
    offsets = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    mask = offsets < SIZE
    _after_previous(OVERLAP)
    x = tl.load(x_ptr + token * SIZE + offsets, mask=mask, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), _AMAX_MIN)
    fp8_max = tl.full((8,), _FP8_MAX, tl.float32)
    tl.store(scale_ptr + token * GROUPS + group, tl.div_rn(amax, fp8_max), mask=group < GROUPS)
    # As in _store_fp8_row: the conversion saturates, and keeps NaN.
    values = (x * tl.div_rn(fp8_max, amax)[:, None]).to(tl.float8e4nv)
    tl.store(out_ptr + token * SIZE + offsets, values, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _block_fp8_kernel(
    x_ptr,  # float8e4nv [M, K], contiguous
    x_scale_ptr,  # float32 [M, GROUPS]
    w_ptr,  # float8e4nv [N, K], contiguous
    scale_ptr,  # float32 [ceil(N / 128), GROUPS]
    bias_ptr,  # [N] if HAS_BIAS
    out_ptr,  # [M, N], contiguous
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides 128
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program a tile of out; ROWS tiles of tokens go down the same columns before the next ones begin."""
    groups = tl.cdiv(K, _GROUP)
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program, per_band = tl.program_id(0), ROWS * column_tiles
    first_row = program // per_band * ROWS
    height = tl.minimum(row_tiles - first_row, ROWS)
    row_tile, column_tile = first_row + program % per_band % height, program % per_band // height
    m, n = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, _GROUP)
    rows, columns = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    x_tile = x_ptr + rows[:, None] * K + k[None, :]
    w_tile = w_ptr + columns[None, :] * K + k[:, None]
    x_scales, scales = x_scale_ptr + rows * groups, scale_ptr + column_tile * BLOCK_N // _GROUP * groups
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in tl.range(0, groups, num_stages=STAGES):
        at = group * _GROUP
        if EVEN_K:
            x, w = tl.load(x_tile + at), tl.load(w_tile + at)
        else:
            x = tl.load(x_tile + at, mask=(at + k < K)[None, :], other=0.0)
            w = tl.load(w_tile + at, mask=(at + k < K)[:, None], other=0.0)
        acc += tl.dot(x, w) * (tl.load(x_scales + group) * tl.load(scales + group))[:, None]
    row, column = m[:, None], n[None, :]
    mask = (row < M) & (column < N)
    _finish(acc, row, column, N, bias_ptr, scale_ptr, out_ptr, mask, HAS_BIAS, False)


@triton.jit(do_not_specialize=["M"])
def _skinny_block_fp8_kernel(
    x_ptr,  # [M, K], rows stride_x apart
    w_ptr,  # float8e4nv [N, K], contiguous
    scale_ptr,  # float32 [ceil(N / 128), ceil(K / 128)]
    bias_ptr,  # [N] if HAS_BIAS
    out_ptr,  # [M, N], contiguous
    partial_ptr,  # as in _reduce, if SPLIT_K > 1
    counter_ptr,
    M,
    N,
    K,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides 128
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FAST: tl.constexpr,  # as in _to_operand
    OVERLAP: tl.constexpr,
):
    """Program (tile, split): out[:, BLOCK_N columns] over this split's share of K."""
    tile, split = tl.program_id(0), tl.program_id(1)
    groups = tl.cdiv(K, _GROUP)
    share = tl.cdiv(groups, SPLIT_K)
    first, last = split * share, tl.minimum(groups, (split + 1) * share)
    m, n, k = tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, _GROUP)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_x
    w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    scales = scale_ptr + tile * BLOCK_N // _GROUP * groups
    _after_previous(OVERLAP, FILLS=True)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in tl.range(first, last, num_stages=STAGES):
        at = group * _GROUP + k[None, :]
        if EVEN_K:
            w = tl.load(w_rows + at, eviction_policy="evict_first")
            x = tl.load(x_rows + at, mask=m[:, None] < M, other=0.0)
        else:
            w = tl.load(w_rows + at, mask=at < K, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_rows + at, mask=(m[:, None] < M) & (at < K), other=0.0)
        acc += tl.dot(x, tl.trans(_to_operand(w, x.dtype, FAST))) * tl.load(scales + group)
    row, columns = m[:, None], n[None, :]
    mask = (row < M) & (columns < N)
    if SPLIT_K == 1:
        _finish(acc, row, columns, N, bias_ptr, scale_ptr, out_ptr, mask, HAS_BIAS, False)
    else:
        complete, acc = _reduce(acc, tile, split, M, row, columns, N, partial_ptr, counter_ptr, mask, SPLIT_K)
        if complete:
            _finish(acc, row, columns, N, bias_ptr, scale_ptr, out_ptr, mask, HAS_BIAS, False)


def quantize_fp8_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K], contiguous, as (float8_e4m3fn [T, K], float32 scale [T, ceil(K / 128)]), each group of 128 features
    with its scale as `quantize_fp8` makes one for a token."""
    (num_tokens, size), groups = x.shape, _cdiv(x.shape[1], _BLOCK)
    out = torch.empty(num_tokens, size, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(num_tokens, groups, dtype=torch.float32, device=x.device)
    programs = num_tokens * _cdiv(groups, 8)
    _launch(_quantize_fp8_groups_kernel, programs, (x, out, scale), (), (size, groups), 4)
    return out, scale


def _check(weight: Tensor, scale_inv: Tensor, k: int) -> int:
    """The rows of the weight. Raises ValueError for shapes or dtypes that do not fit together."""
    n = len(weight)
    if weight.dtype != torch.float8_e4m3fn or weight.shape[1] != k or not weight.is_contiguous():
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}; expected a contiguous float8_e4m3fn [N, {k}]")
    grid = _cdiv(n, _BLOCK), _cdiv(k, _BLOCK)
    if scale_inv.shape != grid or scale_inv.dtype != torch.float32 or not scale_inv.is_contiguous():
        raise ValueError(f"scale_inv is {scale_inv.dtype} {list(scale_inv.shape)}; expected float32 {list(grid)}")
    return n


def block_fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale_inv: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(x x_scale) (weight scale_inv)ᵀ + bias, accumulated in float32 and rounded once: [M, N] of dtype.

    x: float8_e4m3fn [M, K]; x_scale: float32 [M, ceil(K / 128)], as `quantize_fp8_groups` makes them;
    weight: float8_e4m3fn [N, K]; scale_inv: float32 [ceil(N / 128), ceil(K / 128)], a factor despite its name;
    bias: [N]. All contiguous. Raises ValueError for shapes or dtypes that do not fit together.
    """
    m, k = x.shape
    n = _check(weight, scale_inv, k)
    if x.dtype != torch.float8_e4m3fn or x_scale.shape != (m, scale_inv.shape[1]) or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} and x_scale {list(x_scale.shape)}; expected FP8 and its scales"
        )
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    block_m = min(128, max(16, _power_of_two(m)))
    programs = _cdiv(m, block_m) * _cdiv(n, _BLOCK)
    _block_fp8_kernel[(programs,)](
        x,
        x_scale,
        weight,
        scale_inv,
        bias,
        out,
        m,
        n,
        k,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK,
        STAGES=4,
        EVEN_K=k % _BLOCK == 0,
        HAS_BIAS=bias is not None,
        ROWS=_ROWS,
        num_warps=8 if block_m == 128 else 4,
        num_stages=4,
    )
    return out


def skinny_linear_block_fp8(
    x: Tensor, weight: Tensor, scale_inv: Tensor, bias: Tensor | None = None, *, split_k: int | None = None
) -> Tensor:
    """x (weight scale_inv)ᵀ + bias with the activations in full (W8A16), accumulated in float32 and rounded once:
    [M, N] of x's dtype.

    x: bfloat16 or float16 [M, K], M in 1..64, rows contiguous; the rest as for `block_fp8_linear`. split_k: programs
    that share a tile's K, in place of what fills the GPU. One product at a time on a device, as for `skinny_linear`.
    Raises ValueError for shapes or dtypes that do not fit together.
    """
    m, k = x.shape
    n = _check(weight, scale_inv, k)
    if not 1 <= m <= _LIMIT_M or x.stride(1) != 1 or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; expected bfloat16 or float16 and 1..{_LIMIT_M} tokens")
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block_n = 64
    tiles, groups = _cdiv(n, block_n), scale_inv.shape[1]
    wanted = min(3 * _NUM_SMS // tiles, groups // 4, 8) if split_k is None else split_k
    split_k = max(1, min(wanted, groups, _WORKSPACE_FLOATS // (m * n))) if tiles <= _MAX_TILES else 1
    partial, counters = _workspace(x.device) if split_k > 1 else (out, out)  # out: not read
    _skinny_block_fp8_kernel[(tiles, split_k)](
        x,
        weight,
        scale_inv,
        bias,
        out,
        partial,
        counters,
        m,
        n,
        k,
        x.stride(0),
        BLOCK_M=max(16, _power_of_two(m)),
        BLOCK_N=block_n,
        SPLIT_K=split_k,
        STAGES=5,
        EVEN_K=k % _BLOCK == 0,
        HAS_BIAS=bias is not None,
        FAST=x.is_cuda and x.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=5,
        **_overlap(x),
    )
    return out
