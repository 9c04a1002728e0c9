"""DraftSearch: which drafts of which rows make a step's tokens per second the most."""

from __future__ import annotations

from typing import NamedTuple

from octavo.scheduler.step_cost import StepCost

LEVELS = 20  # acceptance is rounded to multiples of 1 / LEVELS
ABSENT = LEVELS + 1  # the level of rows for which a lookup found nothing; by now it may have found something
_CERTAIN = 0.98  # what the highest level stands for
MARGIN = 0.08  # drafts must promise so much more throughput than none
_LEAST_PROMISE = 0.01  # tokens: drafts that promise less are not worth what is not measured
_STRIDE = 1.1  # growth of the number of drafts between two looks at what it costs


class Choice(NamedTuple):
    """Drafts for all rows: each draft that promises `least` tokens or more, and is one of its row's first `cap`."""

    rate: float  # tokens per second by which it is compared
    cap: int
    least: float
    num_tokens: float  # expected of the step
    seconds: float  # expected


class DraftSearch:
    """Takes drafts in the order of what they promise, over all rows, and finds where to stop."""

    def __init__(self, cost: StepCost, max_drafts: int, proposes_free: bool, max_total: int) -> None:
        """cost: learns elsewhere. proposes_free: drafts need no passes. max_total: drafts of a step at most."""
        self._cost = cost
        self._max_drafts = max_drafts
        self._proposes_free = proposes_free
        self._max_total = max_total
        self._drafts: list[tuple[float, int, int]] = []  # (tokens that it adds, level, j) of a row's j-th draft
        self._turn = 0  # of the limits that take turns

    def rank(self, finds: float, shared: float) -> None:
        """Sort drafts by their promise. Absent rows find something with probability `finds`, and each draft of theirs
        is accepted with probability `shared`."""
        steps = range(1, self._max_drafts + 1)
        ranked = [(min(level / LEVELS, _CERTAIN) ** j, level, j) for level in range(1, LEVELS + 1) for j in steps]
        if self._proposes_free:
            ranked += [(finds * min(shared, _CERTAIN) ** j, ABSENT, j) for j in steps]
        ranked = [draft for draft in ranked if draft[0] >= _LEAST_PROMISE]
        self._drafts = sorted(ranked, key=lambda draft: (-draft[0], draft[2]))

    def plain(self, num_rows: int) -> Choice:
        """No drafts."""
        seconds = self._cost.plain(num_rows)
        return Choice(num_rows / seconds, 0, 2.0, num_rows, seconds)

    def best(self, depth: int, counts: list[int], num_rows: int) -> tuple[Choice, Choice]:
        """The choice with most tokens per second at pessimistic costs, and at optimistic ones.

        depth: the most drafts a row in the choice before, from which this one moves by little. counts: rows a level.
        """
        plain = self.plain(num_rows)
        best = plain._replace(rate=plain.rate * (1.0 + MARGIN))
        _, deviation = self._cost.estimate(num_rows, num_rows, 0, 0)
        hope = plain._replace(rate=num_rows / max(plain.seconds - deviation, 0.1 * plain.seconds))
        drafts = [draft for draft in self._drafts if counts[draft[1]]]
        for cap in self._caps(depth):
            best, hope = self._walk(drafts, counts, cap, best, hope)
        return best._replace(rate=best.num_tokens / best.seconds), hope

    def _caps(self, depth: int) -> list[int]:
        """Limits on the drafts a row that are worth a look: one more for a single row is a pass for all."""
        most = self._max_drafts
        if self._proposes_free:
            return [most]
        self._turn += 1
        others = (2 * depth, 1) if depth else (2, 4)
        near = {depth - 1, depth, depth + 1, others[self._turn % len(others)]}
        return sorted(cap for cap in near if 0 < cap <= most) or [1]

    def _walk(
        self, drafts: list[tuple[float, int, int]], counts: list[int], cap: int, best: Choice, hope: Choice
    ) -> tuple[Choice, Choice]:
        """`best` and `hope`, or what is better with at most cap drafts a row."""
        num_rows, cost = sum(counts), self._cost
        num_drafts, gain, deepest, due = 0, float(num_rows), 0, 0.0
        furthest = 2 * cost.most_tokens - num_rows
        best_rate, best_at, hope_rate, hope_at = best.rate, None, hope.rate, None
        for promise, level, j in drafts:
            if j > cap:
                continue
            num_drafts += counts[level]
            if num_drafts > self._max_total:
                break
            gain += promise * counts[level]
            deepest = max(deepest, j)
            if num_drafts < due:
                continue
            due = _STRIDE * num_drafts
            passes = 0 if self._proposes_free else deepest
            seconds, deviation = cost.estimate(num_rows, num_rows + num_drafts, passes, num_drafts)
            if gain > best_rate * (seconds + deviation):
                best_rate, best_at = gain / (seconds + deviation), (deepest, promise, gain, seconds)
            low = max(seconds - deviation, 0.1 * seconds)
            if gain > hope_rate * low and num_drafts <= furthest:
                hope_rate, hope_at = gain / low, (deepest, promise, gain, seconds)
        return (
            Choice(best_rate, *best_at) if best_at else best,
            Choice(hope_rate, *hope_at) if hope_at else hope,
        )

    def expected(self, num_rows: int, acceptance: float) -> Choice:
        """The choice with most tokens per second at expected costs, where all rows have the same acceptance."""
        best, gain = self.plain(num_rows), float(num_rows)
        for k in range(1, min(self._max_drafts, self._max_total // num_rows) + 1):
            gain += num_rows * min(acceptance, _CERTAIN) ** k
            passes = 0 if self._proposes_free else k
            seconds, _ = self._cost.estimate(num_rows, (1 + k) * num_rows, passes, k * num_rows)
            if gain > best.rate * seconds:
                best = Choice(gain / seconds, k, 0.0, gain, seconds)
        return best

    def beside(self, best: Choice, counts: list[int], num_rows: int, num_other_tokens: int) -> Choice:
        """Of the best choice for a step by itself, what pays beside other tokens: there a draft may cost more."""
        width, gain, passes = num_rows + num_other_tokens, float(num_rows), 0
        seconds, _ = self._cost.estimate(num_rows, width, 0, 0)
        profit = gain - best.rate * seconds
        kept = Choice(best.rate, 0, 2.0, gain, seconds)
        for promise, level, j in self._drafts:
            if promise < best.least:
                break
            if j > best.cap or not counts[level]:
                continue
            width += counts[level]
            gain += promise * counts[level]
            passes = 0 if self._proposes_free else max(passes, j)
            seconds, _ = self._cost.estimate(num_rows, width, passes, 1)
            if gain - best.rate * seconds > profit:
                profit = gain - best.rate * seconds
                kept = Choice(best.rate, best.cap, promise, gain, seconds)
        return kept

    def spread(self, choice: Choice) -> list[int]:
        """Drafts for a row of each level."""
        by_level = [0] * (LEVELS + 2)
        for promise, level, j in self._drafts:
            if promise < choice.least:
                break
            if j <= choice.cap:
                by_level[level] = j
        return by_level
