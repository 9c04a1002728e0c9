"""How many tokens to draft for which sequence: as many as pay, and none where none does."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import nsmallest

from octavo.scheduler.draft_search import ABSENT, LEVELS, MARGIN, Choice, DraftSearch
from octavo.scheduler.step_cost import StepCost, is_alike

_MEMORY = 0.96  # weight that a row's earlier drafts keep with each further one
_FADING = 0.99  # weight that they keep with each step in which the row verifies none
_SHARED_WEIGHT = 2.0  # drafts' worth of trust in what is known of all rows, against a row's own
_FIRST_SHARED = 0.4  # acceptance expected before any draft has been verified
_FIRST_SHARED_WEIGHT, _LEAST_SHARED_GAIN = 5, 0.02  # results' worth of trust in that; of one row's result in it, later
_SHARED_DOUBT = 0.04  # its standard deviation, or so
_SHARED_STEP = 0.04  # change of the shared estimate at which rows are judged anew
_FIND_GAIN = 0.02  # of one row's result in the estimate of that
_FIND_STEP = 1.25  # growth of that estimate at which drafts are ranked anew
_UNBIASED_AGE = 12  # steps without a draft after which a row counts as chosen without regard to its acceptance
_NEW_TRIED = 8.0  # drafts before which a row has not been chosen for its own sake

_BUDGET = 0.003  # part of all time that probing may cost
_PROMPT_BUDGET = 0.0015  # part of all time that prompts may cost which nothing is expected of
_FIRST_BUDGET, _MOST_BUDGET, _MOST_PROMPT_BUDGET = 3.0, 2.0, 1.5  # steps' worth of time
_PROBE_EVERY = 4  # steps between two probes: what the former brought is known by then
_FIRST_PLAIN, _PLAIN_EVERY = 12, 48  # steps after which a step without drafts is tried again: at first, later
_FAR, _PLAIN_SELDOM = 1.3, 4  # times the throughput of none from which on steps without drafts are tried so much less
_PLAIN_STEPS = 2  # in a row: the first verifies the drafts of before
_MOST_SAMPLED = 8  # rows that a probe of acceptance takes
_KEPT = 2  # steps for which a choice is kept
_TYPICAL_OUTPUT = 256  # tokens that a sequence is expected to bring, unless it is allowed fewer
# Drafts must be expected to save so many times what the prompt costs: before a pass was measured beside as many rows as
# there are, and after.
_FIRST_PROMPT_MARGIN, _PROMPT_MARGIN = 2.5, 1.75
_TRIAL_STEPS, _MOST_TRIALS = 64, 4  # no more than so many prompts in so many steps of which nothing is expected
_TELLING_PROMPT = 256  # tokens from which on the time of prompts tells what one costs
_NUM_PROMPT_COSTS = 8  # of those measurements that are kept


class Acceptance:
    """What is known of one sequence's drafts. Written by the policy alone; outlives preemption."""

    __slots__ = ("is_enrolled", "is_ready", "level", "num_accepted", "num_tried", "sampled_at")

    def __init__(self, level: int, is_ready: bool, is_enrolled: bool) -> None:
        self.num_tried = 0.0  # drafts whose predecessors were accepted, fading
        self.num_accepted = 0.0  # those of them that were accepted
        self.sampled_at = -_UNBIASED_AGE  # step of the policy in which drafts of it were last seen verified
        self.level = level  # estimate of the acceptance, in 1 / LEVELS; or ABSENT
        self.is_ready = is_ready  # the proposer has drafts, or makes them when asked
        self.is_enrolled = is_enrolled  # the proposer is shown its prompt


def _is_other(hope: Choice, best: Choice) -> bool:
    """Whether there is more to hope for than what is known to be best."""
    return hope.rate > best.rate and (hope.cap, hope.least) != (best.cap, best.least)


