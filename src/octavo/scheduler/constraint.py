"""Constraint: what may come next in one output, decided by someone else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Constraint(Protocol):
    """num_accepted: output tokens accepted so far. masks, error: asked for when all that were sampled in a step have
    been accepted, for masks are made together.

    num_free: so many of the tokens to come have no mask, whatever they are. It never shrinks by more than one a token.
    """

    num_accepted: int

    @property
    def num_free(self) -> int: ...

    def masks(self, draft_ids: Sequence[int]) -> list[bytes | None]:
        """As in PlanRow: for the token after those accepted, then after each guess that it allows, in order, while it
        can tell. At least one; nothing is accepted by it."""
        ...

    @property
    def error(self) -> str | None:
        """Why the output cannot go on, if it cannot."""
        ...

    def accept(self, token_ids: Iterable[int]) -> None:
        """Take in tokens that did not end the output."""
        ...
