"""Executors: how a plan reaches the worker ranks. These have a single rank, in their own process."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from octavo.protocol.plan import StepPlan, StepResult


class Runner(Protocol):
    def execute(self, plan: StepPlan) -> StepResult: ...


class Handle(Protocol):
    def result(self) -> StepResult: ...


class AsyncRunner(Protocol):
    def launch(self, plan: StepPlan) -> Handle: ...
    def warm_up(self) -> bool: ...


class DeviceExecutor:
    """Launches plans on a GPU from the caller's own thread: the device runs them in order while the caller goes on."""

    def __init__(self, runner: AsyncRunner) -> None:
        self._runner = runner

    def submit(self, plan: StepPlan) -> Handle:
        """Start one step. The handle waits for its result, or raises what launching it raised."""
        try:
            return self._runner.launch(plan)
        except Exception as error:
            failed: Future[StepResult] = Future()
            failed.set_exception(error)
            return failed

    def warm_up(self) -> bool:
        """Do a little of what makes later steps faster. False: nothing is left to do."""
        return self._runner.warm_up()

    def shutdown(self) -> None:
        """Nothing runs here that the device would not end by itself."""


class InProcessExecutor:
    """Runs plans in order, on one thread of its own, so that the caller may schedule meanwhile.

    With `threaded=False` a plan runs inside `submit`: nothing overlaps and nothing is handed
    between threads, which is the faster of the two where the model itself needs every core.
    """

    def __init__(self, runner: Runner, *, threaded: bool) -> None:
        self._runner = runner
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="worker") if threaded else None

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Start one step. The future holds its result, or what it raised."""
        if self._pool is not None:
            return self._pool.submit(self._runner.execute, plan)
        future: Future[StepResult] = Future()
        try:
            future.set_result(self._runner.execute(plan))
        except Exception as error:
            future.set_exception(error)
        return future

    def warm_up(self) -> bool:
        """There is nothing to prepare."""
        return False

    def shutdown(self) -> None:
        """Wait for what was submitted, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()