class SpeculationPolicy:
    """Chooses the number of drafts a row such that tokens per second are the most, by what was measured.

    A row whose drafts are accepted with probability a yields 1 + a + a^2 + ... + a^k tokens of k drafts. So drafts are
    taken in the order of what they promise, over all rows, for as long as the step's tokens per second (StepCost) grow.
    Drafts are only used where they win by a margin at a pessimistic estimate of costs; what wins only at an optimistic
    one is tried now and then, and so are steps without drafts, and drafts for rows that have none. Each such probe is
    paid for, by its expected loss, out of less than 1 % of the time.

    A draft model must see a sequence's prompt, which takes time before it has brought anything. So a new sequence is
    enrolled where what its drafts are expected to save is more than that; else none are made for it.

    Results may come any number of steps late.
    """

    def __init__(
        self, max_drafts: int, adaptive: bool = True, proposes_free: bool = False, max_total: int = 2**31
    ) -> None:
        """proposes_free: drafts cost nothing (a lookup) and may not be found; else each takes a pass of a model.
        max_total: drafts that a step can verify.

        Raises ValueError for max_drafts < 1.
        """
        if max_drafts < 1:
            raise ValueError(f"max_drafts={max_drafts} is out of range; allowed: >= 1")
        self._max_drafts = max_drafts
        self._adaptive = adaptive
        self._proposes_free = proposes_free
        self._cost = StepCost()
        self._search = DraftSearch(self._cost, max_drafts, proposes_free, max_total)
        self._shared = _FIRST_SHARED  # acceptance of rows' first drafts, rows chosen without regard to it
        self._num_shared = _FIRST_SHARED_WEIGHT
        self._judged_by = _FIRST_SHARED  # the shared estimate at which all levels were last renewed
        self._now = 0  # calls of choose
        self._kept: Choice | None = None  # the latest choice that was no probe
        self._kept_by_level: list[int] = []  # its drafts by level
        self._kept_rows = 0
        self._kept_until = 0
        self._depth = 0  # the most drafts a row in the latest choice that was no probe
        self._credit = 0.0  # seconds that probing may cost
        self._prompt_credit = 0.0  # and prompts
        self._probe_at = 0  # the first step that may probe again
        self._hope_at = 0  # the first step that may try again what wins at optimistic costs: others come in between
        self._decided_at = 0  # the step of the latest choice that was not kept from before
        self._plain_at = 0  # the first step in which one without drafts is due, if there is none before
        self._plain_every = _FIRST_PLAIN
        self._plain_left = 0  # steps of a begun probe without drafts
        # Seconds that the draft model took for a prompt's token. Accidents make it long, none makes it short: the
        # least counts.
        self._prompt_costs: deque[float] = deque(maxlen=_NUM_PROMPT_COSTS)
        self._trials_at, self._num_trials = 0, 0  # prompts of which nothing is expected, since that step
        self._saving = 0.0  # seconds that drafts save of a token, of _saving_rows rows in step _saving_at
        self._saving_rows, self._saving_at = 0, -_KEPT
        self._memory = [_MEMORY**seen for seen in range(max_drafts + 1)]
        self._finds = 0.1  # probability that a lookup finds something where it last found nothing
        self._ranked_by = self._finds  # that probability when drafts were ranked
        self._search.rank(self._finds, self._shared)

    def track(self, num_rows: int = 1, num_prompt_tokens: int = 0, num_more: int = 1) -> Acceptance:
        """The record of a new sequence. num_rows: sequences that will run beside it; num_prompt_tokens, num_more:
        tokens of its own, and those that may come."""
        if self._proposes_free:
            return Acceptance(ABSENT, False, False)
        if self._enrols(num_rows, num_prompt_tokens, num_more):
            return Acceptance(round(self._shared * LEVELS), True, True)
        return Acceptance(ABSENT, False, False)

    def _enrols(self, num_rows: int, num_prompt_tokens: int, num_more: int) -> bool:
        if not self._adaptive or len(self._prompt_costs) < 2 or not self._cost.is_known:
            return True
        if self._now - self._saving_at >= _KEPT or not is_alike(num_rows, self._saving_rows):
            acceptance = max(self._shared - _SHARED_DOUBT, 0.0)
            best, plain = self._search.expected(num_rows, acceptance), self._search.plain(num_rows)
            self._saving = 1.0 / (plain.rate * (1.0 + MARGIN)) - 1.0 / best.rate  # without that they are not used
            self._saving_rows, self._saving_at = num_rows, self._now
        cost = num_prompt_tokens * min(self._prompt_costs)
        margin = _PROMPT_MARGIN if self._cost.knows_passes(num_rows) else _FIRST_PROMPT_MARGIN
        loss = margin * cost - min(num_more, _TYPICAL_OUTPUT) * self._saving
        if loss <= 0.0:
            return True
        # A few may be tried, to learn what passes beside as many rows take. More would be no use: a pass takes about as
        # long for some of the rows as for all, so as a rule they get no drafts.
        if self._now >= self._trials_at + _TRIAL_STEPS:
            self._trials_at, self._num_trials = self._now, 0
        price = max(loss, cost)
        if price > self._prompt_credit or self._num_trials >= _MOST_TRIALS:
            return False
        self._num_trials += 1
        self._prompt_credit -= price
        return True

    def num_to_propose(self, num_chosen: int) -> int:
        """How many drafts to ask the proposer for when num_chosen are wanted. What is free is always asked for: only
        what was found can be chosen later."""
        return self._max_drafts if self._proposes_free else num_chosen

    def choose(self, acceptances: Sequence[Acceptance], num_other_tokens: int = 0) -> list[int]:
        """Drafts to verify for each decoding sequence in the step that is prepared, beside so many other tokens."""
        num_rows = len(acceptances)
        if not self._adaptive:
            return [self._max_drafts] * num_rows
        self._now += 1
        if not num_rows or not self._cost.is_known:
            return [0] * num_rows
        if self._plain_left:
            self._plain_left -= 1
            return [0] * num_rows
        self._renew(acceptances)
        levels = [acceptance.level for acceptance in acceptances]
        choice, by_level = self._choice(levels, num_other_tokens)
        chosen = [by_level[level] for level in levels]
        if self._now >= self._probe_at and self._now == self._decided_at:
            self._sample(acceptances, chosen, num_other_tokens, choice.rate)
        return chosen

    def observe_row(self, acceptance: Acceptance, num_drafts: int, num_accepted: int, num_found: int) -> None:
        """Of a row's num_drafts verified drafts num_accepted were accepted; num_found are ready for the next step.

        num_drafts: those that were there. A lookup may have found fewer than were chosen.
        """
        if num_drafts:
            age = self._now - acceptance.sampled_at
            if acceptance.num_tried < _NEW_TRIED or age >= _UNBIASED_AGE:
                self._num_shared += 1
                gain = max(1.0 / self._num_shared, _LEAST_SHARED_GAIN)
                self._shared += gain * ((num_accepted > 0) - self._shared)
            seen = num_accepted + (num_accepted < num_drafts)  # what follows a rejected draft tells nothing
            memory = self._memory[seen] if age <= 1 else self._memory[seen] * _FADING ** (age - 1)
            tried = acceptance.num_tried = memory * acceptance.num_tried + seen
            accepted = acceptance.num_accepted = memory * acceptance.num_accepted + num_accepted
            acceptance.sampled_at = self._now
            if acceptance.is_ready:
                level = LEVELS * (accepted + _SHARED_WEIGHT * self._shared) / (tried + _SHARED_WEIGHT)
                acceptance.level = int(level + 0.5)
        if self._proposes_free:
            if not acceptance.is_ready:
                self._finds += _FIND_GAIN * ((num_found > 0) - self._finds)
            if acceptance.is_ready != (num_found > 0):
                acceptance.is_ready = num_found > 0
                self._judge(acceptance)

    def observe_step(self, num_rows: int, num_tokens: int, num_drafts: int, num_passes: int, seconds: float) -> None:
        """A step took so many seconds: num_rows rows, num_tokens tokens of which num_drafts were drafts, and
        num_passes of the proposer's model for the step after (the most drafts that a row asked for; 0 if free).

        Steps with prompts may be told too: they teach what many tokens cost.
        """
        if seconds <= 0.0:
            return  # the clock is too coarse to tell anything
        if not self._cost.is_known:
            self._credit = _FIRST_BUDGET * seconds
        self._credit = min(self._credit + _BUDGET * seconds, _MOST_BUDGET * seconds)
        self._prompt_credit = min(self._prompt_credit + _PROMPT_BUDGET * seconds, _MOST_PROMPT_BUDGET * seconds)
        if not num_drafts and not num_passes and num_tokens == num_rows:
            self._plain_at = self._now + self._plain_every
        self._cost.observe(num_rows, num_tokens, num_passes, num_drafts, seconds)

    def plain_seconds(self, num_rows: int) -> float | None:
        """What a step of so many rows takes without drafts, where such were measured lately."""
        return self._cost.plain(num_rows) if self._cost.knows_plain(num_rows) else None

    def observe_prompts(
        self, num_tokens: int, seconds: float, num_draft_tokens: int = 0, draft_seconds: float = 0.0
    ) -> None:
        """A step with prompts, of so many tokens in all, took so many seconds without the draft model; that took
        draft_seconds for num_draft_tokens of prompts, and perhaps some drafts."""
        if seconds > 0.0:
            self._cost.observe_prompts(num_tokens, seconds)
        if num_draft_tokens >= _TELLING_PROMPT:
            self._prompt_costs.append(draft_seconds / num_draft_tokens)

    def _renew(self, acceptances: Sequence[Acceptance]) -> None:
        """Bring levels and ranks up to date with what is known of all rows."""
        is_old = abs(self._shared - self._judged_by) > _SHARED_STEP
        if is_old:
            self._judged_by = self._shared
            for acceptance in acceptances:
                self._judge(acceptance)
        if is_old or not self._ranked_by / _FIND_STEP < self._finds < self._ranked_by * _FIND_STEP:
            self._ranked_by = self._finds
            self._search.rank(self._finds, self._shared)

    def _judge(self, acceptance: Acceptance) -> None:
        """Renew its level. What the row itself showed fades with time."""
        if not acceptance.is_ready:
            acceptance.level = ABSENT
            return
        age = self._now - acceptance.sampled_at
        trust = _FADING**age if age > 1 else 1.0
        own = trust * acceptance.num_accepted + _SHARED_WEIGHT * self._shared
        acceptance.level = int(LEVELS * own / (trust * acceptance.num_tried + _SHARED_WEIGHT) + 0.5)

    def _choice(self, levels: list[int], num_other_tokens: int) -> tuple[Choice, list[int]]:
        """What is best as far as known, and drafts by level: of that, or of a probe."""
        num_rows = len(levels)
        is_valid = self._now < self._kept_until and is_alike(num_rows, self._kept_rows)
        if self._kept is not None and is_valid and not num_other_tokens:
            return self._kept, self._kept_by_level
        counts = [0] * (LEVELS + 2)
        for level in levels:
            counts[level] += 1
        self._decided_at = self._now
        best, hope = self._search.best(self._depth, counts, num_rows)
        self._depth = best.cap
        if num_other_tokens:
            best = self._search.beside(best, counts, num_rows, num_other_tokens)
            return best, self._search.spread(best)
        self._kept, self._kept_by_level = best, self._search.spread(best)
        self._kept_rows, self._kept_until = num_rows, self._now + _KEPT
        if self._now >= self._probe_at:
            plain = self._search.plain(num_rows)
            if best.cap and self._now >= self._plain_at + self._plain_delay(best, plain):
                if self._pay(plain, best.rate, _PLAIN_STEPS):
                    self._plain_left = _PLAIN_STEPS - 1
                    self._plain_every = min(2 * self._plain_every, _PLAIN_EVERY)
                    return best, self._search.spread(plain)
            elif self._now >= self._hope_at and _is_other(hope, best) and self._pay(hope, best.rate, 1):
                self._hope_at = self._now + 2 * _PROBE_EVERY
                return best, self._search.spread(hope)
        return best, self._kept_by_level

    def _plain_delay(self, best: Choice, plain: Choice) -> int:
        """Steps for which one without drafts may wait beyond its time: far from the border it decides nothing."""
        return (_PLAIN_SELDOM - 1) * self._plain_every if best.rate > _FAR * plain.rate else 0

    def _pay(self, probe: Choice, rate: float, num_steps: int) -> bool:
        """Buy a probe for its expected loss against so many tokens per second. False: it is too dear for now."""
        loss = num_steps * (probe.seconds - probe.num_tokens / rate)
        if loss > self._credit:
            return False
        self._credit -= max(loss, 0.0)
        self._probe_at = self._now + _PROBE_EVERY
        return True

    def _sample(self, acceptances: Sequence[Acceptance], chosen: list[int], num_other_tokens: int, rate: float) -> None:
        """Give one draft to a few of the rows without any, those that were not seen for longest, if it can be paid."""
        due = self._now - _UNBIASED_AGE  # what was seen since then need not be seen again
        rows = [
            row
            for row, count in enumerate(chosen)
            if not count and acceptances[row].is_ready and acceptances[row].sampled_at <= due
        ]
        if not rows:
            return
        rows = nsmallest(_MOST_SAMPLED, rows, key=lambda row: acceptances[row].sampled_at)
        num_rows, num_drafts = len(chosen), sum(chosen)
        passes, least = (0, 0) if self._proposes_free else (max(chosen), 1)
        num_tokens = num_rows + num_drafts + num_other_tokens
        before, _ = self._cost.estimate(num_rows, num_tokens, passes, num_drafts)
        after, _ = self._cost.estimate(num_rows, num_tokens + len(rows), max(passes, least), 1)
        # Nothing is expected of them: else what is hoped for would pay for itself.
        if self._pay(Choice(rate, 1, 0.0, 0.0, after - before), rate, 1):
            for row in rows:
                chosen[row] = 1


class SpeculationStats:
    """Counters of verified drafts since the start."""

    __slots__ = (
        "num_accepted_tokens",
        "num_accepted_tokens_per_pos",
        "num_draft_tokens",
        "num_drafts",
        "plain_seconds",
        "seconds",
    )

    def __init__(self, max_drafts: int) -> None:
        self.num_drafts = 0  # rows that verified drafts
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.seconds = 0.0  # of steps with drafts, where it is known what they would have taken without
        self.plain_seconds = 0.0  # that
        self.num_accepted_tokens_per_pos = [0] * max_drafts

    def add(self, num_drafts: int, num_accepted: int) -> None:
        """One row: num_accepted of its num_drafts drafts were accepted."""
        if not num_drafts:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        for position in range(num_accepted):
            self.num_accepted_tokens_per_pos[position] += 1
