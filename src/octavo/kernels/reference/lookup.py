"""Drafts by looking up what followed before, in NumPy over torch's memory; CPUs run this."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

SEPARATOR = -1  # of a corpus: after every output, and wherever nothing was written yet
_RECENT = 128  # places looked at first: text that goes round in circles has many, and the latest will do

_Ids = NDArray[np.integer]


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
    """Guess each row's next tokens: those that followed the longest earlier run equal to its last tokens.

    Prompt lookup decoding (Saxena 2023) in a row's own tokens; with a corpus, also in past outputs as SuffixDecoding
    (Oliaro et al. 2024) does, by a scan instead of suffix trees.

    token_ids: int32 or int64 [num_slots, max_len], ids >= 0; lengths: int32 [num_slots], how many are known.
    slots: int32 [R], -1 for a padding row; wanted: int32 [R], drafts wished for, no more than fit in drafts.
    corpus: int32 [C], a ring of outputs, a -1 after each and wherever none was written, one at least; head: int32 [1],
    where the ring's oldest token lies. None for both: own tokens alone.
    drafts: int32 [R, max_drafts] and counts: int32 [R] are written; of drafts, counts[r] ids of row r.

    Among all places in the row's tokens before their end, and all in the corpus that are followed by a token, the one
    after the longest run that equals the row's end counts, of min_match to max_match tokens; of equals one of the row's
    own, and of these the latest. The row's own tokens from there to their end are repeated until there are as many as
    wanted; drafts from the corpus end where the output did. Without a place there are none.
    """
    ring = None if corpus is None else corpus.cpu().numpy()
    oldest = 0 if head is None else int(head)
    known = lengths.tolist()
    for row, (slot, most) in enumerate(zip(slots.tolist(), wanted.tolist())):
        found: _Ids = np.empty(0, np.int32)
        if slot >= 0 and most > 0 and known[slot] > 0:
            tokens = token_ids[slot, : known[slot]].cpu().numpy()
            found = _drafts_of(tokens, ring, oldest, min_match, max_match, most)
        counts[row] = len(found)
        if len(found):
            drafts[row, : len(found)] = drafts.new_tensor(found)


def _drafts_of(tokens: _Ids, ring: _Ids | None, oldest: int, min_match: int, max_match: int, most: int) -> _Ids:
    tail = tokens[-max_match:]
    all_ends = np.flatnonzero(tokens[:-1] == tokens[-1])
    own_match, ends = _longest(tokens, all_ends[-_RECENT:], tail, is_ring=False)
    if own_match < len(tail) and len(all_ends) > _RECENT:
        own_match, ends = _longest(tokens, all_ends, tail, is_ring=False)
    if ring is not None and own_match < len(tail):
        ring_ends = np.flatnonzero(ring == tokens[-1])
        ring_ends = ring_ends[ring.take(ring_ends + 1, mode="wrap") != SEPARATOR]
        match, ring_ends = _longest(ring, ring_ends, tail, is_ring=True)
        if match > own_match:
            return _followers(ring, ring_ends, oldest, most) if match >= min_match else ring[:0]
    if own_match < max(min_match, 1):
        return tokens[:0]
    return np.resize(tokens[ends[-1] + 1 :], most)


def _longest(tokens: _Ids, ends: NDArray[np.intp], tail: _Ids, is_ring: bool) -> tuple[int, NDArray[np.intp]]:
    """How long the longest run is that equals the tail's end, and the indices of the last token of all such runs,
    ascending. ends: of those of one token. A ring's separator ends every run."""
    if not len(ends):
        return 0, ends
    for match in range(1, len(tail)):
        # A run that begins with the first token cannot grow: at most the first of them does.
        longer = ends if is_ring or ends[0] >= match else ends[1:]
        longer = longer[tokens[longer - match] == tail[-1 - match]]
        if not len(longer):
            return match, ends
        ends = longer
    return len(tail), ends


def _followers(ring: _Ids, ends: NDArray[np.intp], oldest: int, most: int) -> _Ids:
    """What follows the latest of the places, up to where that output ends."""
    end = ends[np.argmax((ends - oldest) % len(ring))]
    found = ring.take(np.arange(end + 1, end + 1 + most), mode="wrap")
    stops = np.flatnonzero(found == SEPARATOR)
    return found[: stops[0]] if len(stops) else found
