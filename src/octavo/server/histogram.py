"""A histogram that costs one bisection per observation."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

_TO_80 = (0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TTFT_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, *_TO_80, 160.0, 640.0, 2560.0)
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, *_TO_80)
_TO_60 = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
REQUEST_SECONDS = (*_TO_60, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PARAMS_N = (1, 2, 5, 10, 20)
HTTP_SECONDS = (0.1, 0.5, 1.0)


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, … up to `limit`."""
    bounds = (mantissa * 10**exponent for exponent in range(len(str(limit))) for mantissa in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= limit)


class Histogram:
    """Counts per bucket; a value belongs to the first bound that is not below it. One thread writes."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last one is +Inf
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def export(self) -> tuple[list[int], float]:
        """Counts per bucket, and the sum; for `add` on another histogram of the same bounds."""
        return self._counts.copy(), self._sum

    def add(self, counts: Sequence[int], total: float) -> None:
        """Take in what another histogram of the same bounds exported."""
        self._counts = [mine + other for mine, other in zip(self._counts, counts, strict=True)]
        self._sum += total

    @property
    def count(self) -> int:
        return sum(self._counts)

    @property
    def sum(self) -> float:
        return self._sum

    def buckets(self, last: float | None = None) -> list[tuple[str, float]]:
        """(le, cumulative count) in Prometheus' form; bounds above `last` are left out."""
        cumulative = list(accumulate(self._counts))
        kept = [
            (repr(float(bound)), float(number))
            for bound, number in zip(self._bounds, cumulative)
            if last is None or bound <= last
        ]
        return [*kept, ("+Inf", float(cumulative[-1]))]
