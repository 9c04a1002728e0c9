"""RepetitionDetector: whether an output ends in copies of one pattern."""

from __future__ import annotations

from octavo.protocol.repetition import RepetitionDetectionParams


class RepetitionDetector:
    """Told every output token once, in order; O(pattern sizes) each, whatever the length.

    Invariant: for each pattern size p, the last `_runs[p]` tokens each equal the one p before them. So the output ends
    in c copies of a pattern of p tokens exactly where that run has (c - 1) * p tokens or more.
    """

    def __init__(self, params: RepetitionDetectionParams) -> None:
        first, last = max(1, params.min_pattern_size), params.max_pattern_size
        self._needed = {size: (params.min_count - 1) * size for size in range(first, last + 1)}
        self._runs = dict.fromkeys(self._needed, 0)
        self._tokens: list[int] = []  # the last max_pattern_size or more, the latest at the end
        self._most = last

    def push(self, token_id: int) -> bool:
        """Take the next token. True: the output now ends in copies enough."""
        found = False
        tokens = self._tokens
        for size, needed in self._needed.items():
            if len(tokens) >= size and tokens[-size] == token_id:
                self._runs[size] += 1
                found |= self._runs[size] >= needed
            else:
                self._runs[size] = 0
        tokens.append(token_id)
        if len(tokens) > 2 * self._most:
            del tokens[: -self._most or None]  # all of them where none is looked for
        return found
