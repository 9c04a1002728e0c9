"""Executor: how the engine reaches its workers, whatever and wherever they are."""

from __future__ import annotations

from typing import Protocol

from octavo.protocol.plan import StepPlan, StepResult


class StepHandle(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what the step raised."""
        ...


class Executor(Protocol):
    def submit(self, plan: StepPlan) -> StepHandle:
        """Start a step. Steps run in the order they are submitted."""
        ...

    def warm_up(self) -> bool:
        """Do a little, some 20 ms, of what makes later steps faster. False: nothing is left to do."""
        ...

    def shutdown(self) -> None:
        """End the workers. Nothing may be submitted afterwards."""
        ...
