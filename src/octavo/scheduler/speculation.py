"""Stand-in until the policy is merged."""

from __future__ import annotations

from collections.abc import Sequence


class Acceptance:
    __slots__ = ()


class SpeculationPolicy:
    def __init__(self, max_drafts: int, adaptive: bool = True, proposes_free: bool = False) -> None:
        self._max = max_drafts

    def choose(self, acceptances: Sequence[Acceptance], num_other_tokens: int) -> list[int]:
        return [self._max] * len(acceptances)

    def observe_row(self, acceptance: Acceptance, num_drafts: int, num_accepted: int, num_found: int) -> None:
        pass

    def observe_step(self, num_rows: int, num_tokens: int, num_drafts: int, seconds: float) -> None:
        pass
