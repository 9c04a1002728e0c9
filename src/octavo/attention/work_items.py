"""What the programs of decode attention each do: rows cut into ranges of KV positions that fill the chip evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int32Array: TypeAlias = npt.NDArray[np.int32]

ITEM_FIELDS = 6
"""Columns of an item: row, begin, end, rows that share it, number of the row's items, the row's first item."""
KV_TILE = 64
"""Items begin at multiples of so many positions; the tile of every kernel configuration divides it."""

_PROGRAMS_PER_PROCESSOR = 2  # programs (item x KV head) aimed at for each multiprocessor when rows must be split
_PRODUCT_ROWS = 16  # of the smallest product of query heads with keys
# Multiples of KV_TILE; shorter pieces cost more to merge than they gain, soonest where rows share them.
_MIN_POSITIONS, _MIN_SHARED_POSITIONS = 64, 128


@dataclass(frozen=True, slots=True)
class DecodePlanner:
    """Cuts rows with one query token into items: split-KV of flash-decoding (Dao et al., 2023), balanced.

    num_processors: multiprocessors of the device. num_kv_heads: of the model; each item is a program for each.
    programs_per_processor, min_positions (a multiple of KV_TILE): how finely to cut.
    longest_first: whether rows with longer items come first, so that short ones fill the end of the launch.
    """

    num_processors: int
    num_kv_heads: int
    programs_per_processor: int = _PROGRAMS_PER_PROCESSOR
    min_positions: int = _MIN_POSITIONS
    longest_first: bool = True

    @property
    def target_items(self) -> int:
        """Items that keep the device busy."""
        return max(1, -(-self.num_processors * self.programs_per_processor // self.num_kv_heads))

    def max_items(self, num_rows: int, max_positions: int | None = None) -> int:
        """Most items that any plan for `num_rows` rows has (of at most `max_positions` positions, where known)."""
        bound = self.target_items + num_rows if num_rows else 0
        return bound if max_positions is None else min(bound, num_rows * -(-max_positions // self.min_positions))

    def plan(
        self,
        num_positions: npt.ArrayLike,
        rows: npt.ArrayLike | None = None,
        out: Int32Array | None = None,
        shares: npt.ArrayLike = 1,
    ) -> Int32Array:
        """Items of the rows named, a row's items together and in order of position.

        num_positions: integers [N] >= 1, positions each row sees (its tokens after the step).
        rows: integers [N], their indices in the step; None: 0 ... N-1.
        shares: integers [N], how many rows from each on share its items: see `sharing_rows`. num_positions is then
            that of the last of them.
        out: int32 [>= max_items(N), 6], filled and padded with items of row -1 where given.
        Returns int32 [I, 6], a view of `out` where that is given. An item's begin is a multiple of KV_TILE, and so
        is its end unless it is the row's last. Every position of a row is in exactly one of its items.
        """
        positions = np.asarray(num_positions, dtype=np.int32)
        indices = np.arange(len(positions), dtype=np.int32) if rows is None else np.asarray(rows, dtype=np.int32)
        sharing = np.broadcast_to(np.asarray(shares, dtype=np.int32), positions.shape)
        lengths, counts = self._cut(positions, bool((sharing > 1).any()))
        if self.longest_first and len(positions) > 1:
            # Sorting 16-bit keys is a radix sort: 10 us for 1,024 rows, a third of what 32-bit keys take.
            order = np.argsort((-(lengths // KV_TILE)).astype(np.int16), kind="stable")
            positions, indices, lengths, counts = positions[order], indices[order], lengths[order], counts[order]
            sharing = sharing[order]
        last = np.cumsum(counts, dtype=np.int32)
        num_items = int(last[-1]) if len(last) else 0
        items = np.empty((num_items, ITEM_FIELDS), np.int32) if out is None else out[:num_items]
        columns: tuple[Int32Array, ...] = (indices, sharing, counts, last - counts, lengths, positions)
        if num_items > len(positions):
            columns = tuple(np.repeat(column, counts) for column in columns)
        row, share, count, first, length, total = columns
        begin = (np.arange(num_items, dtype=np.int32) - first) * length
        items[:, 0] = row
        items[:, 1] = begin
        items[:, 2] = np.minimum(begin + length, total)
        items[:, 3] = share
        items[:, 4] = count
        items[:, 5] = first
        if out is not None:
            out[num_items:, 0] = -1
        return items

    def _cut(self, positions: Int32Array, are_shared: bool) -> tuple[Int32Array, Int32Array]:
        """(positions of each of a row's items but the last, number of its items), int32 [N] each. are_shared: whether
        some rows share items.

        A row has at most ceil(its positions / chunk) items, so there are at most target_items + N, and they are as
        even as tiles allow.
        """
        least = max(self.min_positions, _MIN_SHARED_POSITIONS) if are_shared else self.min_positions
        chunk = max(least, -(-int(positions.sum(dtype=np.int64)) // self.target_items))
        chunk = -(-chunk // KV_TILE) * KV_TILE
        if not len(positions) or int(positions.max()) <= chunk:
            return (positions + (KV_TILE - 1)) // KV_TILE * KV_TILE, np.ones_like(positions)
        counts = (positions + (chunk - 1)) // chunk
        if len(positions) <= self.target_items < int(counts.sum()):
            # Somewhat longer items, if then all of them run at once, instead of a second round of few.
            wider = -(-chunk * 9 // 8 // KV_TILE) * KV_TILE
            fewer = (positions + (wider - 1)) // wider
            if int(fewer.sum()) <= self.target_items:
                counts = fewer
        tiles = (positions + (KV_TILE - 1)) // KV_TILE
        lengths = (tiles + (counts - 1)) // counts * KV_TILE
        return lengths, (positions + (lengths - 1)) // lengths


def queries_of_item(group_size: int) -> int:
    """The most rows that share an item: with the query heads of a group they fill what is computed at once anyway."""
    return max(1, _PRODUCT_ROWS >> (group_size - 1).bit_length())


def sharing_rows(slots: Int32Array, starts: Int32Array, rows: Int32Array, most: int) -> tuple[Int32Array, Int32Array]:
    """Which rows with one query token share items: up to `most` that follow each other, in the step and in one
    sequence, as those that verify guesses do.

    slots, starts, rows: int32 [N], of the rows in order: where their sequences are, tokens before theirs, and their
    indices in the step. Returns int32 [M] each: the first of each group among these N, and how many it has.
    """
    places = np.arange(len(slots), dtype=np.int32)
    begins = np.ones(len(slots), np.bool_)
    begins[1:] = (np.diff(slots) != 0) | (np.diff(starts) != 1) | (np.diff(rows) != 1)
    in_run = places - np.maximum.accumulate(np.where(begins, places, 0))
    firsts = np.flatnonzero(in_run % most == 0).astype(np.int32)
    return firsts, np.diff(firsts, append=np.int32(len(slots))).astype(np.int32)
