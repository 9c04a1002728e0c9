"""A simulated engine under a SpeculationPolicy: costs of steps, acceptance of rows, lookups that find in bursts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from octavo.scheduler.speculation import Acceptance, SpeculationPolicy

AcceptanceOf = Callable[[int, int], float]  # (row, step) -> probability that a draft is accepted


@dataclass(frozen=True)
class Machine:
    """Seconds of a step; a draft model's pass costs `per_pass` of an empty step, and a little a row."""

    base: float = 0.005
    flat_tokens: int = 200  # up to so many tokens take `base`; more take it in proportion. 0: a CPU
    per_pass: float = 0.0
    per_row: float = 0.0  # seconds, of a row's context
    verify: float = 0.0  # seconds, for a step with any drafts

    def seconds(self, num_rows: int, num_tokens: int, num_passes: int) -> float:
        work = max(1.0, num_tokens / self.flat_tokens) if self.flat_tokens else 0.2 + 0.8 * num_tokens
        passes = num_passes * self.per_pass * (1.0 + num_rows / 500)
        drafts = self.verify if num_tokens > num_rows else 0.0
        return self.base * (work + passes) + num_rows * self.per_row + drafts


@dataclass
class Outcome:
    speed: float  # time that the same tokens take without drafts, over the time taken
    num_drafts: float  # mean a row and step


@dataclass
class Load:
    """Rows that decode. Lookups: rows find drafts in bursts of `burst` steps on average, a part `found` of the time."""

    num_rows: int | Callable[[int], int]
    acceptance: AcceptanceOf
    num_steps: int = 2000
    is_lookup: bool = False
    found: float = 1.0
    burst: float = 30.0
    life: int = 400  # steps after which a row is another sequence
    noise: float = 0.1
    delay: int = 2  # steps after which results are known
    accidents: float = 0.0  # part of the steps that take ten times as long

    def rows_at(self, step: int) -> int:
        return self.num_rows if isinstance(self.num_rows, int) else self.num_rows(step)


def simulate(machine: Machine, load: Load, max_drafts: int = 8, fixed: int | None = None, seed: int = 0) -> Outcome:
    """Run load.num_steps steps. fixed: not the policy's choice but always so many drafts."""
    random, luck = Random(seed), Random(seed + 1)  # luck: of lookups, the same whatever is chosen
    policy = SpeculationPolicy(max_drafts, proposes_free=load.is_lookup)
    most = max(load.rows_at(step) for step in range(load.num_steps))
    records = [policy.track() for _ in range(most)]
    finds = [not load.is_lookup or luck.random() < load.found for _ in range(most)]
    pending: deque[Callable[[], None]] = deque()
    drafted = [0] * most  # for the step at hand
    time = plain = total_drafts = 0.0
    for step in range(load.num_steps):
        num_rows = load.rows_at(step)
        for row in range(num_rows):
            if (step + row * 37) % load.life == 0:
                records[row], drafted[row] = policy.track(), 0
        while len(pending) >= load.delay:
            pending.popleft()()
        asked = policy.choose(records[:num_rows]) if fixed is None else [fixed] * num_rows
        if load.is_lookup:  # what is found is chosen from; what is asked for was found a step before
            verified = [min(k, max_drafts) if find else 0 for k, find in zip(asked, finds)]
            num_passes = 0
        else:
            verified, num_passes = drafted[:num_rows], max(asked)
            drafted[:num_rows] = asked
        results, tokens = [], 0
        for row, k in enumerate(verified):
            acceptance, accepted = load.acceptance(row, step), 0
            while accepted < k and random.random() < acceptance:
                accepted += 1
            if load.is_lookup and load.found < 1.0:
                leave = 1.0 / load.burst
                enter = leave * load.found / (1.0 - load.found)
                finds[row] = luck.random() >= leave if finds[row] else luck.random() < enter
            found = (max_drafts if finds[row] else 0) if load.is_lookup else asked[row]
            results.append((records[row], k, accepted, found))
            tokens += 1 + accepted
        num_drafts = sum(verified)
        total_drafts += num_drafts / num_rows
        seconds = machine.seconds(num_rows, num_rows + num_drafts, num_passes)
        plain += machine.seconds(num_rows, num_rows, 0) * tokens / num_rows
        time += seconds
        measured = seconds * random.uniform(1.0 - load.noise, 1.0 + load.noise)
        measured *= 10.0 if random.random() < load.accidents else 1.0

        def report(
            results: list[tuple[Acceptance, int, int, int]] = results,
            step_report: tuple[int, int, int, int, float] = (
                num_rows,
                num_rows + num_drafts,
                num_drafts,
                num_passes,
                measured,
            ),
        ) -> None:
            for result in results:
                policy.observe_row(*result)
            policy.observe_step(*step_report)

        pending.append(report)
    return Outcome(plain / time, total_drafts / load.num_steps)
