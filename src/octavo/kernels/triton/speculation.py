"""What speculative decoding adds to a step on a GPU, so that the next one can be launched before the host knows which
guesses came true: rows that follow the sequence's true length, the verdict on guesses, and new guesses put in place;
and what a draft head reads of a step kept for it.

A row that verifies k guesses is 1 + k rows of one token here: all write their KV before any attends.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _after_previous, _cdiv, _overlap

_BLOCK = 128
_COLUMNS = 1024  # of features that a program copies


@triton.jit(do_not_specialize=["num_rows", "num_items"], do_not_specialize_on_alignment=["offsets_ptr", "items_ptr"])
def _follow_kernel(
    row_slots_ptr,
    offsets_ptr,
    lengths_ptr,
    starts_ptr,
    positions_ptr,
    items_ptr,
    num_rows,
    num_items,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The first programs see to the rows, the others to the items."""
    _after_previous(OVERLAP)
    programs_of_rows = tl.cdiv(num_rows, BLOCK)
    program = tl.program_id(0)
    if program < programs_of_rows:
        row = program * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(row_slots_ptr + row, mask=row < num_rows, other=-1)
        offset = tl.load(offsets_ptr + row, mask=row < num_rows, other=-1)
        follows = (slot >= 0) & (offset >= 0)
        start = tl.load(lengths_ptr + slot, mask=follows, other=1) - 1 + offset
        tl.store(starts_ptr + row, start, mask=follows)
        tl.store(positions_ptr + row, start + 1, mask=follows)
    else:
        item = (program - programs_of_rows) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(items_ptr + item * 6, mask=item < num_items, other=-1)
        row += tl.load(items_ptr + item * 6 + 3, mask=row >= 0, other=1) - 1  # the last of those that share it
        slot = tl.load(row_slots_ptr + row, mask=row >= 0, other=-1)
        offset = tl.load(offsets_ptr + row, mask=row >= 0, other=-1)
        follows = (slot >= 0) & (offset >= 0)
        num_keys = tl.load(lengths_ptr + slot, mask=follows, other=0) + offset
        end = tl.load(items_ptr + item * 6 + 2, mask=follows, other=0)
        tl.store(items_ptr + item * 6 + 2, tl.minimum(end, num_keys), mask=follows)


