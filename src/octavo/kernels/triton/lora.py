"""Low-rank adapters (LoRA, Hu et al. 2021), several of them in one batch (Punica, Chen et al. 2023; S-LoRA, Sheng et
al. 2023): y[t] += B[slot of t] (A[slot of t] x[t]).

Two kernels. `_shrink_kernel` multiplies tokens by A, over a share of K where the tokens alone give too few programs;
`_expand_kernel` adds up the shares, always in the same order, multiplies by B and adds the product to y in one pass.
A program takes a tile of tokens and walks through the slots that occur in it, one after another, so any order of the
tokens is right and a sorted one is fast. An adapter's bytes touch no token but its own, were they NaN. Work follows
an adapter's true rank, not the rank that its slot has room for, and a tile without any adapter ends at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _cdiv, _power_of_two

_NUM_SMS = 132  # of an H100 or H200
_BUCKETS = (64, 256, 512, 1024, 2048, 4096, 8192)  # numbers of tokens up to which one plan serves; the last: all
_FEW = 256  # tokens: up to here tiles are the smallest that tensor cores take
_MAX_SPLITS = 16
_MAX_BLOCK_R = 64
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class LoraPlan(NamedTuple):
    """How the two products are cut up.

    shrink_m, expand_m: tokens of a program; block_k: columns of A a step; splits: shares of K; block_n: rows of B;
    expand_r: columns of B a step, at most.
    """

    shrink_m: int = 16
    block_k: int = 128
    splits: int = 1
    shrink_warps: int = 4
    shrink_stages: int = 4
    expand_m: int = 16
    block_n: int = 128
    expand_r: int = 32
    expand_warps: int = 4

    @classmethod
    def of(cls, num_tokens: int, in_features: int, num_parts: int, rank: int) -> LoraPlan:
        """The plan for x [num_tokens, in_features]; one for all numbers of tokens of a bucket. rank: R of A."""
        most = next((limit for limit in _BUCKETS if num_tokens <= limit), _BUCKETS[-1])
        few = most <= _FEW
        shrink_m = 16 if few else 64
        columns = 256 if most <= 64 else 512 if most <= 512 else 1024  # at least so many a split
        tiles = _cdiv(most, shrink_m) * _cdiv(num_parts * rank, _block_r(num_parts * rank))
        wanted = min(_MAX_SPLITS, in_features // columns, _MAX_SPLITS if few else _NUM_SMS // tiles)
        splits = 1 << (max(1, wanted).bit_length() - 1)  # powers of two: few variants
        if few:
            return cls(shrink_m, 128, splits, 2, 4, expand_m=16, block_n=256)
        return cls(shrink_m, 128, splits, 4, 3, expand_m=32, block_n=128)

    @classmethod
    def launches(
        cls, in_features: int, parts: tuple[int, ...], rank: int, dtype: torch.dtype, device: torch.device
    ) -> dict[Hashable, Callable[[], object]]:
        """What `add_lora` is compiled for, whatever the tokens, slots and true ranks: each call launches one variant of
        one kernel on a token without an adapter. Keys are equal where variants are, of whatever shapes they are."""
        found: dict[Hashable, Callable[[], object]] = {}
        ranks = len(parts) * rank
        for num_tokens in _BUCKETS:
            plan = cls.of(num_tokens, in_features, len(parts), rank)
            key: Hashable = "lora shrink", dtype, len(parts), _block_r(ranks), plan._replace(splits=0)[:5]
            found.setdefault(key, partial(_launch_shrink, in_features, len(parts), rank, dtype, device, plan))
            key = "lora expand", dtype, parts, _block_r(rank, plan.expand_r), plan.splits, plan[5:]
            found.setdefault(key, partial(_launch_expand, parts, rank, dtype, device, plan))
        return found

    @classmethod
    def embedding_launches(
        cls, out_features: int, rank: int, dtype: torch.dtype, ids_dtype: torch.dtype, device: torch.device
    ) -> dict[Hashable, Callable[[], object]]:
        """As `launches`, for `add_lora_embedding`."""
        found: dict[Hashable, Callable[[], object]] = {}
        for num_tokens in _BUCKETS:
            plan = cls.of(num_tokens, rank, 1, rank)
            key = "lora embedding", dtype, ids_dtype, out_features, _block_r(rank, plan.expand_r), plan[5:]
            found.setdefault(key, partial(_launch_embedding, out_features, rank, dtype, ids_dtype, device, plan))
        return found


def _block_r(rank: int, most: int = _MAX_BLOCK_R) -> int:
    """Ranks of one product on the tensor cores."""
    return min(most, _power_of_two(rank))


@triton.jit
def _slots_of_tile(token_slots_ptr, t, T, S, group, num_groups):
    """The slot of each token of a tile, S for those that have none or whose slot another group of programs takes."""
    slots = tl.load(token_slots_ptr + t, mask=t < T, other=-1)
    return tl.where((slots >= 0) & (slots % num_groups == group), slots, S)


# Integers that decide how wide loads may be come divided by what divides them; none is compiled for by its value.
@triton.jit(
    do_not_specialize=["T", "S", "k_eighths", "r_sixteenths", "stride_x_eighths", "stride_a_sixteenths"],
    do_not_specialize_on_alignment=["ranks_ptr", "token_slots_ptr"],
)
def _shrink_kernel(
    x_ptr,  # [T, K], rows stride_x apart
    a_ptr,  # [S, PARTS, R, K], slots stride_a apart
    ranks_ptr,  # int32 [PARTS, S]
    token_slots_ptr,  # int32 [T]
    hidden_ptr,  # float32 [splits, T, PARTS * R]
    T,
    S,
    k_eighths,
    r_sixteenths,
    stride_x_eighths,
    stride_a_sixteenths,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (tile of tokens and block of ranks, split, group of slots). The ranks of all parts that the adapter has
    are one row, each part's rounded up to 16, which blocks of BLOCK_R divide: one pass over x for all parts."""
    K, R = k_eighths * 8, r_sixteenths * 16
    blocks = tl.cdiv(PARTS * R, BLOCK_R)
    tile, block, split = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    first, last = split * share, tl.minimum(K, (split + 1) * share)
    t, k, packed = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    packed += block * BLOCK_R
    rows = t.to(tl.int64)[:, None]
    x_rows = x_ptr + rows * (stride_x_eighths.to(tl.int64) * 8) + k[None, :]
    h_rows = hidden_ptr + (split.to(tl.int64) * T + rows) * (PARTS * R)
    todo = _slots_of_tile(token_slots_ptr, t, T, S, tl.program_id(2), tl.num_programs(2))
    slot = tl.min(todo, 0)
    while slot < S:
        mine = todo == slot
        column, is_live, total = tl.zeros((BLOCK_R,), tl.int32), packed < 0, 0
        for part in tl.static_range(PARTS):
            rank = tl.load(ranks_ptr + part * S + slot)
            padded = tl.cdiv(rank, 16) * 16
            within = packed - total
            is_here = (within >= 0) & (within < padded)
            column = tl.where(is_here, part * R + within, column)
            is_live |= is_here & (within < rank)
            total += padded
        if block * BLOCK_R < total:
            a_slot = a_ptr + slot.to(tl.int64) * (stride_a_sixteenths.to(tl.int64) * 16)
            a_rows = a_slot + column[:, None] * K + k[None, :]
            acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for at in tl.range(first, last, BLOCK_K, num_stages=STAGES):
                in_share = (at + k < last)[None, :]
                x = tl.load(x_rows + at, mask=mine[:, None] & in_share, other=0.0)
                w = tl.load(a_rows + at, mask=is_live[:, None] & in_share, other=0.0)
                acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
            tl.store(h_rows + column[None, :], acc, mask=mine[:, None] & (packed < total)[None, :])
        todo = tl.where(mine, S, todo)
        slot = tl.min(todo, 0)


