"""RankedQueue: sequences in the order in which they are served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise

from octavo.scheduler.audit import require
from octavo.scheduler.sequence import Sequence


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


class RankedQueue:
    """Sorted by rank. As ranks hold the arrival number, a preempted sequence goes back before later arrivals.

    Insertion and removal move pointers in one list: microseconds at tens of thousands of entries.
    While it is iterated, entries behind the current one may be removed.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self.num_tokens = 0  # of all, with the output that they may have at most
        self.num_impatient = 0  # requests that are not patient

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)

    def __getitem__(self, index: int) -> Sequence:
        return self._sequences[index]

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_rank)
        self._count(sequence, 1)

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._sequences, sequence.rank, key=_rank)
        require(self._sequences[index] is sequence, f"request {sequence.request.request_id!r} is not in its queue")
        del self._sequences[index]
        self._count(sequence, -1)

    def _count(self, sequence: Sequence, sign: int) -> None:
        self.num_tokens += sign * sequence.max_num_tokens
        self.num_impatient += sign * (not sequence.request.patient)

    def audit(self) -> None:
        """I9: in order, nothing twice, sums right."""
        ranks = [sequence.rank for sequence in self._sequences]
        require(all(a < b for a, b in pairwise(ranks)), "I9: a queue is out of order or holds one twice")
        num_tokens = sum(sequence.max_num_tokens for sequence in self._sequences)
        num_impatient = sum(not sequence.request.patient for sequence in self._sequences)
        require((num_tokens, num_impatient) == (self.num_tokens, self.num_impatient), "I9: a queue's sums are wrong")
