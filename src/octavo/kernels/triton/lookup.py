"""Drafts by looking up what followed before, in a row's own tokens (prompt lookup decoding, Saxena 2023) and in past
outputs (as SuffixDecoding, Oliaro et al. 2024).

Two kernels. `_score_kernel` compares: each program takes every n-th block of a row's tokens, or of the corpus, and
leaves the score of its best place. `_take_kernel` copies what follows the best of these. A score orders places as they
are to be chosen: 31 bits of the match's length, a bit for the row's own tokens, 32 bits of how late the place is.
Launches depend on shapes alone; lengths are read on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launch import _cdiv, _power_of_two

_BLOCK = 1024  # places that a program compares at a time
_MAX_SHARES = 512  # programs of a row, at most, for its own tokens and for the corpus each
_PROGRAMS = 1056  # wanted in all: 8 for each SM of an H100 or H200


@triton.jit(do_not_specialize=["token_ids_stride", "own_shares", "corpus_size"])
def _score_kernel(
    token_ids_ptr,
    slots_ptr,
    lengths_ptr,
    wanted_ptr,
    corpus_ptr,
    head_ptr,
    scores_ptr,  # int64 [R, shares]; 0: no match
    token_ids_stride,
    own_shares,
    corpus_size,
    MIN_MATCH: tl.constexpr,
    MAX_MATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, share): the first own_shares of a row compare its own tokens, the others the corpus."""
    row, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot = tl.load(slots_ptr + row)
    length = tl.load(lengths_ptr + slot, mask=slot >= 0, other=0)
    tokens_ptr = token_ids_ptr + slot.to(tl.int64) * token_ids_stride
    is_own = share < own_shares
    first = tl.where(is_own, share, share - own_shares) * BLOCK
    step = tl.where(is_own, own_shares, shares - own_shares) * BLOCK
    places = tl.where(is_own, length - 1, corpus_size)
    if (tl.load(wanted_ptr + row) <= 0) | (length < MIN_MATCH):
        places = 0
    best = tl.zeros((BLOCK,), tl.int64)
    for begin in range(first, places, step):
        at = begin + tl.arange(0, BLOCK)  # of a run's last token
        alive = at < places
        if is_own:
            late = at.to(tl.int64) + (1 << 32)
        else:
            late = ((at - tl.load(head_ptr) + corpus_size) % corpus_size).to(tl.int64)
            alive &= tl.load(corpus_ptr + (at + 1) % corpus_size, mask=alive, other=-1) != -1
        match = tl.zeros((BLOCK,), tl.int32)
        num_alive = BLOCK
        back = 0
        while (back < MAX_MATCH) & (back < length) & (num_alive > 0):
            token = tl.load(tokens_ptr + length - 1 - back)
            if is_own:
                alive &= at >= back
                alive &= tl.load(tokens_ptr + at - back, mask=alive, other=-1) == token
            else:
                before = tl.where(at >= back, at - back, at - back + corpus_size)
                alive &= tl.load(corpus_ptr + before, mask=alive, other=-1) == token
            match += alive.to(tl.int32)
            num_alive = tl.sum(alive.to(tl.int32), 0)
            back += 1
        best = tl.maximum(best, tl.where(match >= MIN_MATCH, (match.to(tl.int64) << 33) + late, 0))
    tl.store(scores_ptr + row * shares + share, tl.max(best, 0))


@triton.jit(do_not_specialize=["token_ids_stride", "shares", "corpus_size", "max_drafts"])
def _take_kernel(
    token_ids_ptr,
    slots_ptr,
    lengths_ptr,
    wanted_ptr,
    corpus_ptr,
    head_ptr,
    scores_ptr,
    drafts_ptr,
    counts_ptr,
    token_ids_stride,
    shares,
    corpus_size,
    max_drafts,
    BLOCK_SHARES: tl.constexpr,
    BLOCK_DRAFTS: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0)
    share, draft = tl.arange(0, BLOCK_SHARES), tl.arange(0, BLOCK_DRAFTS)
    score = tl.max(tl.load(scores_ptr + row * shares + share, mask=share < shares, other=0), 0)
    count = tl.load(wanted_ptr + row)
    if score == 0:
        count = 0
    else:
        late = (score & 0xFFFFFFFF).to(tl.int32)
        if (score >> 32) & 1:
            slot = tl.load(slots_ptr + row)
            tokens_ptr = token_ids_ptr + slot.to(tl.int64) * token_ids_stride
            period = tl.load(lengths_ptr + slot) - 1 - late
            found = tl.load(tokens_ptr + late + 1 + draft % period, mask=draft < count, other=0)
        else:
            at = tl.load(head_ptr) + late + 1 + draft
            found = tl.load(corpus_ptr + at % corpus_size, mask=draft < count, other=-1)
            count = tl.min(tl.where(found == -1, draft, count), 0)
        tl.store(drafts_ptr + row * max_drafts + draft, found, mask=draft < count)
    tl.store(counts_ptr + row, count)


def find_drafts(
    token_ids: Tensor,
    slots: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    corpus: Tensor | None,
    head: Tensor | None,
    min_match: int,
    max_match: int,
    drafts: Tensor,
    counts: Tensor,
) -> None:
    """As kernels/reference/lookup.py has it. All int32, contiguous, on one device. Launches depend on shapes, min_match
    and max_match alone."""
    num_rows, max_drafts = drafts.shape
    size = 0 if corpus is None else len(corpus)
    most = max(1, min(_MAX_SHARES, _PROGRAMS // max(num_rows, 1)))
    own_shares = min(most, _cdiv(token_ids.shape[1], _BLOCK))
    shares = own_shares + min(most, _cdiv(size, _BLOCK))
    scores = torch.empty(num_rows, shares, dtype=torch.int64, device=drafts.device)
    ring = (slots, slots) if corpus is None or head is None else (corpus, head)  # without one, nothing reads it
    rows = token_ids, slots, lengths, wanted, *ring, scores
    if num_rows == 0:
        return
    _score_kernel[(num_rows, shares)](
        *rows,
        token_ids.stride(0),
        own_shares,
        size,
        MIN_MATCH=min_match,
        MAX_MATCH=max_match,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    _take_kernel[(num_rows,)](
        *rows,
        drafts,
        counts,
        token_ids.stride(0),
        shares,
        size,
        max_drafts,
        BLOCK_SHARES=_power_of_two(2 * _MAX_SHARES),
        BLOCK_DRAFTS=_power_of_two(max_drafts),
        num_warps=4,
    )
