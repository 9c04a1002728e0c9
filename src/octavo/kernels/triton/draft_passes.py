"""The inputs of a draft model's passes, and its guesses taken out of the table, in one small launch each: between
passes that take half a millisecond every launch counts.

Rows have one token each, at most some thousands of them: one program serves all, and so may keep the number of passes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.reference.draft_passes import DraftRows
from octavo.kernels.triton.launch import _after_previous, _cdiv, _overlap

_ROWS = 256  # rows or items that the program serves at once
_BLOCK = 128


@triton.jit
def _position(slots_ptr, backs_ptr, limits_ptr, lengths_ptr, row, mask, lag, ahead, FIRST: tl.constexpr):
    """(slot, position of its token, whether there is one) of rows."""
    slot = tl.load(slots_ptr + row, mask=mask, other=-1)
    limit = tl.load(limits_ptr + row, mask=mask, other=0)
    back = tl.load(backs_ptr + row, mask=mask, other=1) if FIRST else 1 - ahead
    position = tl.load(lengths_ptr + slot, mask=slot >= 0, other=1) - lag - back
    there = (slot >= 0) & (position >= limit if FIRST else limit > ahead)
    return slot, position, there


@triton.jit(
    do_not_specialize=["num_rows", "num_items", "num_sequences", "lag"],
    # A draft head reads the table from its second column on.
    do_not_specialize_on_alignment=["slots_ptr", "backs_ptr", "limits_ptr", "planned_ptr", "token_ids_ptr"],
)
def _draft_rows_kernel(
    slots_ptr,
    backs_ptr,
    limits_ptr,
    planned_ptr,
    lengths_ptr,
    token_ids_ptr,
    block_tables_ptr,
    row_slots_ptr,
    starts_ptr,
    positions_ptr,
    input_ids_ptr,
    token_positions_ptr,
    slot_mapping_ptr,
    items_ptr,
    count_ptr,
    num_rows,
    num_items,
    num_sequences,
    lag,
    token_ids_stride,
    block_tables_stride,
    FIRST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program. limits: of the first pass positions, of a further one passes."""
    _after_previous(OVERLAP)
    lane = tl.arange(0, BLOCK)
    ahead = 0 if FIRST else tl.load(count_ptr) + 1
    of_rows = slots_ptr, backs_ptr, limits_ptr, lengths_ptr
    for begin in range(0, num_rows, BLOCK):
        row = begin + lane
        mask = row < num_rows
        slot, position, there = _position(*of_rows, row, mask, lag, ahead, FIRST)
        position = tl.where(there, position, 0)
        at = slot.to(tl.int64)
        input_id = tl.load(token_ids_ptr + at * token_ids_stride + position, mask=there, other=0)
        block = tl.load(block_tables_ptr + at * block_tables_stride + position // BLOCK_SIZE, mask=there, other=0)
        # Rows without a token are spread over block 0, which nobody reads.
        offset = tl.where(there, position, row) % BLOCK_SIZE
        tl.store(row_slots_ptr + row, tl.where(there, slot, -1), mask=mask)
        tl.store(starts_ptr + row, position, mask=mask)
        tl.store(positions_ptr + row, position + 1, mask=mask)
        tl.store(input_ids_ptr + row, input_id, mask=mask)
        tl.store(token_positions_ptr + row, position.to(tl.int64), mask=mask)
        tl.store(slot_mapping_ptr + row, block.to(tl.int64) * BLOCK_SIZE + offset, mask=mask)
    for begin in range(0, num_items, BLOCK):
        item = begin + lane
        mask = item < num_items
        row = tl.load(planned_ptr + item * 6, mask=mask, other=-1)
        shared = tl.load(planned_ptr + item * 6 + 3, mask=mask, other=1)
        end = tl.load(planned_ptr + item * 6 + 2, mask=mask, other=0)
        # By the last of the rows that share it.
        _, position, there = _position(*of_rows, row + shared - 1, row >= 0, lag, ahead, FIRST)
        tl.store(items_ptr + item * 6, row, mask=mask)
        tl.store(items_ptr + item * 6 + 1, tl.load(planned_ptr + item * 6 + 1, mask=mask), mask=mask)
        tl.store(items_ptr + item * 6 + 2, tl.where(there, tl.minimum(end, position + 1), end), mask=mask)
        tl.store(items_ptr + item * 6 + 3, shared, mask=mask)
        tl.store(items_ptr + item * 6 + 4, tl.load(planned_ptr + item * 6 + 4, mask=mask), mask=mask)
        tl.store(items_ptr + item * 6 + 5, tl.load(planned_ptr + item * 6 + 5, mask=mask), mask=mask)
    tl.debug_barrier()  # every thread has read the count before one writes it
    for begin in range(0, num_sequences, BLOCK):
        tl.store(count_ptr + begin + lane, ahead, mask=begin + lane < num_sequences)


def draft_rows(
    slots: Tensor,
    backs: Tensor | None,
    limits: Tensor,
    planned: Tensor,
    lag: int,
    lengths: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
    made: DraftRows,
) -> None:
    """The rows of a pass over sequences: of the first one the last known tokens of each, of a further one, whose rows
    are one a sequence, the guess of the pass before. The launch depends on shapes and lag alone.

    slots: int32 [R], -1 for padding. backs: int32 [R], how far the row's token is from the end of the known ones less
    `lag` of them, 1 for the last; None for a further pass. limits: int32 [R]: of the first pass the least position that
    a row may have, else it has no token; of a further one the guesses of each, none of a row that has as many. planned:
    int32 [I, 6], items for rows that may end later than they do: those made end with the token of the last row that
    shares them. lengths: int32 [num_slots], known tokens; token_ids: int32 [num_slots, max_len]; block_tables: int32
    [num_slots, max_blocks]. Written: made.
    """
    _draft_rows_kernel[(1,)](
        slots,
        slots if backs is None else backs,  # slots: not read
        limits,
        planned,
        lengths,
        token_ids,
        block_tables,
        *made,
        len(slots),
        len(planned),
        len(made.count),
        lag,
        token_ids.stride(0),
        block_tables.stride(0),
        FIRST=backs is not None,
        BLOCK_SIZE=block_size,
        BLOCK=_ROWS,
        num_warps=4,
        **_overlap(slots),
    )


@triton.jit(
    do_not_specialize=["num_groups", "stride"], do_not_specialize_on_alignment=["slots_ptr", "wanted_ptr", "drafts_ptr"]
)
def _read_drafts_kernel(
    slots_ptr, wanted_ptr, lengths_ptr, token_ids_ptr, drafts_ptr, found_ptr, num_groups, stride,
    MOST: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    _after_previous(OVERLAP)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + group, mask=group < num_groups, other=-1)
    here = slot >= 0
    count = tl.load(wanted_ptr + group, mask=here, other=0)
    tl.store(found_ptr + group, count, mask=here)
    at = slot.to(tl.int64) * stride + tl.load(lengths_ptr + slot, mask=here, other=0)
    for index in tl.static_range(MOST):
        guess = tl.load(token_ids_ptr + at + index, mask=here & (index < count), other=0)
        tl.store(drafts_ptr + group * MOST + index, guess, mask=here & (index < count))


def read_drafts(
    slots: Tensor, wanted: Tensor, lengths: Tensor, token_ids: Tensor, drafts: Tensor, found: Tensor
) -> None:
    """Guesses that stand in the table behind the known tokens.

    slots, wanted: int32 [G], -1 where no guess is wanted, and how many are. lengths: int32 [num_slots], known tokens;
    token_ids: int32 [num_slots, max_len]. Written where guesses are wanted: drafts, int32 [G, K], contiguous, and
    found, int32 [G], how many there are.
    """
    num_groups, most = drafts.shape
    _read_drafts_kernel[(_cdiv(num_groups, _BLOCK),)](
        slots, wanted, lengths, token_ids, drafts, found, num_groups, token_ids.stride(0),
        MOST=most, BLOCK=_BLOCK, num_warps=4, **_overlap(slots),
    )  # fmt: skip