def follow_rows(
    row_slots: Tensor, offsets: Tensor, lengths: Tensor, starts: Tensor, positions: Tensor, items: Tensor
) -> None:
    """Put rows where their sequences truly end; the host knows an upper bound. One launch, that depends on shapes.

    row_slots: int32 [R], -1 for padding. offsets: int32 [R]: the row's token is so many after the sequence's last known
    one; -1 for a row that is right already. lengths: int32 [num_slots], known tokens. Written where a row follows:
    starts, int32 [R], the tokens before the row's; positions, int32 [R], one more; items, int32 [I, 6], of
    `paged_decode`, planned for the upper bound: no end is past the token of the last row that shares it. Some may
    then be empty.
    """
    num_rows, num_items = len(row_slots), len(items)
    programs = _cdiv(num_rows, _BLOCK) + _cdiv(num_items, _BLOCK)
    _follow_kernel[(programs,)](
        row_slots, offsets, lengths, starts, positions, items, num_rows, num_items, BLOCK=_BLOCK, num_warps=4,
        **_overlap(row_slots),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_groups", "seed"],
    do_not_specialize_on_alignment=["first_rows_ptr", "num_drafts_ptr", "row_slots_ptr", "positions_ptr", "cu_q_ptr"],
)
def _verify_kernel(
    first_rows_ptr,
    num_drafts_ptr,
    row_slots_ptr,
    positions_ptr,
    cu_q_ptr,
    input_ids_ptr,
    drawn_ptr,
    ready_ptr,
    lengths_ptr,
    counts_ptr,
    num_groups,
    seed,
    acceptance,
    MOST: tl.constexpr,
    SYNTHETIC: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    _after_previous(OVERLAP)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = group < num_groups
    num_drafts = tl.load(num_drafts_ptr + group, mask=here, other=-1)
    here &= num_drafts >= 0
    row = tl.load(first_rows_ptr + group, mask=here, other=0)
    slot = tl.load(row_slots_ptr + row, mask=here, other=-1)
    here &= slot >= 0
    position = tl.load(positions_ptr + row, mask=here, other=0)
    num_drafts = tl.minimum(num_drafts, tl.load(ready_ptr + slot, mask=here & (num_drafts > 0), other=0))
    count = tl.zeros((BLOCK,), tl.int32) + 1
    going = here
    for index in tl.static_range(MOST):
        going &= index < num_drafts
        token = tl.load(drawn_ptr + (row + index) * 2, mask=going, other=0)
        going &= tl.load(drawn_ptr + (row + index) * 2 + 1, mask=going, other=1) == 0
        at = tl.load(cu_q_ptr + row + index + 1, mask=going, other=0)
        guess = tl.load(input_ids_ptr + at, mask=going, other=0)
        if SYNTHETIC:
            # By the token too: another sequence at these positions has other luck.
            going &= tl.rand(seed, position + index + slot * 7919 + (token << 12)) < acceptance
        else:
            going &= token == guess
        count += going.to(tl.int32)
    tl.store(lengths_ptr + slot, position + count, mask=here)
    tl.store(counts_ptr + group, tl.where(here, count, 0), mask=group < num_groups)


def verify_rows(
    first_rows: Tensor,
    num_drafts: Tensor,
    row_slots: Tensor,
    positions: Tensor,
    cu_q: Tensor,
    input_ids: Tensor,
    drawn: Tensor,
    ready: Tensor,
    lengths: Tensor,
    counts: Tensor,
    most: int,
    acceptance: float | None = None,
) -> None:
    """How many tokens each group of rows brings: up to the first drawn token that is not the guess there.

    A group is a sequence's rows of one step: rows first_rows[g] .. first_rows[g] + num_drafts[g], int32 [G] each; the
    guess at what row r draws is the input of row r + 1. num_drafts: -1 for a group that draws nothing; at most `most`,
    and no more than ready[slot] of them count. row_slots, positions (of what is drawn): int32 [R]; cu_q: int32
    [>= R + 1]; input_ids: int32 [T]; drawn: int32 [R, 2], token and bad flag: after a bad one none counts. ready: int32
    [num_slots]. Written: lengths, int32 [num_slots], known tokens, and counts, int32 [G], tokens that came, 0 for none.
    acceptance: for measurements, the probability of a guess to be taken, whatever was drawn.
    """
    num_groups = len(first_rows)
    _verify_kernel[(_cdiv(num_groups, _BLOCK),)](
        first_rows, num_drafts, row_slots, positions, cu_q, input_ids, drawn, ready, lengths, counts, num_groups, 1,
        0.0 if acceptance is None else acceptance, MOST=most, SYNTHETIC=acceptance is not None, BLOCK=_BLOCK,
        num_warps=4, **_overlap(lengths),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_groups", "stride"], do_not_specialize_on_alignment=["group_slots_ptr", "asked_ptr"])
def _place_kernel(
    group_slots_ptr, drafts_ptr, found_ptr, asked_ptr, lengths_ptr, counts_ptr, ready_ptr, token_ids_ptr, verdict_ptr,
    num_groups, stride, MOST: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    _after_previous(OVERLAP)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = group < num_groups
    slot = tl.load(group_slots_ptr + group, mask=there, other=-1)
    here = slot >= 0
    count = tl.load(found_ptr + group, mask=here, other=0)
    count = tl.minimum(count, tl.load(asked_ptr + group, mask=here, other=0))
    tl.store(found_ptr + group, 0, mask=there)
    tl.store(ready_ptr + slot, count, mask=here)
    verdict = verdict_ptr + group * (2 + MOST)
    tl.store(verdict, tl.load(counts_ptr + group, mask=there, other=0), mask=there)
    tl.store(verdict + 1, count, mask=there)
    at = slot.to(tl.int64) * stride + tl.load(lengths_ptr + slot, mask=here, other=0)
    for index in tl.static_range(MOST):
        guess = tl.load(drafts_ptr + group * MOST + index, mask=here & (index < count), other=0)
        tl.store(token_ids_ptr + at + index, guess, mask=here & (index < count))
        tl.store(verdict + 2 + index, guess, mask=here & (index < count))


def place_drafts(
    group_slots: Tensor,
    drafts: Tensor,
    found: Tensor,
    asked: Tensor,
    lengths: Tensor,
    counts: Tensor,
    ready: Tensor,
    token_ids: Tensor,
    verdict: Tensor,
) -> None:
    """Write guesses behind the known tokens of their sequences, and what the host is told of a step.

    group_slots: int32 [G], -1 for none. drafts: int32 [G, K]; found, asked: int32 [G], how many there are, and were
    asked for: the lesser counts. lengths: int32 [num_slots], known tokens. counts: int32 [G], tokens that came.
    Written: token_ids, int32 [num_slots, max_len]; ready, int32 [num_slots], how many guesses are in place; verdict,
    int32 [G, 2 + K], may be pinned host memory as in `copy_words`: a group's tokens that came, its guesses in place,
    and these, if any; found, which is 0 again.
    """
    num_groups, most = drafts.shape
    _place_kernel[(_cdiv(num_groups, _BLOCK),)](
        group_slots, drafts, found, asked, lengths, counts, ready, token_ids, verdict, num_groups, token_ids.stride(0),
        MOST=most, BLOCK=_BLOCK, num_warps=4, **_overlap(lengths),
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["row_slots_ptr", "starts_ptr", "cu_q_ptr"])
def _keep_kernel(
    features_ptr, row_slots_ptr, starts_ptr, cu_q_ptr, recent_ptr, SIZE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK columns of a row's token, counted from its last."""
    row = tl.program_id(0)
    slot = tl.load(row_slots_ptr + row)
    start = tl.load(starts_ptr + row)
    begin = tl.load(cu_q_ptr + row)
    token = tl.load(cu_q_ptr + row + 1) - 1 - tl.program_id(1)
    if (slot >= 0) & (token >= begin):
        column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(features_ptr + token.to(tl.int64) * SIZE + column, mask=column < SIZE)
        place = slot.to(tl.int64) * KEPT + (start + token - begin) % KEPT
        tl.store(recent_ptr + place * SIZE + column, values, mask=column < SIZE)


def keep_features(
    features: Tensor, row_slots: Tensor, starts: Tensor, cu_q: Tensor, recent: Tensor, longest: int
) -> None:
    """Keep the features of each row's last tokens, where the sequence's former ones stood. One launch, that depends on
    shapes and `longest`, the most tokens that a row may have.

    features: [T, F]. row_slots: int32 [R], -1 for padding. starts: int32 [R], tokens before the row's. cu_q: int32
    [>= R + 1]; row r has the tokens [cu_q[r], cu_q[r + 1]). Written: recent, [num_slots, K, F], of features' dtype: the
    last K tokens of a row, that of position p at p % K.
    """
    (num_rows,), (_, kept, size) = row_slots.shape, recent.shape
    grid = num_rows, min(longest, kept), _cdiv(size, _COLUMNS)
    _keep_kernel[grid](
        features, row_slots, starts, cu_q, recent, SIZE=size, KEPT=kept, BLOCK=_COLUMNS, num_warps=4
    )  # fmt: skip
