"""Matrix products by integer weights with a scale for every group of columns (W4A16, W8A16).

The weight lies in chunks of columns, as octavo.quantization.grouped packs it. A program takes BLOCK_N rows and walks
along the chunks: bytes come in by asynchronous copies, become numbers in registers by setting the exponent around the
bits (exact), and go into the tensor cores. Few tokens multiply the whole numbers, and the sum of each group is scaled
in float32; many tokens multiply scaled numbers, rounded to the activations' dtype, so that sums stay in the cores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.skinny_gemm import _reduce, _workspace

GROUPED_MAX_M = 512  # up to here the callers prefer this kernel to dequantizing the weight
_NUM_SMS = 132  # of an H100 or H200
_WORKSPACE_FLOATS = 4 << 20  # as in skinny_gemm
_MAX_TILES = 1 << 14

_NO_SHIFT = tl.constexpr(0)
_ZERO = tl.constexpr(1)  # int8: of whole numbers
_MINIMUM = tl.constexpr(2)  # float32: of scaled numbers


class GroupedPlan(NamedTuple):
    """How a product is cut up. block_m: tokens of a program; swap: the weight is the left operand, which fills the 64
    rows that a Hopper warp group multiplies at once; scale_first: numbers are scaled before they are multiplied."""

    block_m: int
    block_n: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    swap: bool = False
    scale_first: bool = False

    @classmethod
    def of(cls, m: int, n: int, num_chunks: int) -> GroupedPlan:
        """The plan for x [m, k] by a weight of n rows and num_chunks chunks."""
        if m <= 32:
            block_m = 16 if m <= 16 else 32
            split = _split(triton.cdiv(n, 64), num_chunks, 3)
            return cls(block_m, 64, split, 4, 5)
        block_m = 64 if m <= 64 else 128
        tiles = triton.cdiv(n, 128) * triton.cdiv(m, block_m)
        return cls(block_m, 128, _split(tiles, num_chunks, 1), 8, 4, True, True)


def _split(tiles: int, num_chunks: int, programs_per_sm: int) -> int:
    """Splits of K that give every multiprocessor so many programs, each with at least four chunks."""
    return max(1, min(programs_per_sm * _NUM_SMS // tiles, num_chunks // 4, 8))


@triton.jit
def _bf16_numbers(raw, zero):
    """raw: uint8 of two codes each; zero: bfloat16, 136 and the code that stands for 0 less 8. The low codes and the
    high ones, less what stands for 0, exactly: 0x43 in front of a code makes it the bfloat16 128 + code."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.b32 c, a, 4;
        shr.b32 d, b, 4;
        lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
        lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
        sub.rn.bf16x2 $0, a, $5;
        sub.rn.bf16x2 $1, b, $6;
        sub.rn.bf16x2 $2, c, $5;
        sub.rn.bf16x2 $3, d, $6;
        }""",
        "=r,=r,=r,=r,r,r,r",
        [raw, zero],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _fp16_numbers(raw, zero):
    """As _bf16_numbers for float16, where 0x64 in front of a code makes it 1024 + code; zero: 1032 and so on."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.b32 c, a, 4;
        shr.b32 d, b, 4;
        lop3.b32 a, a, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 b, b, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 c, c, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 d, d, 0x000F000F, 0x64006400, 0xEA;
        sub.rn.f16x2 $0, a, $5;
        sub.rn.f16x2 $1, b, $6;
        sub.rn.f16x2 $2, c, $5;
        sub.rn.f16x2 $3, d, $6;
        }""",
        "=r,=r,=r,=r,r,r,r",
        [raw, zero],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _bf16_bytes(raw):
    """raw: uint8. raw - 128 in bfloat16: the low seven bits as 128 + bits, less 128 or 256 by the eighth."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $2, 0, 0x4140;
        prmt.b32 b, $2, 0, 0x4342;
        and.b32 c, a, 0x00800080;
        and.b32 d, b, 0x00800080;
        xor.b32 c, c, 0x43804380;
        xor.b32 d, d, 0x43804380;
        lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;
        lop3.b32 b, b, 0x007F007F, 0x43004300, 0xEA;
        sub.rn.bf16x2 $0, a, c;
        sub.rn.bf16x2 $1, b, d;
        }""",
        "=r,=r,r",
        [raw],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _low_and_high(raw, shift, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """The numbers of 4-bit codes, less `shift` [BLOCK_N, 1], in DTYPE, exactly."""
    if FAST:
        base = 136.0 if tl.bfloat16 == DTYPE else 1032.0
        zero = tl.broadcast_to((shift.to(tl.float32) + base).to(DTYPE), raw.shape)
        if tl.bfloat16 == DTYPE:
            low, high = _bf16_numbers(raw, zero)
        else:
            low, high = _fp16_numbers(raw, zero)
    else:
        low = ((raw & 15).to(tl.int16) - 8 - shift.to(tl.int16)).to(tl.float32).to(DTYPE)
        high = ((raw >> 4).to(tl.int16) - 8 - shift.to(tl.int16)).to(tl.float32).to(DTYPE)
    return low, high


@triton.jit
def _accumulate(acc, w, x, scale, minimum, SHIFT: tl.constexpr, SCALE_FIRST: tl.constexpr, SWAP: tl.constexpr):
    """acc plus the product of one group's numbers w [BLOCK_N, H] and x [BLOCK_M, H]; scale, minimum: [BLOCK_N]."""
    if SCALE_FIRST:
        scaled = w.to(tl.float32) * scale.to(tl.float32)[:, None]
        w = (scaled + minimum[:, None] if SHIFT == _MINIMUM else scaled).to(w.dtype)
        return tl.dot(w, tl.trans(x), acc) if SWAP else tl.dot(x, tl.trans(w), acc)
    if SWAP:
        acc += tl.dot(w, tl.trans(x)) * scale.to(tl.float32)[:, None]
        if SHIFT == _MINIMUM:
            acc += minimum[:, None] * tl.sum(x.to(tl.float32), 1)[None, :]
    else:
        acc += tl.dot(x, tl.trans(w)) * scale.to(tl.float32)[None, :]
        if SHIFT == _MINIMUM:
            acc += tl.sum(x.to(tl.float32), 1)[:, None] * minimum[None, :]
    return acc