@triton.jit(
    do_not_specialize=["T", "S", "r_sixteenths", "stride_y_units", "stride_a_sixteenths", "stride_b_sixteenths"],
    do_not_specialize_on_alignment=["ranks_ptr", "token_slots_ptr", "ids_ptr"],
)
def _expand_kernel(
    y_ptr,  # [T, sum of PARTS], rows stride_y apart
    hidden_ptr,  # float32 [SPLITS, T, len(PARTS) * R]; if IS_EMBEDDING A, [S, vocabulary, R], slots stride_a apart
    b_ptr,  # [S, sum of PARTS, R], slots stride_b apart
    ranks_ptr,  # int32 [len(PARTS), S]
    token_slots_ptr,  # int32 [T]
    ids_ptr,  # [T], if IS_EMBEDDING
    T,
    S,
    r_sixteenths,
    stride_y_units,
    stride_a_sixteenths,
    stride_b_sixteenths,
    PARTS: tl.constexpr,  # rows of each part
    UNIT: tl.constexpr,  # divides stride_y
    SPLITS: tl.constexpr,
    IS_EMBEDDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program (tile of one part's columns of y, tile of tokens, group of slots)."""
    R = r_sixteenths * 16
    tile = tl.program_id(0)
    part, begin, end, first_tile, first = 0, 0, 0, 0, 0
    for index in tl.static_range(len(PARTS)):
        is_here = tile >= first_tile
        part = tl.where(is_here, index, part)
        begin = tl.where(is_here, first + (tile - first_tile) * BLOCK_N, begin)
        end = tl.where(is_here, first + PARTS[index], end)
        first_tile += (PARTS[index] + BLOCK_N - 1) // BLOCK_N
        first += PARTS[index]
    t, n = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), begin + tl.arange(0, BLOCK_N)
    in_part, rows = (n < end)[None, :], t.to(tl.int64)[:, None]
    y_at = y_ptr + rows * (stride_y_units.to(tl.int64) * UNIT) + n[None, :]
    if IS_EMBEDDING:
        h_rows = hidden_ptr + tl.load(ids_ptr + t, mask=t < T, other=0).to(tl.int64)[:, None] * R
    else:
        h_rows = hidden_ptr + rows * (len(PARTS) * R) + part * R
    per_split = T.to(tl.int64) * (len(PARTS) * R)
    todo = _slots_of_tile(token_slots_ptr, t, T, S, tl.program_id(2), tl.num_programs(2))
    y = tl.load(y_at, mask=(todo < S)[:, None] & in_part, other=0.0)  # early: no slot writes another's rows
    slot = tl.min(todo, 0)
    while slot < S:
        mine = (todo == slot)[:, None]
        rank = tl.load(ranks_ptr + part * S + slot)
        if rank > 0:
            b_rows = b_ptr + slot.to(tl.int64) * (stride_b_sixteenths.to(tl.int64) * 16) + n[:, None] * R
            h_slot = h_rows
            if IS_EMBEDDING:
                h_slot += slot.to(tl.int64) * (stride_a_sixteenths.to(tl.int64) * 16)
            padded = tl.cdiv(rank, 16) * 16  # up to here hidden is written; a multiple of 16 keeps the loads wide
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for at in tl.range(0, rank, BLOCK_R, num_stages=1):
                r = (at + tl.arange(0, BLOCK_R))[None, :]
                w = tl.load(b_rows + r, mask=(n < end)[:, None] & (r < padded), other=0.0)
                h = tl.load(h_slot + r, mask=mine & (r < padded), other=0.0)
                for split in tl.static_range(1, SPLITS):
                    h += tl.load(h_slot + split * per_split + r, mask=mine & (r < padded), other=0.0)
                w, h = tl.where(r < rank, w, 0.0), tl.where(r < rank, h, 0.0)
                acc = tl.dot(h.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
            tl.store(y_at, (y.to(tl.float32) + acc).to(y.dtype), mask=mine & in_part)
        todo = tl.where(mine.reshape(BLOCK_M), S, todo)
        slot = tl.min(todo, 0)


def add_lora(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Tensor,
    parts: tuple[int, ...],
    token_slots: Tensor,
    *,
    plan: LoraPlan | None = None,
) -> None:
    """y[t] += B[slot] (A[slot] x[t]) for every token t that has a slot, each part with its own A; in place.

    y: [T, N], x: [T, K], K a multiple of 8, rows contiguous; a: [S, P, R, K], b: [S, N, R], R a multiple of 16, each
    slot contiguous; all bfloat16, float16 or float32. parts: rows of each of the P parts, whose sum is N; ranks: int32
    [P, S], contiguous: a part's true rank in a slot, at most R, 0 for a part that the slot's adapter leaves alone;
    token_slots: int32 [T], contiguous: below S, -1 for none. Rows of A and columns of B from the true rank on are not
    read. Both products are accumulated in float32; the first is rounded to the dtype in between, the sum with y once.
    The same input gives the same bits. plan: instead of the rule's.
    Raises ValueError for shapes, strides or dtypes that do not fit together.
    """
    expand_lora(y, shrink_lora(x, a, ranks, token_slots, plan=plan), b, ranks, parts, token_slots, plan=plan)


def shrink_lora(x: Tensor, a: Tensor, ranks: Tensor, token_slots: Tensor, *, plan: LoraPlan | None = None) -> Tensor:
    """The first half of `add_lora`, which needs no y: each split's share of A x, float32 [splits, T, P * R]. What no
    token needs is left as it was in memory."""
    (num_tokens, k), (num_slots, num_parts, rank, columns) = x.shape, a.shape
    if columns != k or k % 8 or rank % 16 or not a[0].is_contiguous() or a.dtype != x.dtype or x.dtype not in _DTYPES:
        raise ValueError(f"a is {a.dtype} {list(a.shape)}; x, {x.dtype} {list(x.shape)}, does not fit")
    if x.stride(1) != 1 or x.stride(0) % 8 or a.stride(0) % 16:
        raise ValueError(f"x has strides {x.stride()}; a slot's is {a.stride(0)}; allowed: multiples of 8, of 16")
    _check_slots(ranks, token_slots, (num_parts, num_slots), num_tokens)
    plan = LoraPlan.of(num_tokens, k, num_parts, rank) if plan is None else plan
    hidden = torch.empty(plan.splits, num_tokens, num_parts * rank, dtype=torch.float32, device=x.device)
    if num_tokens:
        _shrink(hidden, x, a, ranks, token_slots, plan)
    return hidden


def expand_lora(
    y: Tensor,
    hidden: Tensor,
    b: Tensor,
    ranks: Tensor,
    parts: tuple[int, ...],
    token_slots: Tensor,
    *,
    plan: LoraPlan | None = None,
) -> None:
    """The second half of `add_lora`. hidden: as `shrink_lora` made it."""
    num_tokens, rank = len(y), b.shape[2]
    _check(y, b, ranks, token_slots, parts)
    if hidden.shape[1:] != (num_tokens, len(parts) * rank) or hidden.dtype != torch.float32:
        raise ValueError(
            f"hidden is {hidden.dtype} {list(hidden.shape)}; y {list(y.shape)}, b {list(b.shape)} do not fit"
        )
    if num_tokens:
        plan = LoraPlan.of(num_tokens, rank, len(parts), rank) if plan is None else plan
        _expand(y, hidden, b, ranks, token_slots, token_slots, parts, 0, len(hidden), plan)


def add_lora_embedding(
    y: Tensor,
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    *,
    plan: LoraPlan | None = None,
) -> None:
    """y[t] += B[slot] A[slot][ids[t]] for every token t that has a slot; in place.

    ids: int64 or int32 [T], contiguous, below V; a: [S, V, R], each slot contiguous: a token's numbers side by side;
    ranks: int32 [1, S]. The rest as for `add_lora`.
    """
    num_tokens, rank = len(ids), a.shape[2]
    parts = (y.shape[1],)
    _check(y, b, ranks, token_slots, parts)
    if a.shape[2] != b.shape[2] or not a[0].is_contiguous() or a.dtype != y.dtype or a.stride(0) % 16:
        raise ValueError(f"a is {a.dtype} {list(a.shape)}, strides {a.stride()}; b {list(b.shape)} does not fit")
    if ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous():
        raise ValueError(f"ids are {ids.dtype} with strides {ids.stride()}; expected contiguous int32 or int64")
    if num_tokens:
        plan = LoraPlan.of(num_tokens, rank, 1, rank) if plan is None else plan
        _expand(y, a, b, ranks, token_slots, ids, parts, a.stride(0), 0, plan)


def _shrink(hidden: Tensor, x: Tensor, a: Tensor, ranks: Tensor, token_slots: Tensor, plan: LoraPlan) -> None:
    (num_tokens, k), (num_slots, num_parts, rank, _) = x.shape, a.shape
    block_r = _block_r(num_parts * rank)
    tiles = _cdiv(num_tokens, plan.shrink_m) * _cdiv(num_parts * rank, block_r)
    _shrink_kernel[tiles, plan.splits, _groups(num_tokens, num_slots, plan.shrink_m)](
        x,
        a,
        ranks,
        token_slots,
        hidden,
        num_tokens,
        num_slots,
        k // 8,
        rank // 16,
        x.stride(0) // 8,
        a.stride(0) // 16,
        PARTS=num_parts,
        BLOCK_M=plan.shrink_m,
        BLOCK_K=plan.block_k,
        BLOCK_R=block_r,
        STAGES=plan.shrink_stages,
        num_warps=plan.shrink_warps,
        num_stages=plan.shrink_stages,
    )


def _expand(
    y: Tensor,
    hidden: Tensor,
    b: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    ids: Tensor,
    parts: tuple[int, ...],
    stride_a: int,
    splits: int,
    plan: LoraPlan,
) -> None:
    """splits: of hidden; 0 for an embedding, whose A hidden is then."""
    (num_tokens, _), (num_slots, _, rank) = y.shape, b.shape
    unit = 8 if y.stride(0) % 8 == 0 else 1
    tiles = sum(_cdiv(size, plan.block_n) for size in parts)
    groups = _groups(num_tokens, num_slots, plan.expand_m)
    _expand_kernel[tiles, _cdiv(num_tokens, plan.expand_m), groups](
        y,
        hidden,
        b,
        ranks,
        token_slots,
        ids,
        num_tokens,
        num_slots,
        rank // 16,
        y.stride(0) // unit,
        stride_a // 16,
        b.stride(0) // 16,
        PARTS=parts,
        UNIT=unit,
        SPLITS=splits,
        IS_EMBEDDING=splits == 0,
        BLOCK_M=plan.expand_m,
        BLOCK_N=plan.block_n,
        BLOCK_R=_block_r(rank, plan.expand_r),
        num_warps=plan.expand_warps,
    )


def _groups(num_tokens: int, num_slots: int, block_m: int) -> int:
    """Programs that share the slots of a tile: about as many as a tile of sorted tokens has slots, and one where most
    tiles have one."""
    return min(num_slots, num_tokens, 1 + 2 * block_m * num_slots // num_tokens)


def _check(y: Tensor, b: Tensor, ranks: Tensor, token_slots: Tensor, parts: tuple[int, ...]) -> None:
    num_slots, num_tokens = len(b), len(y)
    if y.shape != (num_tokens, sum(parts)) or y.stride(1) != 1 or y.dtype not in _DTYPES:
        raise ValueError(f"y is {y.dtype} {list(y.shape)}; expected [{num_tokens}, {sum(parts)}], rows contiguous")
    if b.shape[1] != sum(parts) or b.shape[2] % 16 or not b[0].is_contiguous() or b.stride(0) % 16:
        raise ValueError(f"b is {list(b.shape)}; expected [{num_slots}, {sum(parts)}, a multiple of 16]")
    if b.dtype != y.dtype:
        raise ValueError(f"b is {b.dtype} and y is {y.dtype}; they must be the same")
    _check_slots(ranks, token_slots, (len(parts), num_slots), num_tokens)


def _check_slots(ranks: Tensor, token_slots: Tensor, shape: tuple[int, int], num_tokens: int) -> None:
    """shape: of the ranks."""
    for name, tensor, size in (("ranks", ranks, shape), ("token_slots", token_slots, (num_tokens,))):
        if tensor.shape != size or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}; expected contiguous int32 {list(size)}")


def _launch_shrink(
    in_features: int, num_parts: int, rank: int, dtype: torch.dtype, device: torch.device, plan: LoraPlan
) -> None:
    """One token without an adapter, as the next two."""
    x = torch.zeros(1, in_features, dtype=dtype, device=device)
    a = torch.zeros(1, num_parts, rank, in_features, dtype=dtype, device=device)
    shrink_lora(x, a, _ints(0, num_parts, device), _ints(-1, 1, device)[0], plan=plan)


def _launch_expand(parts: tuple[int, ...], rank: int, dtype: torch.dtype, device: torch.device, plan: LoraPlan) -> None:
    y = torch.zeros(1, sum(parts), dtype=dtype, device=device)
    b = torch.zeros(1, sum(parts), rank, dtype=dtype, device=device)
    hidden = torch.zeros(plan.splits, 1, len(parts) * rank, dtype=torch.float32, device=device)
    slots = _ints(-1, 1, device)[0]
    expand_lora(y, hidden, b, _ints(0, len(parts), device), parts, slots, plan=plan)


def _launch_embedding(
    out_features: int, rank: int, dtype: torch.dtype, ids_dtype: torch.dtype, device: torch.device, plan: LoraPlan
) -> None:
    y, a, b = (
        torch.zeros(size, dtype=dtype, device=device)
        for size in ((1, out_features), (1, 1, rank), (1, out_features, rank))
    )
    ids = torch.zeros(1, dtype=ids_dtype, device=device)
    add_lora_embedding(y, ids, a, b, _ints(0, 1, device), _ints(-1, 1, device)[0], plan=plan)


def _ints(value: int, count: int, device: torch.device) -> Tensor:
    return torch.full((count, 1), value, dtype=torch.int32, device=device)
