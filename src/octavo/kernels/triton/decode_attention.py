"""Paged attention of rows with one query token: memory-bound, split over the positions of the KV cache.

The method is flash-decoding (Dao et al., 2023) with grouped queries (Ainslie et al., 2023) over a paged cache (Kwon
et al., 2023): a row's keys are cut into items, each program computes the softmax of one item and one KV head for all
query heads of its group (online, Milakov and Gimelshein, 2018), and a row's partial results are merged by their
log-sum-exps. The program that finishes last of a (row, KV head) merges them, so there is one launch in all.

Rows of consecutive tokens of one sequence, as verifying guesses makes them, may share items: their keys are read once
for all, and their queries fill places of the products that would be padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.decode_merge import _combine
from octavo.kernels.triton.launch import _after_previous, _overlap, _power_of_two, _wait_for_previous

_LOG2_E = 1.4426950408889634
_MIN_DOT_SIZE = 16  # tl.dot takes no smaller side: query heads are padded to it
# Floats of partial results that a program holds at once while it merges. Where rows may share items there is code for
# several rows and, beside it, for one: more there would take the registers that let three programs stand on a
# multiprocessor.
_COMBINE_TILE, _COMBINE_TILE_BESIDE = 8192, 4096
_MOST_UNROLLED = 32  # pieces whose merging is written out one by one: more take seconds to compile
_FEW_PROGRAMS = tl.constexpr(96)  # those of a sequence by itself: so many let the next kernel in at once


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How one launch is compiled.

    tile: KV positions a program streams at once, a power of two >= 16 that divides the planner's tile.
    num_warps, num_stages: of Triton. evict_first: whether K and V leave the L2 cache before anything else does.
    value_pairs: whether fp8 values are moved two at a time, as numbers of 16 bits, to where products take them: the
        matrix loads that transpose on the way know no bytes. Other caches and float32 queries take no notice.
    """

    tile: int
    num_warps: int
    num_stages: int
    evict_first: bool = False
    value_pairs: bool = False


