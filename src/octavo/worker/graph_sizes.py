"""Which sizes of a step are recorded as CUDA graphs, in which order, and which of them a step is padded to."""

from __future__ import annotations

import bisect
from itertools import zip_longest
from typing import NamedTuple

# Numbers of rows that decode steps are padded to: close together where a row costs most.
_DECODE_SIZES = (
    1,
    2,
    4,
    8,
    12,
    16,
    *range(24, 64, 8),
    *range(64, 256, 16),
    *range(256, 512, 32),
    *range(512, 1025, 64),
)
_OFTEN = 256  # rows; decode steps of more are rare, or soon of fewer
# Numbers of tokens that mixed steps are padded to, and of rows.
_MIXED_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_MIXED_ROWS = (64, 128, 256, 384, 512)
# Numbers of tokens that batches take whose prompts are spread over decode steps (scheduler/leveling.py), and of rows in
# steps of so many tokens. All rows, the padding too, pass through the language head and most of the last layer.
_LEVEL_TOKENS = (256, 384, 512)
_LEVEL_ROWS = (64, 128, 192, 256, 384, 512)


class GraphSize(NamedTuple):
    """num_tokens = num_rows: of decode steps; mixed ones have more tokens than rows. adapters: rows may have one."""

    num_tokens: int
    num_rows: int
    adapters: bool = False

    @property
    def decodes(self) -> bool:
        return self.num_tokens == self.num_rows


class GraphSizes:
    """max_rows, max_tokens: of a step. adapters: each size once more, for steps in which rows have adapters; of those
    only every other one, since their graphs take twice as long to record."""

    def __init__(self, max_rows: int, max_tokens: int, adapters: bool) -> None:
        decodes = [n for n in _DECODE_SIZES if n < max_rows] + [min(max_rows, _DECODE_SIZES[-1])]
        mixed = [n for n in _MIXED_TOKENS if n <= max_tokens]
        self._max_rows = max_rows
        self._decodes = {False: decodes}
        self._mixed_tokens = {False: mixed}
        if adapters:
            self._decodes[True] = sorted({1, *decodes[::-2]})
            self._mixed_tokens[True] = mixed[::-2][::-1]

    def find(self, num_tokens: int, num_rows: int, adapters: bool = False) -> GraphSize | None:
        """The smallest that holds such a step, a mixed one if it has more tokens than rows; None if none is that
        large."""
        if num_tokens == num_rows:
            decodes = _least(self._decodes[adapters], num_rows)
            return None if decodes is None else GraphSize(decodes, decodes, adapters)
        tokens = _least(self._mixed_tokens[adapters], num_tokens)
        rows = None if tokens is None else _least(self._rows_of(tokens), num_rows)
        return None if tokens is None or rows is None else GraphSize(tokens, rows, adapters)

    def order(self) -> list[GraphSize]:
        """All, those that serve most first; with adapters and without in turn."""
        in_turn = zip_longest(*(self._order_of(adapters) for adapters in self._decodes))
        return [size for group in in_turn for size in group if size is not None]

    def _order_of(self, adapters: bool) -> list[GraphSize]:
        """The largest, in whose memory all others then find room; decode steps of round sizes, and mixed steps of few
        rows and such sizes; those of level steps; then what lies between, of decode steps first those of so few rows
        as batches end with."""
        largest = self._decodes[adapters][-1]
        ordered = sorted(
            self._decodes[adapters],
            key=lambda n: (n != largest, n.bit_count() > 1 and n > _OFTEN, n.bit_count(), n),
        )
        num_round = sum(n == largest or n.bit_count() == 1 for n in ordered)
        decodes = [GraphSize(n, n, adapters) for n in ordered]
        tokens = self._mixed_tokens[adapters]
        few = [GraphSize(n, self._rows_of(n)[0], adapters) for n in tokens]
        mixed = [GraphSize(n, rows, adapters) for n in tokens for rows in self._rows_of(n)]
        mixed = few + sorted(mixed, key=lambda size: size.num_rows)
        round_few = [size for size in few if size.num_tokens.bit_count() == 1]
        level = [size for size in mixed if size.num_tokens in _LEVEL_TOKENS]
        return list(dict.fromkeys(decodes[:num_round] + round_few + level + decodes[num_round:] + mixed))

    def _rows_of(self, num_tokens: int) -> list[int]:
        """Numbers of rows that mixed steps of so many tokens are padded to, in order."""
        sizes = _LEVEL_ROWS if num_tokens in _LEVEL_TOKENS else _MIXED_ROWS
        return sorted({min(n, self._max_rows, num_tokens - 1) for n in sizes})


def _least(sizes: list[int], number: int) -> int | None:
    """The least of the sizes, which are in order, that is no less than a number; None if there is none."""
    at = bisect.bisect_left(sizes, number)
    return sizes[at] if at < len(sizes) else None