@triton.jit
def _group_of(scale_ptr, shift_ptr, group, columns, N, mask, SHIFT: tl.constexpr):
    """(scale, shift) [BLOCK_N] of a group of columns; shift is 0 where there is none."""
    at = group * N + columns
    scale = tl.load(scale_ptr + at, mask=mask, other=0.0)
    shift = tl.zeros(scale.shape, tl.int8) if SHIFT == _NO_SHIFT else tl.load(shift_ptr + at, mask=mask, other=0)
    return scale, shift


@triton.jit(do_not_specialize=["M"])
def _grouped_kernel(
    x_ptr,  # [M, K], rows stride_x apart
    packed_ptr,  # uint8 [chunks, N, WIDTH]
    scale_ptr,  # [groups, N]
    shift_ptr,  # int8 or float32 [groups, N], by SHIFT
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
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SWAP: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    FAST: tl.constexpr,
):
    """Program (tile, split, tokens): out[BLOCK_M tokens, BLOCK_N columns] over this split's share of the chunks."""
    tile, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    CHUNK: tl.constexpr = WIDTH * 8 // BITS
    share = tl.cdiv(num_chunks, SPLIT_K)
    first, last = split * share, tl.minimum(num_chunks, (split + 1) * share)
    m, n = part * BLOCK_M + tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    byte, in_rows, in_columns = tl.arange(0, WIDTH), m < M, n < N
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_x + byte[None, :]
    w_rows = packed_ptr + tl.minimum(n, N - 1)[:, None] * WIDTH + byte[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for chunk in tl.range(first, last, num_stages=STAGES):
        raw = tl.load(w_rows + chunk * N * WIDTH, eviction_policy="evict_first")
        x = tl.load(x_rows + chunk * CHUNK, mask=in_rows[:, None], other=0.0)
        scale, shift = _group_of(scale_ptr, shift_ptr, chunk * CHUNK // GROUP, n, N, in_columns, SHIFT)
        if BITS == 8:
            w = _bf16_bytes(raw) if FAST and tl.bfloat16 == DTYPE else (raw.to(tl.int16) - 128).to(tl.float32).to(DTYPE)
            minimum = shift.to(tl.float32)
            if SHIFT == _ZERO:
                minimum *= -scale.to(tl.float32)
            acc = _accumulate(acc, w, x, scale, minimum, 2 if SHIFT == _ZERO else SHIFT, SCALE_FIRST, SWAP)
        else:
            x_high = tl.load(x_rows + chunk * CHUNK + WIDTH, mask=in_rows[:, None], other=0.0)
            zero = shift[:, None] if SHIFT == _ZERO else tl.zeros((BLOCK_N, 1), tl.int8)
            low, high = _low_and_high(raw, zero, DTYPE, FAST)
            if GROUP % CHUNK:  # a group ends in the middle of the chunk
                group = (chunk * CHUNK + WIDTH) // GROUP
                scale_high, shift_high = _group_of(scale_ptr, shift_ptr, group, n, N, in_columns, SHIFT)
                if SHIFT == _ZERO:
                    _, high = _low_and_high(raw, shift_high[:, None], DTYPE, FAST)
            else:
                scale_high, shift_high = scale, shift
            acc = _accumulate(acc, low, x, scale, shift.to(tl.float32), SHIFT, SCALE_FIRST, SWAP)
            acc = _accumulate(acc, high, x_high, scale_high, shift_high.to(tl.float32), SHIFT, SCALE_FIRST, SWAP)
    if SWAP:
        acc = tl.trans(acc)
    row, columns = m[:, None], n[None, :]
    mask = in_rows[:, None] & in_columns[None, :]
    complete = True
    if SPLIT_K > 1:
        tile_of_all = part * tl.num_programs(0) + tile
        complete, acc = _reduce(acc, tile_of_all, split, M, row, columns, N, partial_ptr, counter_ptr, mask, SPLIT_K)
    if complete:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + row.to(tl.int64) * N + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    group_size: int,
    bias: Tensor | None = None,
    *,
    plan: GroupedPlan | None = None,
) -> Tensor:
    """x Wᵀ + bias, accumulated in float32 and rounded once. Returns a new tensor [M, N] in x's dtype.

    x: bfloat16 or float16 [M, K], rows contiguous; packed, scale, shift, group_size: as in
    octavo.quantization.grouped.GroupedWeight; bias: [N]. plan: instead of the rule's.
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
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    plan = GroupedPlan.of(m, n, num_chunks) if plan is None else plan
    tiles, parts = triton.cdiv(n, plan.block_n), triton.cdiv(m, plan.block_m)
    split_k = max(1, min(plan.split_k, num_chunks, _WORKSPACE_FLOATS // (m * n)))
    if tiles * parts > _MAX_TILES:
        split_k = 1
    partial, counters = _workspace(x.device) if split_k > 1 else (out, out)  # out: not read
    _grouped_kernel[(tiles, split_k, parts)](
        x,
        packed,
        scale,
        scale if shift is None else shift,
        out if bias is None else bias,
        out,
        partial,
        counters,
        m,
        n,
        num_chunks,
        x.stride(0),
        BITS=bits,
        WIDTH=width,
        GROUP=group_size,
        SHIFT=0 if shift is None else 2 if shift.is_floating_point() else 1,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        SPLIT_K=split_k,
        STAGES=plan.num_stages,
        HAS_BIAS=bias is not None,
        SWAP=plan.swap,
        SCALE_FIRST=plan.scale_first,
        FAST=x.is_cuda,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # as in _grouped_kernel
    scale_ptr,
    shift_ptr,
    out_ptr,  # [N, K], contiguous
    N,
    K,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tile, chunk): BLOCK_N rows of one chunk."""
    tile, chunk = tl.program_id(0), tl.program_id(1)
    CHUNK: tl.constexpr = WIDTH * 8 // BITS
    n, byte = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    mask = (n < N)[:, None]
    at = chunk * N * WIDTH + n[:, None] * WIDTH + byte[None, :]
    raw = tl.load(packed_ptr + at, mask=mask, other=0).to(tl.int32)
    for half in tl.static_range(8 // BITS):
        code = (raw >> (4 * half)) & (15 if BITS == 4 else 255)
        number = (code - (8 if BITS == 4 else 128)).to(tl.float32)
        column = chunk * CHUNK + half * WIDTH
        scale, shift = _group_of(scale_ptr, shift_ptr, column // GROUP, n, N, n < N, SHIFT)
        scale, shift = scale.to(tl.float32)[:, None], shift.to(tl.float32)[:, None]
        value = number * scale + shift if SHIFT == _MINIMUM else (number - shift) * scale
        to = n.to(tl.int64)[:, None] * K + column + byte[None, :]
        tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_grouped(
    packed: Tensor, scale: Tensor, shift: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight [N, K] in `dtype`, each element rounded once from float32. The rest as for `grouped_linear`."""
    num_chunks, n, width = packed.shape
    k = scale.shape[0] * group_size
    out = torch.empty(n, k, dtype=dtype, device=packed.device)
    _dequantize_kernel[(triton.cdiv(n, 32), num_chunks)](
        packed,
        scale,
        scale if shift is None else shift,
        out,
        n,
        k,
        BITS=8 * num_chunks * width // k,
        WIDTH=width,
        GROUP=group_size,
        SHIFT=0 if shift is None else 2 if shift.is_floating_point() else 1,
        BLOCK_N=32,
    )
    return out
