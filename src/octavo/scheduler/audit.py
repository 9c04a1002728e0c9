"""ConsistencyError: a broken invariant is loud, and says which one."""

from __future__ import annotations


class ConsistencyError(AssertionError):
    """The scheduler's bookkeeping contradicts itself, or a worker broke the contract of StepResult."""


def require(condition: bool, message: str) -> None:
    """Raise ConsistencyError(message) unless `condition` holds. Unlike `assert`, never compiled away."""
    if not condition:
        raise ConsistencyError(message)
