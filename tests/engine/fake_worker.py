"""A worker without a model: the next token is a function of the tokens before it."""

from __future__ import annotations

import time

from octavo.protocol.plan import RowResult, StepPlan, StepResult

VOCAB_SIZE = 1000


def next_token(token_ids: list[int]) -> int:
    """What the fake model says after `token_ids`."""
    return (sum(token_ids) * 31 + len(token_ids) * 7) % VOCAB_SIZE


def expected(prompt: list[int], count: int) -> list[int]:
    """The first `count` tokens generated from `prompt`."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt) :]


class FakeRunner:
    """Keeps token values in slots as a real one does. A prompt that starts with `poison` makes its step raise."""

    def __init__(self, poison: int | None = None, step_seconds: float = 0.0) -> None:
        self._slots: dict[int, list[int]] = {}
        self._poison = poison
        self._step_seconds = step_seconds

    def execute(self, plan: StepPlan) -> StepResult:
        for new in plan.new_sequences:
            self._slots[new.slot] = list(new.token_ids)
        if self._step_seconds:
            time.sleep(self._step_seconds)
        if any(self._slots[row.slot][0] == self._poison for row in plan.rows):
            raise RuntimeError("poisoned")
        rows = []
        for row in plan.rows:
            token_ids = self._slots[row.slot]
            if row.samples:
                del token_ids[row.start + row.length :]
                token_ids.append(next_token(token_ids))
            rows.append(RowResult([token_ids[-1]] if row.samples else []))
        return StepResult(plan.step_id, rows)
