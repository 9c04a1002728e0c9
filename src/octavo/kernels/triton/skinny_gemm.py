"""Matrix products of few tokens by a large weight: bound by the one pass over the weight's bytes.

Two kernels. `_dot_kernel` pads the tokens to a tile of the tensor cores; with SWAP the weight is the left operand,
which fills the 64 rows that a Hopper warp group multiplies at once. `_fma_kernel` serves one or two tokens on the
CUDA cores. Both keep several tiles of the weight in flight (asynchronous copies to shared memory), and where the rows
alone give too few programs they split K and let the last program of a tile to arrive add up the others' float32
partial sums, always in the same order: the same input gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.activation import _silu_times
from octavo.kernels.triton.launch import _after_previous, _cdiv, _overlap, _power_of_two

SKINNY_MAX_M = 16  # up to here the callers prefer these kernels
_LIMIT_M = 64  # up to here they work
_NUM_SMS = 132  # of an H100 or H200; only the heuristic for unmeasured shapes reads it
_WORKSPACE_FLOATS = 4 << 20  # 16 MiB of partial sums
_MAX_TILES = 1 << 14  # counters: tiles of a product whose K is split


class GemmPlan(NamedTuple):
    """How a product is cut up. kind: "dot" or "fma" (M <= 2); block_k: elements; swap: the weight is the left
    operand (dot only; block_n a multiple of 64 then)."""

    kind: str
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    swap: bool = True

    @classmethod
    def of(cls, m: int, n: int, k: int, element_size: int) -> GemmPlan:
        """The plan for x [m, k] by a weight [n, k] of elements of 1 or 2 bytes."""
        plans = _MEASURED.get((element_size, n, k), {})
        found = plans.get(next((limit for limit in (2, 8, 16, 32, 64) if m <= limit and limit in plans), 0))
        return _heuristic(m, n, k, element_size) if found is None else found


# (bytes of a weight element, N, K) -> plans for M <= 2, 8, 16, 32, 64. A limit that is absent has the next one's; what
# has none follows _heuristic. Measured on an H200 by benchmarks/gpu/kernel_gemm.py.
_MEASURED: dict[tuple[int, int, int], dict[int, GemmPlan]] = {
    (1, 4096, 4096): {
        2: GemmPlan("fma", 16, 512, 1, 4, 5, True),
        8: GemmPlan("dot", 64, 128, 4, 4, 6, True),
        16: GemmPlan("dot", 32, 256, 2, 4, 4, False),
    },
    (1, 4096, 14336): {
        2: GemmPlan("fma", 16, 512, 1, 4, 5, True),
        8: GemmPlan("dot", 64, 128, 4, 4, 6, True),
        16: GemmPlan("dot", 32, 256, 4, 4, 4, False),
    },
    (1, 6144, 4096): {
        2: GemmPlan("fma", 16, 512, 1, 4, 5, True),
        8: GemmPlan("dot", 64, 256, 5, 4, 4, True),
        16: GemmPlan("dot", 64, 256, 5, 4, 4, False),
    },
    (1, 28672, 4096): {
        2: GemmPlan("fma", 16, 512, 1, 4, 5, True),
        16: GemmPlan("dot", 32, 256, 1, 4, 4, False),
    },
    (1, 8192, 8192): {
        2: GemmPlan("fma", 8, 1024, 1, 4, 4, True),
        8: GemmPlan("dot", 64, 128, 2, 4, 6, True),
        16: GemmPlan("dot", 32, 256, 2, 4, 4, False),
    },
    (1, 8192, 28672): {
        2: GemmPlan("fma", 8, 1024, 1, 4, 4, True),
        8: GemmPlan("dot", 64, 128, 2, 4, 6, True),
        16: GemmPlan("dot", 32, 256, 2, 4, 4, False),
    },
    (1, 10240, 8192): {
        2: GemmPlan("fma", 8, 1024, 1, 4, 4, True),
        8: GemmPlan("dot", 64, 256, 2, 4, 4, True),
        16: GemmPlan("dot", 32, 256, 2, 4, 5, False),
    },
    (1, 57344, 8192): {
        2: GemmPlan("fma", 8, 1024, 1, 4, 4, True),
        8: GemmPlan("dot", 64, 128, 1, 4, 6, True),
        16: GemmPlan("dot", 32, 256, 1, 4, 4, False),
    },
    (2, 1024, 2048): {
        2: GemmPlan("fma", 4, 1024, 1, 4, 4, True),
        16: GemmPlan("dot", 32, 128, 4, 4, 4, False),
    },
    (2, 1024, 3072): {
        2: GemmPlan("fma", 4, 1024, 1, 4, 4, True),
        16: GemmPlan("dot", 64, 128, 8, 4, 4, True),
    },
    (2, 4096, 1024): {
        2: GemmPlan("fma", 16, 256, 1, 4, 5, True),
        16: GemmPlan("dot", 32, 128, 1, 4, 5, False),
    },
    (2, 4096, 4096): {
        2: GemmPlan("fma", 16, 256, 1, 4, 5, True),
        16: GemmPlan("dot", 64, 128, 2, 4, 4, True),
    },
    (2, 4096, 14336): {
        2: GemmPlan("fma", 16, 256, 1, 4, 5, True),
        16: GemmPlan("dot", 64, 128, 4, 4, 4, True),
    },
    (2, 6144, 1024): {
        2: GemmPlan("fma", 16, 256, 1, 4, 5, True),
        16: GemmPlan("dot", 64, 128, 1, 4, 4, True),
    },
    (2, 6144, 4096): {
        2: GemmPlan("fma", 16, 256, 1, 4, 5, True),
        16: GemmPlan("dot", 64, 128, 1, 4, 4, True),
    },
    (2, 28672, 4096): {
        2: GemmPlan("dot", 64, 128, 1, 4, 4, True),
        16: GemmPlan("dot", 64, 128, 1, 4, 4, True),
    },
    (2, 128256, 4096): {
        2: GemmPlan("fma", 16, 256, 1, 4, 5, True),
        16: GemmPlan("dot", 64, 128, 1, 4, 4, False),
    },
    (2, 151936, 1024): {
        2: GemmPlan("fma", 8, 512, 1, 4, 4, True),
        16: GemmPlan("dot", 128, 64, 1, 4, 5, True),
    },
}


def _heuristic(m: int, n: int, k: int, element_size: int) -> GemmPlan:
    """One or two tokens: 16 rows and 512 bytes a tile, where that gives every multiprocessor two programs or more. Else
    64 rows and 256 bytes a tile, about three programs on every multiprocessor, at least four tiles each.

    Bytes converted in registers suit the smaller tensor-core instruction, whose operands come from there anyway.
    """
    if m <= 2 and n >= 2 * 16 * _NUM_SMS:
        return GemmPlan("fma", 16, 512 // element_size, 1, 4, 5)
    block_k = 128 if element_size == 2 else 256
    while block_k > 64 and block_k > k:
        block_k //= 2
    tiles, steps = _cdiv(n, 64), _cdiv(k, block_k)
    split_k = max(1, min(3 * _NUM_SMS // tiles, steps // 4, 8))
    return GemmPlan("dot", 64, block_k, split_k, num_stages=4 if m <= 32 else 3, swap=element_size == 2)


@triton.jit
def _to_operand(w, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """A weight tile in the dtype of the activations, exactly.

    FAST (float8_e4m3 to bfloat16 on the device): exponent and mantissa move to their places in a bfloat16, which
    then is too small by 2**(127 - 7), subnormals included; one multiplication mends that. Four elements at a time.
    """
    if w.dtype == DTYPE:
        return w
    if FAST:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, d, k;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.b32 c, a, 4;
            shr.b32 d, b, 4;
            and.b32 c, c, 0x07F007F0;
            and.b32 d, d, 0x07F007F0;
            lop3.b32 c, a, 0x80008000, c, 0xEA;
            lop3.b32 d, b, 0x80008000, d, 0xEA;
            mov.b32 k, 0x7B807B80;
            mul.rn.bf16x2 $0, c, k;
            mul.rn.bf16x2 $1, d, k;
            }""",
            "=r,=r,r",
            [w.to(tl.uint8, bitcast=True)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return w.to(DTYPE)


@triton.jit
def _weight_rows(tile, N, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """The rows of the weight that a tile multiplies, int32 [BLOCK_N], and whether they are there. GATED: of the first
    half of N as many as of the second, which makes gates and what they are for."""
    place = tl.arange(0, BLOCK_N)
    if GATED:
        column = tile * (BLOCK_N // 2) + place % (BLOCK_N // 2)
        rows, there = column + place // (BLOCK_N // 2) * (N // 2), column < N // 2
    else:
        rows = tile * BLOCK_N + place
        there = rows < N
    return rows, there


@triton.jit
def _halves(tile):
    """The left and the right half [M, N / 2] of a tile [M, N]."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _finish(
    acc,
    row,
    columns,
    N,
    bias_ptr,
    scale_ptr,
    out_ptr,
    mask,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GATED: tl.constexpr = False,
):
    """Scale, add the bias, round once, store. acc: float32, of the shape that row and columns broadcast to; columns:
    the weight's rows. GATED: what is stored is silu(gate) * up of what was rounded, rounded again."""
    if HAS_SCALE:
        acc *= tl.load(scale_ptr + columns, mask=columns < N, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    made = acc.to(out_ptr.dtype.element_ty)
    if GATED:
        gate, up = _halves(made)
        made = _silu_times(gate, up).to(out_ptr.dtype.element_ty)
        offsets, _ = _halves(row.to(tl.int64) * (N // 2) + columns)
        mask, _ = _halves(tl.broadcast_to(mask, acc.shape))
    else:
        offsets = row.to(tl.int64) * N + columns
    tl.store(out_ptr + offsets, made, mask=mask)


@triton.jit
def _reduce(acc, tile, split, M, row, columns, N, partial_ptr, counter_ptr, mask, SPLIT_K: tl.constexpr):
    """Hand in a partial sum; (whether all of the tile's have been handed in, their sum if so).

    partial_ptr: float32 [SPLIT_K, M, N]; counter_ptr: int32, 0 for every tile before and after the product.
    """
    offsets = row * N + columns
    tl.store(partial_ptr + split * M * N + offsets, acc, mask=mask)
    tl.debug_barrier()  # every thread's partial sums are stored before one thread says so
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    last = arrived == SPLIT_K - 1
    if last:
        tl.debug_barrier()
        acc = tl.zeros_like(acc)
        for other in tl.static_range(SPLIT_K):  # .cg: other multiprocessors wrote these, past this one's L1
            acc += tl.load(partial_ptr + other * M * N + offsets, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    return last, acc


@triton.jit(do_not_specialize=["M"])
def _dot_kernel(
    x_ptr,  # [M, K], rows stride_x apart
    w_ptr,  # [N, K], contiguous
    bias_ptr,  # [N] if HAS_BIAS
    scale_ptr,  # float32 [N] if HAS_SCALE
    out_ptr,  # [M, N], contiguous
    partial_ptr,  # as in _reduce, if SPLIT_K > 1
    counter_ptr,
    M,
    N,
    K,
    stride_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SWAP: tl.constexpr,
    FAST: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile, split): a tile of BLOCK_N rows of the weight, as _weight_rows has them, over this split's share of
    K."""
    tile, split = tl.program_id(0), tl.program_id(1)
    steps = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(steps, SPLIT_K)
    first, last = split * share, tl.minimum(steps, (split + 1) * share)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n, there = _weight_rows(tile, N, BLOCK_N, GATED)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_x
    w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    _after_previous(OVERLAP, FILLS=not GATED)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        at = step * BLOCK_K + k[None, :]
        if EVEN_K:
            w = tl.load(w_rows + at, eviction_policy="evict_first")
            x = tl.load(x_rows + at, mask=m[:, None] < M, other=0.0)
        else:
            w = tl.load(w_rows + at, mask=at < K, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_rows + at, mask=(m[:, None] < M) & (at < K), other=0.0)
        w = _to_operand(w, x.dtype, FAST)
        acc = tl.dot(w, tl.trans(x), acc) if SWAP else tl.dot(x, tl.trans(w), acc)
    if SWAP:
        acc = tl.trans(acc)
    row, columns = m[:, None], n[None, :]
    mask = (row < M) & there[None, :]
    if SPLIT_K == 1:
        _finish(acc, row, columns, N, bias_ptr, scale_ptr, out_ptr, mask, HAS_BIAS, HAS_SCALE, GATED)
    else:
        complete, acc = _reduce(acc, tile, split, M, row, columns, N, partial_ptr, counter_ptr, mask, SPLIT_K)
        if complete:
            _finish(acc, row, columns, N, bias_ptr, scale_ptr, out_ptr, mask, HAS_BIAS, HAS_SCALE, GATED)


@triton.jit
def _fma_kernel(
    x_ptr,  # as in _dot_kernel
    w_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    N,
    K,
    stride_x,
    M: tl.constexpr,  # 1 or 2
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (tile, split): a float32 sum for every element of the tile of W, added up along K at the end."""
    tile, split = tl.program_id(0), tl.program_id(1)
    steps = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(steps, SPLIT_K)
    first, last = split * share, tl.minimum(steps, (split + 1) * share)
    n, there = _weight_rows(tile, N, BLOCK_N, GATED)
    k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    _after_previous(OVERLAP, FILLS=not GATED)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sums1 = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        at = step * BLOCK_K + k
        if EVEN_K:
            w = tl.load(w_rows + at[None, :], eviction_policy="evict_first").to(tl.float32)
            sums += w * tl.load(x_ptr + at).to(tl.float32)[None, :]
            if M == 2:
                sums1 += w * tl.load(x_ptr + stride_x + at).to(tl.float32)[None, :]
        else:
            w = tl.load(w_rows + at[None, :], mask=at[None, :] < K, other=0.0, eviction_policy="evict_first")
            w = w.to(tl.float32)
            sums += w * tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)[None, :]
            if M == 2:
                sums1 += w * tl.load(x_ptr + stride_x + at, mask=at < K, other=0.0).to(tl.float32)[None, :]
    row, columns, mask = tl.arange(0, M)[:, None], n[None, :], there[None, :]
    acc = tl.sum(sums, 1)[None, :]
    if M == 2:
        acc = tl.where(row == 0, acc, tl.sum(sums1, 1)[None, :])
    if SPLIT_K == 1:
        _finish(acc, row, columns, N, bias_ptr, scale_ptr, out_ptr, mask, HAS_BIAS, HAS_SCALE, GATED)
    else:
        complete, acc = _reduce(acc, tile, split, M, row, columns, N, partial_ptr, counter_ptr, mask, SPLIT_K)
        if complete:
            _finish(acc, row, columns, N, bias_ptr, scale_ptr, out_ptr, mask, HAS_BIAS, HAS_SCALE, GATED)


# Device index (-1: CPU) -> partial sums float32 [_WORKSPACE_FLOATS], counters int32 [_MAX_TILES]. Written by _workspace
# and by the kernels; all products of a device share it, so they must follow one another on one stream.
_workspaces: dict[int, tuple[Tensor, Tensor]] = {}


def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    index = -1 if device.index is None else device.index
    if index not in _workspaces:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("skinny_linear must run once on a device before it is captured in a CUDA graph")
        partial = torch.empty(_WORKSPACE_FLOATS, dtype=torch.float32, device=device)
        _workspaces[index] = partial, torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)
    return _workspaces[index]


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    gated: bool = False,
    plan: GemmPlan | None = None,
) -> Tensor:
    """x weightᵀ + bias, accumulated in float32 and rounded once. Returns [M, N] in x's dtype: `out` if given.

    x: bfloat16 or float16 [M, K], M in 1..64, rows contiguous; weight: [N, K] of x's dtype, contiguous; bias: [N];
    out: [M, N], contiguous. gated: silu(gate) * up instead, of the first and the second half of the product's columns,
    as `silu_and_mul` would make it of them: [M, N / 2]. plan: instead of the table's.
    One product at a time on a device: where K is split they share a workspace.
    Raises ValueError for shapes or dtypes that do not fit together.
    """
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype} and x is {x.dtype}; they must be the same")
    return _product(x, weight, None, bias, out, gated, plan)


def skinny_linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    gated: bool = False,
    plan: GemmPlan | None = None,
) -> Tensor:
    """x (weight · weight_scale)ᵀ + bias with the activations in full: W8A16. The rest as for `skinny_linear`.

    weight: float8_e4m3fn [N, K], contiguous; weight_scale: float32 [N] or [N, 1], a factor for every row.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"weight is {weight.dtype}; expected torch.float8_e4m3fn")
    return _product(x, weight, weight_scale, bias, out, gated, plan)


def _product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
    gated: bool,
    plan: GemmPlan | None,
) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    if not 1 <= m <= _LIMIT_M or weight.shape[1] != k or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} do not fit; M must be 1..{_LIMIT_M}")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}; expected torch.bfloat16 or torch.float16")
    num_columns = n // 2 if gated else n
    if out is None:
        out = torch.empty(m, num_columns, dtype=x.dtype, device=x.device)
    elif out.shape != (m, num_columns) or not out.is_contiguous():
        raise ValueError(f"out is {list(out.shape)}; expected a contiguous [{m}, {num_columns}]")
    if gated and n % 2:
        raise ValueError(f"weight has {n} rows; gated needs an even number")
    if plan is None:
        plan = GemmPlan.of(m, n, k, weight.element_size())
    tiles, steps = _cdiv(n, plan.block_n), _cdiv(k, plan.block_k)
    split_k = max(1, min(plan.split_k, steps, _WORKSPACE_FLOATS // (m * n)))
    if tiles > _MAX_TILES:
        split_k = 1
    partial, counters = _workspace(x.device) if split_k > 1 else (out, out)  # out: not read
    shared = {
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "SPLIT_K": split_k,
        "STAGES": plan.num_stages,
        "EVEN_K": k % plan.block_k == 0,
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "GATED": gated,
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        **_overlap(x),
    }
    pointers = (x, weight, bias, scale, out, partial, counters)
    if plan.kind == "fma":
        if m > 2:
            raise ValueError(f"plan {plan} serves one or two tokens; x has {m}")
        _fma_kernel[(tiles, split_k)](*pointers, n, k, x.stride(0), M=m, **shared)
        return out
    _dot_kernel[(tiles, split_k)](
        *pointers,
        m,
        n,
        k,
        x.stride(0),
        # Eight tokens do where the weight fills the long side; bfloat16 weights gained nothing by it.
        BLOCK_M=8 if m <= 8 and plan.swap and scale is not None else max(16, _power_of_two(m)),
        SWAP=plan.swap,
        FAST=scale is not None and x.is_cuda and x.dtype == torch.bfloat16,
        **shared,
    )
    return out
