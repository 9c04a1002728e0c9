"""Attention of rows with several new tokens over the paged KV cache, and the kernels around dense long prefill.

`paged_prefill` is FlashAttention-2 (Dao, 2023; online softmax after Milakov & Gimelshein, 2018) over blocks
(Kwon et al., 2023). The query heads that share a KV head (Ainslie et al., 2023) are packed into the rows of one
matrix product: row m of a tile is head m % G' of token m // G', where G' is the group size padded to a power of two.
That reads each key once for the whole group, and leaves little of a tile beyond the causal diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _after_previous, _cdiv, _overlap, _power_of_two

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """How `paged_prefill` is cut and launched; results differ by rounding alone.

    block_m: rows (token, head) of a program; it divides the block_m of the items, which are split accordingly.
    block_n: keys of a tile. Where it divides block_size, a tile's keys lie in one block, found by one scalar load.
    """

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3
    max_registers: int | None = None
    """Of a thread; 128 lets two programs of 8 warps share a multiprocessor, so that one computes while one waits."""


def _tuning(query: Tensor, cache: Tensor, group: int) -> PrefillTuning:
    """What serves these types and shapes on Hopper, in at most 227 KB of shared memory."""
    block_size, head_dim = cache.shape[3], _power_of_two(cache.shape[4])
    if query.dtype == torch.float32:  # on CUDA cores: small tiles, or the registers spill
        return PrefillTuning(max(16, _power_of_two(group)), 32, 4, 1)
    if head_dim > 128:
        return PrefillTuning(max(64, _power_of_two(group)), 64, 4, 2)
    return PrefillTuning(128, 128 if block_size % 128 == 0 else 64, 8, 3)


@triton.jit
def _attend_tiles(
    numerator,  # float32 [M, D']: sum of weights * values
    denominator,  # float32 [M]: sum of weights
    peak,  # float32 [M]: largest score so far, times scale / ln 2; the weights are relative to it
    query,  # [M, D']
    positions,  # int32 [M]: the position of each query
    cache_ptr,  # the KV head's keys of block 0
    table_ptr,  # the row's block table
    block_stride,  # int64: elements from one block to the next
    value_offset,  # elements from a key to its value
    row_end,  # keys of the row, those of this step included
    scale_log2,
    window,
    first_tile,
    last_tile,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    MASKED: tl.constexpr,  # not every query of the tile sees every key of these tiles
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take in the keys [first_tile * BLOCK_N, last_tile * BLOCK_N) of the row."""
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, PADDED_DIM)
    # A tile in one block looks its number up one tile ahead: an address that waits for a load in its own turn of the
    # loop would be pipelined behind it, at half the depth.
    block = tl.load(table_ptr + first_tile * BLOCK_N // BLOCK_SIZE, mask=first_tile < last_tile, other=0)
    for tile in tl.range(first_tile, last_tile):
        first_key = tile * BLOCK_N
        if BLOCK_SIZE % BLOCK_N == 0:
            tile_ptr = cache_ptr + block.to(tl.int64) * block_stride + (first_key % BLOCK_SIZE) * HEAD_DIM
            pointers = tile_ptr + (column[:, None] * HEAD_DIM + dim[None, :])
            block = tl.load(table_ptr + (first_key + BLOCK_N) // BLOCK_SIZE, mask=tile + 1 < last_tile, other=0)
        else:
            keys = first_key + column
            if MASKED:  # entries past the row's last block are not defined: look in the null block
                blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < row_end, other=0)
            else:
                blocks = tl.load(table_ptr + keys // BLOCK_SIZE)
            starts = blocks.to(tl.int64) * block_stride + (keys % BLOCK_SIZE) * HEAD_DIM
            pointers = cache_ptr + starts[:, None] + dim[None, :]
        if MASKED:
            # What lies past the row's end may be NaN, and weight 0 times NaN is NaN: not even loaded.
            loaded = ((first_key + column) < row_end)[:, None] & (dim < HEAD_DIM)[None, :]
            key = tl.load(pointers, mask=loaded, other=0.0)
            value = tl.load(pointers + value_offset, mask=loaded, other=0.0)
        elif HEAD_DIM != PADDED_DIM:
            key = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
            value = tl.load(pointers + value_offset, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        else:
            key = tl.load(pointers)
            value = tl.load(pointers + value_offset)
        key = key.to(query.dtype)
        value = value.to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if MASKED:
            distance = positions[:, None] - (first_key + column)[None, :]
            seen = distance >= 0
            if HAS_WINDOW:
                seen &= distance < window
            scores = tl.where(seen, scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
            # A query that has seen no key yet keeps the peak -inf; -inf - -inf would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        else:
            new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
            base = new_peak
        weights = tl.math.exp2(scores * scale_log2 - base[:, None])
        decay = tl.math.exp2(peak - base)
        denominator = denominator * decay + tl.sum(weights, 1)
        numerator = numerator * decay[:, None]
        numerator = tl.dot(weights.to(query.dtype), value, numerator, input_precision=PRECISION)
        peak = new_peak
    return numerator, denominator, peak


@triton.jit(do_not_specialize=["window"])
def _paged_prefill(
    query_ptr,
    cache_ptr,
    block_tables_ptr,
    row_slots_ptr,
    starts_ptr,
    cu_q_ptr,
    items_ptr,
    out_ptr,
    query_stride,  # elements from token to token
    out_stride,
    table_stride,
    scale_log2,
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some queries of one KV head: grid (items, KV heads, programs of BLOCK_M rows in an item)."""
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.load(items_ptr + 2 * item)
    _after_previous(OVERLAP, FILLS=True)
    if row < 0:
        return
    TOKENS: tl.constexpr = BLOCK_M // GROUP_PADDED
    offset = tl.load(items_ptr + 2 * item + 1) + tl.program_id(2) * TOKENS
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    start = tl.load(starts_ptr + row)
    first_token = tl.load(cu_q_ptr + row)
    length = tl.load(cu_q_ptr + row + 1) - first_token
    if offset >= length:
        return

    m = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    token = offset + m // GROUP_PADDED  # within the row
    head = m % GROUP_PADDED
    live = (token < length) & (head < GROUP)
    head_offset = (kv_head * GROUP + head) * HEAD_DIM
    query_row = (first_token + token).to(tl.int64) * query_stride + head_offset
    mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(query_ptr + query_row[:, None] + dim[None, :], mask=mask, other=0.0)

    positions = start + token
    row_end = start + length
    first_position = start + offset
    end_position = tl.minimum(first_position + TOKENS, row_end)  # one past the last query
    # Tiles [full, partial) are seen whole by every query; [partial, last) only in part.
    last = (end_position + BLOCK_N - 1) // BLOCK_N
    partial = (first_position + 1) // BLOCK_N

    BLOCK_STRIDE: tl.constexpr = 2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    VALUE_OFFSET: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    head_ptr = cache_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    table_ptr = block_tables_ptr + slot * table_stride
    block_stride = tl.full([], BLOCK_STRIDE, tl.int64)
    numerator = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    full = 0
    if HAS_WINDOW:
        # The first query's first key; and the first key that all queries, so the last one too, see.
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N
        full = (tl.maximum(end_position - window, 0) + BLOCK_N - 1) // BLOCK_N
        full = tl.minimum(full, last)
        partial = tl.maximum(partial, full)
        numerator, denominator, peak = _attend_tiles(
            numerator, denominator, peak, query, positions, head_ptr, table_ptr, block_stride, VALUE_OFFSET, row_end,
            scale_log2, window, begin, full,
            BLOCK_SIZE, BLOCK_N, HEAD_DIM, PADDED_DIM, True, True, PRECISION,
        )  # fmt: skip
    numerator, denominator, peak = _attend_tiles(
        numerator, denominator, peak, query, positions, head_ptr, table_ptr, block_stride, VALUE_OFFSET, row_end,
        scale_log2, window, full, partial,
        BLOCK_SIZE, BLOCK_N, HEAD_DIM, PADDED_DIM, False, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    numerator, denominator, peak = _attend_tiles(
        numerator, denominator, peak, query, positions, head_ptr, table_ptr, block_stride, VALUE_OFFSET, row_end,
        scale_log2, window, partial, last,
        BLOCK_SIZE, BLOCK_N, HEAD_DIM, PADDED_DIM, True, HAS_WINDOW, PRECISION,
    )  # fmt: skip

    attended = numerator / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    out_row = (first_token + token).to(tl.int64) * out_stride + head_offset
    tl.store(out_ptr + out_row[:, None] + dim[None, :], attended.to(out_ptr.dtype.element_ty), mask=mask)


def paged_prefill(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    row_slots: Tensor,
    starts: Tensor,
    cu_q: Tensor,
    items: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int | None = None,
    block_m: int = 128,
    tuning: PrefillTuning | None = None,
) -> None:
    """Attend from the queries of the items to all keys that they see; the step's KV must be in the cache already.

    query: [T, num_heads, head_dim], float32, bfloat16 or float16; rows may be strided, heads are contiguous.
    cache: [num_blocks, 2, num_kv_heads, block_size, head_dim], contiguous, of query's dtype or float8_e4m3fn.
    block_tables: int32 [num_slots, max_blocks]. row_slots, starts: int32 [R]. cu_q: int32 [R + 1].
    items: int32 [P, 2], contiguous: (row, token within the row) of every tile of block_m // G' tokens; row -1: none.
    out: [T, num_heads, head_dim] of query's dtype; only the items' tokens are written.
    scale: > 0. sliding_window: query i sees key j if and only if i - sliding_window < j <= i; None for j <= i.
    block_m: of the items. Raises ValueError for a head_dim that is no multiple of 16 up to 256, or a group larger than
    a tile.
    """
    num_kv_heads, block_size, head_dim = cache.shape[2:]
    group = query.shape[1] // num_kv_heads
    if head_dim % 16 or head_dim > 256:
        raise ValueError(f"head_dim={head_dim} is not served; allowed: multiples of 16 up to 256")
    tuning = tuning or _tuning(query, cache, group)
    if tuning.block_m < _power_of_two(group) or block_m % tuning.block_m:
        raise ValueError(f"tiles of {tuning.block_m} rows do not hold {group} heads, or do not divide {block_m} rows")
    if items.shape[0] == 0:
        return
    assert query.stride(1) == head_dim == out.stride(1)
    assert query.stride(2) == out.stride(2) == 1
    assert cache.is_contiguous()
    assert items.is_contiguous()
    _paged_prefill[(items.shape[0], num_kv_heads, block_m // tuning.block_m)](
        query,
        cache,
        block_tables,
        row_slots,
        starts,
        cu_q,
        items,
        out,
        query.stride(0),
        out.stride(0),
        block_tables.stride(0),
        scale * _LOG2_E,
        sliding_window or 0,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PADDED=_power_of_two(group),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        PADDED_DIM=max(16, _power_of_two(head_dim)),
        BLOCK_M=tuning.block_m,
        BLOCK_N=tuning.block_n,
        HAS_WINDOW=sliding_window is not None,
        PRECISION="ieee",
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.max_registers,
        **_overlap(query),
    )


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["table_ptr"])
def _gather_kv(
    cache_ptr,
    table_ptr,
    out_ptr,
    num_tokens,
    capacity,  # tokens of the buffer
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Some tokens of one KV head, keys or values: grid (tiles of BLOCK_T tokens, 2 * KV heads)."""
    plane = tl.program_id(1)  # [2, KV heads]: the order of a block and of the buffer alike
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, PADDED_DIM)
    live = token < num_tokens
    block = tl.load(table_ptr + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    source = (block * (2 * NUM_KV_HEADS) + plane) * (BLOCK_SIZE * HEAD_DIM) + (token % BLOCK_SIZE) * HEAD_DIM
    target = (plane.to(tl.int64) * capacity + token) * HEAD_DIM
    mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    chunk = tl.load(cache_ptr + source[:, None] + dim[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + target[:, None] + dim[None, :], chunk.to(out_ptr.dtype.element_ty), mask=mask)


def gather_kv(cache: Tensor, block_table: Tensor, num_tokens: int, out: Tensor) -> None:
    """Copy the first `num_tokens` keys and values of one sequence out of its blocks, in `out`'s dtype.

    cache: [num_blocks, 2, num_kv_heads, block_size, head_dim], contiguous. block_table: int32 [>= its blocks].
    out: [2, num_kv_heads, capacity, head_dim], contiguous; tokens from `num_tokens` on are left as they are.
    """
    num_kv_heads, block_size, head_dim = cache.shape[2:]
    capacity = out.shape[2]
    assert 0 < num_tokens <= capacity
    assert cache.is_contiguous()
    assert out.is_contiguous()
    _gather_kv[(_cdiv(num_tokens, 64), 2 * num_kv_heads)](
        cache,
        block_table,
        out,
        num_tokens,
        capacity,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        PADDED_DIM=_power_of_two(head_dim),
        BLOCK_T=64,
        num_warps=4,
    )


MAX_PARTS = 8  # what `merge_attention` merges at once


@triton.jit
def _merge_attention(
    part_0,
    part_1,
    part_2,
    part_3,
    part_4,
    part_5,
    part_6,
    part_7,
    lse_0,
    lse_1,
    lse_2,
    lse_3,
    lse_4,
    lse_5,
    lse_6,
    lse_7,
    out_ptr,
    num_tokens,
    token_stride,
    head_stride,
    out_stride,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Some tokens of one head: grid (tiles of BLOCK_T tokens, heads). The parts past COUNT are not read."""
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, PADDED_DIM)
    live = token < num_tokens
    mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    source = (token * token_stride + head * head_stride)[:, None] + dim[None, :]
    lse = head * num_tokens + token

    peak = tl.load(lse_0 + lse, mask=live, other=0.0)
    total = tl.full([BLOCK_T], 1.0, tl.float32)
    merged = tl.load(part_0 + source, mask=mask, other=0.0).to(tl.float32)
    for index in tl.static_range(1, COUNT):
        if index == 1:
            part_ptr, lse_ptr = part_1, lse_1
        elif index == 2:
            part_ptr, lse_ptr = part_2, lse_2
        elif index == 3:
            part_ptr, lse_ptr = part_3, lse_3
        elif index == 4:
            part_ptr, lse_ptr = part_4, lse_4
        elif index == 5:
            part_ptr, lse_ptr = part_5, lse_5
        elif index == 6:
            part_ptr, lse_ptr = part_6, lse_6
        else:
            part_ptr, lse_ptr = part_7, lse_7
        part = tl.load(part_ptr + source, mask=mask, other=0.0).to(tl.float32)
        part_lse = tl.load(lse_ptr + lse, mask=live, other=0.0)
        new_peak = tl.maximum(peak, part_lse)
        old_weight = tl.exp(peak - new_peak)
        part_weight = tl.exp(part_lse - new_peak)
        merged = merged * old_weight[:, None] + part * part_weight[:, None]
        total = total * old_weight + part_weight
        peak = new_peak
    merged = merged / total[:, None]
    target = (token.to(tl.int64) * out_stride + head * HEAD_DIM)[:, None] + dim[None, :]
    tl.store(out_ptr + target, merged.to(out_ptr.dtype.element_ty), mask=mask)


def merge_attention(parts: list[Tensor], log_sum_exps: list[Tensor], out: Tensor) -> None:
    """Attention over a union of disjoint key sets from that over each of them (FlashDecoding; Dao et al., 2023).

    parts: up to MAX_PARTS tensors [H, T, head_dim] of one dtype and the same strides, head_dim contiguous.
    log_sum_exps: float32 [H, T] each, contiguous: the natural logarithm of the sum of the exponentiated scores, finite.
    out: [T, H, head_dim], rows may be strided. Raises ValueError for more than MAX_PARTS parts.
    """
    count = len(parts)
    if not 1 <= count <= MAX_PARTS or len(log_sum_exps) != count:
        raise ValueError(f"{count} parts and {len(log_sum_exps)} sums; allowed: 1 to {MAX_PARTS} of each")
    num_heads, num_tokens, head_dim = parts[0].shape
    assert all(part.stride() == parts[0].stride() and part.stride(2) == 1 for part in parts)
    assert all(lse.is_contiguous() and lse.shape == (num_heads, num_tokens) for lse in log_sum_exps)
    assert out.stride(1) == head_dim
    padding = MAX_PARTS - count
    _merge_attention[(_cdiv(num_tokens, 16), num_heads)](
        *parts,
        *[parts[0]] * padding,
        *log_sum_exps,
        *[log_sum_exps[0]] * padding,
        out,
        num_tokens,
        parts[0].stride(1),
        parts[0].stride(0),
        out.stride(0),
        COUNT=count,
        HEAD_DIM=head_dim,
        PADDED_DIM=_power_of_two(head_dim),
        BLOCK_T=16,
        num_warps=4,
    )
