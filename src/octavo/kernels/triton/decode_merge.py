"""The last part of split decode attention: partial results merged by their log-sum-exps (flash-decoding, Dao et al.,
2023)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _combine(
    partial_acc,
    partial_lse,
    out_row,
    first_head,
    num_items,
    num_queries,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_SIZE_PADDED: tl.constexpr,
    ROOM: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    COMBINE_ITEMS: tl.constexpr,
):
    """Merge the partial results of one (row, KV head), or of rows that share items, a few items at a time, and write
    the output.

    first_head: index of the first item's result, in heads; results of later items are ROOM * NUM_KV_HEADS * GROUP_SIZE
    apart. num_queries: rows that share the items, QUERIES at most. Loads bypass L1 (.cg), which does not see what other
    processors wrote.
    """
    places = tl.arange(0, QUERIES * GROUP_SIZE_PADDED)
    heads = places % GROUP_SIZE_PADDED
    ahead = places // GROUP_SIZE_PADDED
    dims = tl.arange(0, HEAD_DIM_PADDED)
    is_head = (heads < GROUP_SIZE) & (ahead < num_queries)
    head_mask = is_head[:, None] & (dims[None, :] < HEAD_DIM)
    head_offsets = ahead * (NUM_KV_HEADS * GROUP_SIZE) + heads
    offsets = head_offsets[:, None] * HEAD_DIM + dims[None, :]
    merged = tl.zeros([QUERIES * GROUP_SIZE_PADDED, HEAD_DIM_PADDED], tl.float32)
    # Finite, so that items that saw nothing (-inf) weigh 0 and not NaN before the first that did.
    running_max = tl.full([QUERIES * GROUP_SIZE_PADDED], -1.0e30, tl.float32)
    running_sum = tl.zeros([QUERIES * GROUP_SIZE_PADDED], tl.float32)
    for start in range(0, num_items, COMBINE_ITEMS):
        # One after the other in registers of their own, loaded together: as one tensor of more dimensions they would be
        # spread over threads that must then exchange their sums.
        for step in tl.static_range(COMBINE_ITEMS):
            item_heads = (first_head + (start + step) * (ROOM * NUM_KV_HEADS * GROUP_SIZE)).to(tl.int64)
            there = heads * 0 + start + step < num_items
            lse_pointers = partial_lse + item_heads + head_offsets
            lse = tl.load(lse_pointers, mask=is_head & there, other=float("-inf"), cache_modifier=".cg")
            acc_pointers = partial_acc + item_heads * HEAD_DIM + offsets
            acc = tl.load(acc_pointers, mask=head_mask & there[:, None], other=0.0, cache_modifier=".cg")
            new_max = tl.maximum(running_max, lse)
            weight = tl.exp2(lse - new_max)
            rescale = tl.exp2(running_max - new_max)
            merged = merged * rescale[:, None] + acc * weight[:, None]
            running_sum = running_sum * rescale + weight
            running_max = new_max
    # Padding heads, which are not stored, have a sum of 0.
    merged = merged / tl.where(running_sum > 0, running_sum, 1.0)[:, None]
    tl.store(out_row + offsets, merged.to(out_row.dtype.element_ty), mask=head_mask)
