"""Constraint: what may come next in one output, decided by someone else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Constraint(Protocol):
    """mask: as in PlanRow, for the token after those accepted. num_accepted: output tokens accepted so far."""

    mask: bytes
    num_accepted: int

    def accept(self, token_ids: Iterable[int]) -> str | None:
        """Take in tokens that did not end the output. Returns why it cannot go on, if it cannot."""
        ...