# By (bytes of one number of the query, of the cache), and whether tiles lie within one block. To be edited after
# measuring with benchmarks/gpu/kernel_decode.py.
_CONFIGS = {
    (2, 1): {True: DecodeConfig(64, 4, 4, value_pairs=True), False: DecodeConfig(64, 4, 4, value_pairs=True)},
    (2, 2): {True: DecodeConfig(64, 4, 3), False: DecodeConfig(64, 4, 3)},
    (4, 1): {True: DecodeConfig(32, 4, 2), False: DecodeConfig(32, 4, 2)},
    (4, 4): {True: DecodeConfig(32, 4, 2), False: DecodeConfig(32, 4, 2)},
}


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Where the items of split rows leave their results between programs of one launch.

    acc: float32 [max_items * queries, num_heads, head_dim], each item's normalised output for each of its rows.
    lse: float32 [max_items * queries, num_heads], the base-2 logarithm of its sum of exponentials; -inf: it saw no key.
    arrivals: int32 [max_rows, num_kv_heads], programs of a (row, KV head) that are done; all zero between launches.
    Launches that share a scratch must follow each other on one stream.
    """

    acc: Tensor
    lse: Tensor
    arrivals: Tensor

    @classmethod
    def allocate(
        cls,
        max_items: int,
        max_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        queries: int = 1,
    ) -> DecodeScratch:
        """Room for `max_items` items of at most `max_rows` rows, `queries` of which share an item at most."""
        return cls(
            torch.empty(max_items * queries, num_heads, head_dim, dtype=torch.float32, device=device),
            torch.empty(max_items * queries, num_heads, dtype=torch.float32, device=device),
            torch.zeros(max_rows, num_kv_heads, dtype=torch.int32, device=device),
        )


decode_scratch = DecodeScratch.allocate


def paged_decode(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    row_slots: Tensor,
    cu_q: Tensor,
    items: Tensor,
    out: Tensor,
    scratch: DecodeScratch,
    scale: float,
    sliding_window: int | None = None,
    config: DecodeConfig | None = None,
    queries: int = 1,
    beside: bool = False,
) -> None:
    """Attend from the one query token of each row that has items to the keys it sees; fills `out` at those tokens.

    query: [T, num_heads, head_dim], bfloat16, float16 or float32, last dimension contiguous, other strides any.
    cache: one layer, [num_blocks, 2, num_kv_heads, block_size, head_dim] contiguous, in query's dtype or
        float8_e4m3fn; it holds the KV of the step's tokens already.
    block_tables: int32 [num_slots, max_blocks], last dimension contiguous.
    row_slots: int32 [R], -1 for padding. cu_q: int32 [>= R]; row r's token is cu_q[r].
    items: int32 [I, 6] contiguous, as `DecodePlanner.plan` makes them: (row or -1, begin, end, rows that share it,
        number of the row's items, first item of the row). Rows that share it follow the first, are of one slot and of
        consecutive positions; begin and end are meant for the last of them.
    out: [T, num_heads, head_dim] contiguous, in query's dtype; tokens of other rows are left as they are.
    scratch: for at least I items and R rows. scale: what query-key products are multiplied by.
    sliding_window: the query at position p sees keys p - sliding_window < j <= p; None: all j <= p.
    config: how to compile it; None: by the table above. queries: a power of two, rows that share an item at most.
    beside: whether the launch just before is `paged_prefill` of the same step, beside which this one then runs.

    The launch depends on shapes only, so a recorded graph serves whatever the tensors hold later. The kernel ahead must
    not write block_tables, row_slots, cu_q or items: they are read before it has ended.
    Raises ValueError where shapes or dtypes contradict this.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, cache_head_dim = cache.shape[2], cache.shape[4]
    num_items = items.shape[0]
    if num_heads % num_kv_heads or cache_head_dim != head_dim or items.shape[1] != 6:
        raise ValueError(f"query {query.shape}, cache {cache.shape} and items {items.shape} do not fit together")
    if cache.dtype not in (query.dtype, torch.float8_e4m3fn) or out.dtype != query.dtype:
        raise ValueError(f"query {query.dtype} cannot attend over a cache of {cache.dtype} into {out.dtype}")
    if scratch.acc.shape[0] < num_items * queries or scratch.acc.shape[1:] != query.shape[1:]:
        raise ValueError(f"scratch {scratch.acc.shape} is not for {num_items} items of query {query.shape}")
    if num_items == 0:
        return
    _decode_kernel[(num_kv_heads, num_items)](
        query,
        cache,
        cache.view(torch.int16) if cache.dtype == torch.float8_e4m3fn else cache,
        block_tables,
        row_slots,
        cu_q,
        items,
        out,
        scratch.acc,
        scratch.lse,
        scratch.arrivals,
        scale * _LOG2_E,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        int(beside),
        **_constants(num_heads, query.dtype, cache.shape, cache.dtype, sliding_window, config, queries, query.is_cuda),
        **_overlap(query),
    )


def _constants(
    num_heads: int,
    query_dtype: torch.dtype,
    cache_shape: tuple[int, ...],
    cache_dtype: torch.dtype,
    sliding_window: int | None,
    config: DecodeConfig | None,
    queries: int = 1,
    on_device: bool = True,
) -> dict[str, int | bool]:
    """What `_decode_kernel` is compiled for. on_device: not for Triton's interpreter, which knows no PTX."""
    _, _, num_kv_heads, block_size, head_dim = cache_shape
    if config is None:
        configs = _CONFIGS[query_dtype.itemsize, cache_dtype.itemsize]
        config = configs[block_size % configs[True].tile == 0]
        if query_dtype == torch.float32 and head_dim > 128:
            config = replace(config, tile=16)  # its products are made of scalars, all of them in registers
    group_size = num_heads // num_kv_heads
    group_size_padded = _power_of_two(group_size)
    head_dim_padded = _power_of_two(head_dim)
    tile = _COMBINE_TILE if queries == 1 else _COMBINE_TILE_BESIDE
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP_SIZE": group_size,
        "GROUP_SIZE_PADDED": group_size_padded,
        "QUERIES": queries,
        "DOT_ROWS": max(_MIN_DOT_SIZE, queries * group_size_padded),
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": head_dim_padded,
        "BLOCK_SIZE": block_size,
        "TILE": config.tile,
        "SLIDING_WINDOW": sliding_window or 0,
        "COMBINE_ITEMS": max(1, min(_MOST_UNROLLED, tile // (group_size_padded * head_dim_padded))),
        "COMBINE_ITEMS_SHARED": max(1, _COMBINE_TILE // (queries * group_size_padded * head_dim_padded)),
        # bfloat16 queries meet an fp8 cache in float16: Hopper converts two fp8 numbers to float16 in one instruction
        # (exactly), and to bfloat16 in five, which would take longer than loading them.
        "VIA_FLOAT16": cache_dtype.itemsize == 1 and query_dtype == torch.bfloat16,
        "VALUE_PAIRS": config.value_pairs and (query_dtype.itemsize, cache_dtype.itemsize) == (2, 1),
        "IN_PTX": on_device,
        "EVICT_FIRST": config.evict_first,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


# Nothing that changes from step to step, as where a step's metadata begins in its buffer, may compile it again.
@triton.jit(
    do_not_specialize=["table_stride", "beside"],
    do_not_specialize_on_alignment=["block_tables", "row_slots", "cu_q", "items"],
)
def _decode_kernel(
    query,
    cache,
    cache_pairs,
    block_tables,
    row_slots,
    cu_q,
    items,
    out,
    partial_acc,
    partial_lse,
    arrivals,
    scale_log2,
    query_stride_token,
    query_stride_head,
    table_stride,
    beside,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_SIZE_PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    DOT_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    COMBINE_ITEMS: tl.constexpr,
    COMBINE_ITEMS_SHARED: tl.constexpr,
    VIA_FLOAT16: tl.constexpr,
    VALUE_PAIRS: tl.constexpr,
    IN_PTX: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One item and one KV head. KV heads run fastest: programs of an item read neighbouring memory together."""
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    # Loads stand before the branches that do not need them, and what the step's first kernels wrote before the wait for
    # the one ahead: each link of this chain costs every short row.
    fields = items + item * 6
    row = tl.load(fields)
    begin = tl.load(fields + 1)
    end = tl.load(fields + 2)
    num_queries = 1
    if QUERIES > 1:
        num_queries = tl.load(fields + 3)
    num_row_items = tl.load(fields + 4)
    first_item = tl.load(fields + 5)
    slot = tl.load(row_slots + row + num_queries - 1, mask=row >= 0, other=-1)
    token = tl.load(cu_q + row, mask=row >= 0, other=0).to(tl.int64)

    # Query heads of the group, of one row after the other.
    places = tl.arange(0, DOT_ROWS)
    heads = places % GROUP_SIZE_PADDED
    ahead = places // GROUP_SIZE_PADDED
    visible_ends = end + ahead * 0
    if (QUERIES > 1) | (SLIDING_WINDOW > 0):
        # A row's items stand together, and the last ends where the row does.
        num_positions = tl.load(items + (first_item + num_row_items - 1) * 6 + 2, mask=row >= 0, other=0)
        visible_ends = num_positions - (num_queries - 1) + ahead
        if SLIDING_WINDOW > 0:
            first_visible = tl.maximum(num_positions - (num_queries - 1) - SLIDING_WINDOW, 0)
            begin = tl.maximum(begin, first_visible // TILE * TILE)
    block_table = block_tables + slot.to(tl.int64) * table_stride
    blocks = _load_blocks(block_table, begin, tl.where(slot >= 0, end, begin), BLOCK_SIZE, TILE)
    _after_previous(OVERLAP, FEW=_FEW_PROGRAMS, beside=beside)
    if slot < 0:
        _wait_for_previous(OVERLAP)
        return

    dims = tl.arange(0, HEAD_DIM_PADDED)
    is_head = (heads < GROUP_SIZE) & (ahead < num_queries)
    head_mask = is_head[:, None] & (dims[None, :] < HEAD_DIM)
    query_offsets = (token + ahead) * query_stride_token + (kv_head * GROUP_SIZE + heads) * query_stride_head
    q = tl.load(query + query_offsets[:, None] + dims[None, :], mask=head_mask, other=0.0)
    scales = tl.zeros([DOT_ROWS], tl.float32) + scale_log2
    if VIA_FLOAT16:
        # Each head's query is brought into [-1, 1] first, so that nothing overflows whatever its range.
        largest = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1.0e-30)
        q = (q.to(tl.float32) / largest[:, None]).to(tl.float16)
        scales = scales * largest

    acc, running_max, running_sum = _attend(
        q, cache + kv_head * (BLOCK_SIZE * HEAD_DIM), cache_pairs + kv_head * (BLOCK_SIZE * HEAD_DIM // 2),
        block_table, blocks, begin, end, visible_ends, scales,
        NUM_KV_HEADS, HEAD_DIM, HEAD_DIM_PADDED, BLOCK_SIZE, TILE, SLIDING_WINDOW, QUERIES, VALUE_PAIRS, IN_PTX,
        EVICT_FIRST,
    )  # fmt: skip
    # An item wholly outside the window has a sum of 0: its output is 0 and its log-sum-exp -inf.
    saw_keys = running_sum > 0
    running_sum = tl.where(saw_keys, running_sum, 1.0)
    acc = acc / running_sum[:, None]
    out_row = out + (token * NUM_KV_HEADS + kv_head) * (GROUP_SIZE * HEAD_DIM)
    # Of (row, head) from a row's first head in this group on, in results and partial results alike.
    head_offsets = ahead * (NUM_KV_HEADS * GROUP_SIZE) + heads
    if num_row_items == 1:
        out_offsets = head_offsets[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_row + out_offsets, acc.to(out.dtype.element_ty), mask=head_mask)
    else:
        first_head = (item * QUERIES * NUM_KV_HEADS + kv_head) * GROUP_SIZE
        offsets = (first_head + head_offsets).to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(partial_acc + offsets, acc, mask=head_mask)
        lse = tl.where(saw_keys, running_max + tl.log2(running_sum), float("-inf"))
        tl.store(partial_lse + first_head + head_offsets, lse, mask=is_head)
        # Every thread's stores come before the release, and the acquire before every thread's loads.
        tl.debug_barrier()
        arrival = arrivals + row * NUM_KV_HEADS + kv_head
        arrived = tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu")
        if arrived == num_row_items - 1:
            tl.debug_barrier()
            tl.store(arrival, 0)
            first_head = (first_item * QUERIES * NUM_KV_HEADS + kv_head) * GROUP_SIZE
            if QUERIES > 1 and num_queries > 1:
                _combine(
                    partial_acc,
                    partial_lse,
                    out_row,
                    first_head,
                    num_row_items,
                    num_queries,
                    NUM_KV_HEADS,
                    GROUP_SIZE,
                    GROUP_SIZE_PADDED,
                    QUERIES,
                    QUERIES,
                    HEAD_DIM,
                    HEAD_DIM_PADDED,
                    COMBINE_ITEMS_SHARED,
                )
            else:
                _combine(
                    partial_acc,
                    partial_lse,
                    out_row,
                    first_head,
                    num_row_items,
                    1,
                    NUM_KV_HEADS,
                    GROUP_SIZE,
                    GROUP_SIZE_PADDED,
                    QUERIES,
                    1,
                    HEAD_DIM,
                    HEAD_DIM_PADDED,
                    COMBINE_ITEMS,
                )
    _wait_for_previous(OVERLAP)


@triton.jit
def _attend(
    q,
    head_cache,
    head_cache_pairs,
    block_table,
    blocks,
    begin,
    end,
    visible_ends,
    scales,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    VALUE_PAIRS: tl.constexpr,
    IN_PTX: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
):
    """Unnormalised attention of q [M, D] over positions [begin, end): (acc [M, D], max [M], sum [M]), float32, base 2.

    begin is a multiple of TILE. visible_ends: int32 [M], where the positions end that each query sees; no more than
    `end` counts. scales: [M] float32, of the scores. K and V take q's dtype after loading.
    """
    VALUES: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM  # from a block's keys to its values
    EVICTION: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    ONE_BLOCK: tl.constexpr = BLOCK_SIZE % TILE == 0
    rows = tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_DIM_PADDED)
    acc = tl.zeros([q.shape[0], HEAD_DIM_PADDED // (2 if VALUE_PAIRS else 1)], tl.float32)  # even dimensions of pairs
    acc_odd = acc
    # Finite, so that a tile in which a query sees nothing leaves it as it was, and makes no NaN.
    running_max = tl.full([q.shape[0]], -1.0e30, tl.float32)
    running_sum = tl.zeros([q.shape[0]], tl.float32)
    # Block ids are fetched one tile ahead: as a load of the same iteration they would take stages of the pipeline
    # from K and V.
    for tile in range(begin, end, TILE):
        positions = tile + rows
        in_row = positions < end
        if ONE_BLOCK:
            start = blocks.to(tl.int64) * (2 * VALUES) + (tile % BLOCK_SIZE) * HEAD_DIM
            offsets = rows * HEAD_DIM
        else:
            start = 0
            # Where tiles are whole blocks, the same rows stand at the same places of their blocks in every tile.
            within = (rows if TILE % BLOCK_SIZE == 0 else positions) % BLOCK_SIZE
            offsets = blocks.to(tl.int64) * (2 * VALUES) + within * HEAD_DIM
        blocks = _load_blocks(block_table, tile + TILE, end, BLOCK_SIZE, TILE)
        # Masked even within a block: what lies past a row's end may be NaN.
        pointers = head_cache + start + (offsets[:, None] + dims[None, :])
        mask = in_row[:, None]
        if HEAD_DIM != HEAD_DIM_PADDED:
            mask = mask & (dims[None, :] < HEAD_DIM)
        k = tl.load(pointers, mask=mask, other=0.0, eviction_policy=EVICTION).to(q.dtype)
        if VALUE_PAIRS:
            pairs = tl.arange(0, HEAD_DIM_PADDED // 2)
            pair_pointers = head_cache_pairs + (start + VALUES) // 2 + (offsets[:, None] // 2 + pairs[None, :])
            pair_mask = in_row[:, None]
            if HEAD_DIM != HEAD_DIM_PADDED:
                pair_mask = pair_mask & (pairs[None, :] < HEAD_DIM // 2)
            v = tl.load(pair_pointers, mask=pair_mask, other=0, eviction_policy=EVICTION)
        else:
            v = tl.load(pointers + VALUES, mask=mask, other=0.0, eviction_policy=EVICTION).to(q.dtype)

        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scales[:, None]
        visible = in_row[None, :]
        if QUERIES > 1:
            visible = visible & (positions[None, :] < visible_ends[:, None])
        if SLIDING_WINDOW > 0:
            visible = visible & (positions[None, :] >= visible_ends[:, None] - SLIDING_WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(running_max - new_max)
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        if VALUE_PAIRS:
            even, odd = _split_pairs(v, IN_PTX)
            acc = tl.dot(weights.to(q.dtype), even, acc * rescale[:, None])
            acc_odd = tl.dot(weights.to(q.dtype), odd, acc_odd * rescale[:, None])
        else:
            acc = tl.dot(weights.to(q.dtype), v, acc * rescale[:, None], input_precision="ieee")
        running_max = new_max
    if VALUE_PAIRS:
        acc = tl.interleave(acc, acc_odd)
    return acc, running_max, running_sum


@triton.jit
def _split_pairs(pairs, IN_PTX: tl.constexpr):
    """Pairs of fp8 numbers (int16) as two float16 tensors: of the low bytes and of the high bytes."""
    if IN_PTX:
        # Two pairs at a time: their low bytes side by side, then their high bytes, then two conversions. A third of
        # the instructions that the compiler makes of the lines below.
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 sorted; .reg .b16 low, high; prmt.b32 sorted, $2, 0, 0x3120; mov.b32 {low, high}, sorted; "
            "cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = (pairs & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        high = ((pairs >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return low, high


@triton.jit
def _load_blocks(block_table, tile, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block ids of positions [tile, tile + TILE): a scalar if they share one block, else int32 [TILE]; 0 past end."""
    if BLOCK_SIZE % TILE == 0:
        blocks = tl.load(block_table + tile // BLOCK_SIZE, mask=tile < end, other=0)
    else:
        rows = tl.arange(0, TILE)
        indices = (tile + rows) // BLOCK_SIZE
        if TILE % BLOCK_SIZE == 0:
            indices = tile // BLOCK_SIZE + rows // BLOCK_SIZE
        blocks = tl.load(block_table + indices, mask=tile + rows < end, other=0)
    return blocks
