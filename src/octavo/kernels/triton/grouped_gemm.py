"""Matrix products by integer weights with a scale for every group of columns (W4A16, W8A16).

The weight lies in chunks of columns, as octavo.quantization.grouped packs it. A program takes BLOCK_N rows and walks
along the chunks: bytes come in by asynchronous copies, become numbers in registers by setting the exponent around the
bits (exact), or by permuting the bytes of a table, and go into the tensor cores. Few tokens multiply the whole numbers,
in bfloat16 with 128 added to them, and the sum of each group is scaled in float32, and the 128 taken off by the sum of
the tokens' own; many tokens multiply scaled numbers, rounded to the activations' dtype, so that sums stay in the cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.grouped_numbers import (
    _bytes,
    _low_and_high,
    _ones,
    _scaled_first,
    _table_words,
)
from octavo.kernels.triton.launch import _after_previous, _cdiv, _overlap, _power_of_two
from octavo.kernels.triton.skinny_gemm import (
    _MAX_TILES,
    _NUM_SMS,
    _WORKSPACE_FLOATS,
    _finish,
    _reduce,
    _weight_rows,
    _workspace,
)

GROUPED_MAX_M = 512  # up to here the callers prefer this kernel to dequantizing the weight
_ENOUGH_TILES = 192  # of few tokens: so many keep the device busy without a split of K
_SHORT = 16  # chunks of a weight that few tokens multiply
_LARGE = 3000  # tiles of 128 rows and a chunk, in a weight that keeps all multiprocessors busy


class GroupedPlan(NamedTuple):
    """How a product is cut up.

    block_m: tokens of a program; swap: the weight is the left operand, so that few tokens fill the short side of a
    tensor core's tile; scale_first: numbers are scaled before they are multiplied; unroll: chunks of a step, 1 where
    it does not divide the number of chunks.
    """

    block_m: int
    block_n: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    swap: bool = False
    scale_first: bool = False
    unroll: int = 1

    @classmethod
    def of(cls, m: int, n: int, num_chunks: int) -> GroupedPlan:
        """The plan for x [m, k] by a weight of n rows and num_chunks chunks, as measured on an H200 by
        benchmarks/gpu/kernel_grouped.py."""
        if m <= 16:
            tiles = _cdiv(n, 64)
            split = 1 if tiles >= _ENOUGH_TILES else _split(tiles, num_chunks, 4, 2)
            # Two chunks a step are faster where the walk along K is short, one where many programs share a processor.
            unroll = 2 if split == 1 and num_chunks <= _SHORT else 1
            return cls(8 if m <= 8 else 16, 64, split, 2, 4 if unroll == 2 else 6, swap=True, unroll=unroll)
        rows = _cdiv(n, 128)
        if m <= 64:
            split = _split(rows, num_chunks, 2)
            warps = 8 if m > 32 and split == 1 else 4
            return cls(32 if m <= 32 else 64, 128, split, warps, 4, swap=True, scale_first=m > 32)
        at_least = 64 if rows * num_chunks < _LARGE else 128
        block_m = min(256, at_least * (1 if m <= 128 else 2 if m <= 256 else 4))
        split = _split(rows * _cdiv(m, block_m), num_chunks, 1)
        return cls(block_m, 128, split, 8, 3 if block_m == 256 else 4, swap=True, scale_first=True)


def _split(tiles: int, num_chunks: int, programs_per_sm: int, least: int = 4) -> int:
    """Splits of K that give every multiprocessor about so many programs, each with at least so many chunks."""
    return max(1, min(round(programs_per_sm * _NUM_SMS / tiles), num_chunks // least, 8))


@triton.jit
def _product(w, x, acc, SWAP: tl.constexpr):
    """acc plus the product of w [BLOCK_N, H] and x [BLOCK_M, H]."""
    return tl.dot(w, tl.trans(x), acc) if SWAP else tl.dot(x, tl.trans(w), acc)


@triton.jit
def _add(
    acc,
    product,
    sums,
    w,
    x,
    ones,
    scale,
    minimum,
    HAS_MINIMUM: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    SWAP: tl.constexpr,
    FAST: tl.constexpr,
):
    """(acc, product, sums) with the numbers w [BLOCK_N, H] of a group multiplied by x [BLOCK_M, H]: in acc, scaled
    before, or in product, to be scaled, with the sums of x, in each row the same, for the minimum."""
    if SCALE_FIRST:
        acc = _product(_scaled_first(w, scale, minimum, HAS_MINIMUM, FAST), x, acc, SWAP)
    else:
        product = _product(w, x, product, SWAP)
        if HAS_MINIMUM:
            sums = _product(ones, x, sums, SWAP)
    return acc, product, sums


@triton.jit
def _with_scale(acc, product, sums, scale, minimum, HAS_MINIMUM: tl.constexpr, SWAP: tl.constexpr):
    """acc plus what a group adds, see _add. scale, minimum: float32 [BLOCK_N]."""
    acc += product * (scale[:, None] if SWAP else scale[None, :])
    if HAS_MINIMUM:
        acc += sums * (minimum[:, None] if SWAP else minimum[None, :])
    return acc


@triton.jit
def _group_of(scale_ptr, minimum_ptr, group, columns, N, mask, HAS_MINIMUM: tl.constexpr, PLUS: tl.constexpr = False):
    """(scale float32, zero int32, minimum float32) [BLOCK_N] of a group of columns; what is not there is 0. PLUS: the
    minimum is of numbers that are the codes plus 128."""
    at = group * N + columns
    stored = tl.load(scale_ptr + at, mask=mask, other=0)
    minimum = tl.load(minimum_ptr + at, mask=mask, other=0.0) if HAS_MINIMUM else tl.zeros(columns.shape, tl.float32)
    if stored.dtype == tl.float32:
        scale, zero = stored, tl.zeros(columns.shape, tl.int32)
    else:
        scale = (stored & -256).to(tl.float32, bitcast=True)
        zero = stored.to(tl.int8).to(tl.int32)
    if PLUS:
        minimum -= (zero + 136).to(tl.float32) * scale
    return scale, zero, minimum


@triton.jit(do_not_specialize=["M"])
def _grouped_kernel(
    x_ptr,  # [M, K], rows stride_x apart
    packed_ptr,  # uint8 [chunks, N, WIDTH]
    scale_ptr,  # int32 or float32 [groups, N]
    minimum_ptr,  # float32 [groups, N] if HAS_MINIMUM
    table_ptr,  # float32 [16] if HAS_TABLE
    bias_ptr,  # [N] if HAS_BIAS
    out_ptr,  # [M, N], contiguous
    partial_ptr,  # as in _reduce, if SPLIT_K > 1
    counter_ptr,
    M,
    N,
    num_chunks,
    stride_x,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,  # bytes of a row's chunk
    GROUP: tl.constexpr,  # columns of a group; WIDTH divides it
    HAS_MINIMUM: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    SWAP: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    UNROLL: tl.constexpr,
    FAST: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile, split, tokens): BLOCK_M tokens by BLOCK_N rows of the weight, as _weight_rows has them, over this
    split's share of the chunks."""
    tile, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CHUNK: tl.constexpr = WIDTH * 8 // BITS
    steps = num_chunks // UNROLL
    share = tl.cdiv(steps, SPLIT_K)
    first, last = split * share, tl.minimum(steps, (split + 1) * share)
    m, byte = part * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    n, in_columns = _weight_rows(tile, N, BLOCK_N, GATED)
    in_rows = m < M
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_x + byte[None, :]
    w_rows = packed_ptr + tl.minimum(n, N - 1)[:, None] * WIDTH + byte[None, :]
    words = _table_words(table_ptr, HAS_TABLE and FAST, DTYPE)
    _after_previous(OVERLAP, FILLS=not GATED)
    # To take 128 and the zero off the numbers takes longer than to multiply the sums of the tokens' by them.
    PLUS: tl.constexpr = BITS == 4 and not HAS_TABLE and not SCALE_FIRST and tl.bfloat16 == DTYPE and BLOCK_M <= 16
    SUMS: tl.constexpr = PLUS or HAS_MINIMUM
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        for within in tl.static_range(UNROLL):
            chunk = step * UNROLL + within
            at = chunk * CHUNK
            raw = tl.load(w_rows + chunk * N * WIDTH, eviction_policy="evict_first")
            x = tl.load(x_rows + at, mask=in_rows[:, None], other=0.0)
            scale, zero, minimum = _group_of(scale_ptr, minimum_ptr, at // GROUP, n, N, in_columns, HAS_MINIMUM, PLUS)
            zeros, ones = tl.zeros_like(acc), _ones(raw, DTYPE, FAST)
            if BITS == 8:
                w = _bytes(raw, DTYPE, FAST)
                acc, product, sums = _add(acc, zeros, zeros, w, x, ones, scale, minimum, SUMS, SCALE_FIRST, SWAP, FAST)
            else:
                x_high = tl.load(x_rows + at + WIDTH, mask=in_rows[:, None], other=0.0)
                low, high = _low_and_high(raw, zero + 8, table_ptr, words, HAS_TABLE, PLUS, DTYPE, FAST)
                acc, product, sums = _add(
                    acc, zeros, zeros, low, x, ones, scale, minimum, SUMS, SCALE_FIRST, SWAP, FAST
                )
                if GROUP % CHUNK:  # the high half may be in another group
                    if not SCALE_FIRST:
                        acc = _with_scale(acc, product, sums, scale, minimum, SUMS, SWAP)
                        product, sums = zeros, zeros
                    group = (at + WIDTH) // GROUP
                    scale, zero, minimum = _group_of(scale_ptr, minimum_ptr, group, n, N, in_columns, HAS_MINIMUM, PLUS)
                    if not (HAS_TABLE or PLUS):
                        _, high = _low_and_high(raw, zero + 8, table_ptr, words, HAS_TABLE, PLUS, DTYPE, FAST)
                acc, product, sums = _add(
                    acc, product, sums, high, x_high, ones, scale, minimum, SUMS, SCALE_FIRST, SWAP, FAST
                )
            if not SCALE_FIRST:
                acc = _with_scale(acc, product, sums, scale, minimum, SUMS, SWAP)
    if SWAP:
        acc = tl.trans(acc)
    row, columns = m[:, None], n[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    complete = True
    if SPLIT_K > 1:
        tile_of_all = part * tl.num_programs(0) + tile
        complete, acc = _reduce(acc, tile_of_all, split, M, row, columns, N, partial_ptr, counter_ptr, mask, SPLIT_K)
    if complete:
        _finish(acc, row, columns, N, bias_ptr, scale_ptr, out_ptr, mask, HAS_BIAS, False, GATED)


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
    plan: GroupedPlan | None = None,
) -> Tensor:
    """x Wᵀ + bias, accumulated in float32 and rounded once. Returns a new tensor [M, N] in x's dtype.

    x: bfloat16 or float16 [M, K], rows contiguous; packed, scale, minimum, group_size, table: as in
    octavo.quantization.grouped.GroupedWeight; bias: [N]. gated: as for `skinny_linear`. plan: instead of the rule's.
    One product at a time on a device: where K is split they share a workspace.
    Raises ValueError for shapes or dtypes that do not fit together.
    """
    (m, k), (num_chunks, n, width) = x.shape, packed.shape
    bits = 8 * num_chunks * width // k
    if bits not in (4, 8) or bits * k != 8 * num_chunks * width or x.stride(1) != 1:
        raise ValueError(f"x {list(x.shape)} and the packed weight {list(packed.shape)} do not fit")
    if tuple(scale.shape) != (k // group_size, n) or group_size % width or not packed.is_contiguous():
        raise ValueError(f"scale {list(scale.shape)}: expected [{k // group_size}, {n}], groups of whole half-chunks")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; expected torch.bfloat16 or torch.float16")
    if packed.numel() >= 1 << 31:
        raise ValueError(f"the packed weight has {packed.numel()} bytes; allowed: less than 2 GiB")
    if gated and n % 2:
        raise ValueError(f"the packed weight has {n} rows; gated needs an even number")
    out = torch.empty(m, n // 2 if gated else n, dtype=x.dtype, device=x.device)
    plan = GroupedPlan.of(m, n, num_chunks) if plan is None else plan
    tiles, parts = _cdiv(n, plan.block_n), _cdiv(m, plan.block_m)
    unroll = 1 if num_chunks % plan.unroll else plan.unroll
    # By the most tokens that share the plan: what is compiled does not depend on how many there are.
    most = max(8, _power_of_two(m))
    split_k = max(1, min(plan.split_k, num_chunks // unroll, _WORKSPACE_FLOATS // (most * n)))
    if tiles * parts > _MAX_TILES:
        split_k = 1
    partial, counters = _workspace(x.device) if split_k > 1 else (out, out)  # out: not read
    optional = (scale if tensor is None else tensor for tensor in (minimum, table, bias))  # scale: not read
    pointers = x, packed, scale, *optional, out
    shared = {
        "BITS": bits,
        "WIDTH": width,
        "GROUP": group_size,
        "HAS_MINIMUM": minimum is not None,
        "HAS_TABLE": table is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK_N": plan.block_n,
        "SPLIT_K": split_k,
        "STAGES": plan.num_stages,
        "FAST": x.is_cuda,
        "GATED": gated,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        **_overlap(x),
    }
    _grouped_kernel[(tiles, split_k, parts)](
        *pointers,
        partial,
        counters,
        m,
        n,
        num_chunks,
        x.stride(0),
        BLOCK_M=plan.block_m,
        SWAP=plan.swap,
        SCALE_FIRST=plan.scale_first,
        UNROLL=unroll,
        **shared,
    )
    return out


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # as in _grouped_kernel
    scale_ptr,
    minimum_ptr,
    table_ptr,
    out_ptr,  # [N, K], contiguous
    N,
    K,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile, chunk): BLOCK_N rows of one chunk."""
    tile, chunk = tl.program_id(0), tl.program_id(1)
    CHUNK: tl.constexpr = WIDTH * 8 // BITS
    n, byte = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    mask = (n < N)[:, None]
    raw = tl.load(packed_ptr + chunk * N * WIDTH + n[:, None] * WIDTH + byte[None, :], mask=mask, other=0)
    for half in tl.static_range(8 // BITS):
        code = ((raw >> 4 * half) & 15 if BITS == 4 else raw).to(tl.int32)
        column = chunk * CHUNK + half * WIDTH
        scale, zero, minimum = _group_of(scale_ptr, minimum_ptr, column // GROUP, n, N, n < N, HAS_MINIMUM)
        if HAS_TABLE:
            number = tl.load(table_ptr + code)
        else:
            number = (code - (8 if BITS == 4 else 128) - zero[:, None]).to(tl.float32)
        value = number * scale[:, None] + minimum[:, None]
        to = n.to(tl.int64)[:, None] * K + column + byte[None, :]
        tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_grouped(
    packed: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    group_size: int,
    table: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] in `dtype`, each element rounded once from float32. The rest as for `grouped_linear`."""
    num_chunks, n, width = packed.shape
    k = scale.shape[0] * group_size
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    _dequantize_kernel[(_cdiv(n, 32), num_chunks)](
        packed,
        scale,
        scale if minimum is None else minimum,
        scale if table is None else table,
        out,
        n,
        k,
        BITS=8 * num_chunks * width // k,
        WIDTH=width,
        GROUP=group_size,
        HAS_MINIMUM=minimum is not None,
        HAS_TABLE=table is not None,
        BLOCK_N=32,
    )
    return out
