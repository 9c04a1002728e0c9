"""The work of the prefill kernel, planned on the host: which tiles of which rows, and in what order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

BLOCK_M = 128  # rows (token, head) of a tile; see octavo.kernels.triton.prefill_attention

Ints = NDArray[np.int32]


def tokens_per_item(group_size: int, block_m: int = BLOCK_M) -> int:
    """Tokens of a tile whose rows are (token, head), with the heads of a group padded to a power of two.

    Raises ValueError where one token does not fit."""
    tokens = block_m // (1 << (group_size - 1).bit_length())
    if tokens == 0:
        raise ValueError(f"group_size={group_size} does not fit block_m={block_m}")
    return tokens


def max_prefill_items(num_tokens: int, num_rows: int, group_size: int, block_m: int = BLOCK_M) -> int:
    """The most items that `prefill_items` makes of up to `num_rows` rows with `num_tokens` tokens together."""
    tokens = tokens_per_item(group_size, block_m)
    rows = min(num_rows, num_tokens // 2)  # a row with an item has at least two tokens
    return (num_tokens - rows) // tokens + rows


def prefill_items(
    starts: Ints,
    lengths: Ints,
    group_size: int,
    block_m: int = BLOCK_M,
    taken: Mapping[int, tuple[int, int]] | None = None,
) -> Ints:
    """One item for every tile of the rows with more than one query token: int32 [P, 2], (row, token within the row).

    starts, lengths: integers [R], tokens in the cache and new tokens. taken: for some rows, the tokens [first, last)
    within the row that are computed elsewhere. Tiles with the most keys come first, so that the last ones to start
    are short (longest processing time first; Graham, 1969).
    """
    tokens = tokens_per_item(group_size, block_m)
    rows = np.flatnonzero(lengths > 1)
    begins, ends = np.zeros_like(rows), lengths[rows]
    if taken:
        kept = ~np.isin(rows, list(taken))
        gaps = [(row, 0, first) for row, (first, _) in taken.items()]
        gaps += [(row, last, int(lengths[row])) for row, (_, last) in taken.items()]
        gap_rows, gap_begins, gap_ends = np.array([gap for gap in gaps if gap[1] < gap[2]], np.int64).reshape(-1, 3).T
        rows = np.concatenate((rows[kept], gap_rows))
        begins = np.concatenate((begins[kept], gap_begins))
        ends = np.concatenate((ends[kept], gap_ends))
    counts = (ends - begins + tokens - 1) // tokens
    total = int(counts.sum())
    # Offsets count up by one tile within a segment: a running index, less the index at which its segment began.
    origin = np.repeat(begins - (np.cumsum(counts) - counts) * tokens, counts)
    items = np.empty((total, 2), np.int32)
    items[:, 0] = np.repeat(rows, counts)
    items[:, 1] = np.arange(total) * tokens + origin
    order = np.argsort(-(starts[items[:, 0]] + items[:, 1]), kind="stable")
    return items[order]
