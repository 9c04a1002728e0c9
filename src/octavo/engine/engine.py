"""Engine: the scheduler and the workers, kept busy by one loop."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from octavo.engine.executor import Executor, StepHandle
from octavo.engine.pacing import Pacer
from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.plan import StepPlan
from octavo.protocol.request import Request
from octavo.scheduler.scheduler import Scheduler

_log = logging.getLogger(__name__)


class _Step(NamedTuple):
    """A step in flight."""

    plan: StepPlan
    handle: StepHandle
    num_tokens: int

    @property
    def decodes(self) -> bool:
        return self.num_tokens == len(self.plan.rows)


class Engine:
    """Up to `depth` steps in flight: the next is scheduled and submitted while one runs.

    Not thread-safe: one thread adds, aborts and steps.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        depth: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._depth = depth
        self._clock = clock
        self._pacer = Pacer()
        self._in_flight: deque[_Step] = deque()
        self.num_step_tokens = 0  # tokens computed in the last step committed; written by step()

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self._scheduler.has_unfinished()

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError, naming what does not fit, if it can never run."""
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> list[TokenOutput]:
        """End requests now, in whatever state they are. Unknown ids are ignored."""
        return self._scheduler.abort(request_ids)

    def step(self) -> list[TokenOutput]:
        """Fill the pipeline, then wait for its oldest step and return what that brought.

        A step that raises costs the requests in it, never the engine.
        """
        self.num_step_tokens = 0
        while len(self._in_flight) < self._depth and self._submit():
            pass
        if not self._in_flight:
            return []
        step = self._in_flight.popleft()
        plan, self.num_step_tokens = step.plan, step.num_tokens
        try:
            result = step.handle.result()
        except Exception as error:
            _log.exception("step %d failed: its %d requests end with an error", plan.step_id, len(plan.rows))
            return self._scheduler.fail(plan, f"the step that computed this request failed: {type(error).__name__}")
        self._pacer.finished(len(plan.rows), step.decodes, result.seconds, self._clock())
        return self._scheduler.commit(plan, result)

    def _submit(self) -> bool:
        """Schedule a step and start it. False: there is nothing to do."""
        began = self._clock()
        plan = self._scheduler.schedule(began)
        if plan is None:
            return False
        step = _Step(plan, self._executor.submit(plan), plan.num_tokens)
        self._in_flight.append(step)
        now = self._clock()
        self._pacer.submitted(step.decodes, now - began, now, alone=len(self._in_flight) == 1)
        return True

    def spare_seconds(self) -> float:
        """How long the next `step` may be put off, so that requests yet to come take part in it, without the device
        having to wait."""
        if not self._in_flight or len(self._in_flight) >= self._depth:
            return 0.0
        return self._pacer.spare(len(self._in_flight[0].plan.rows), self._clock())

    def warm_up(self) -> bool:
        """Use idle time: prepare a little of what later steps need. False: nothing is left to prepare."""
        return self._executor.warm_up()

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def audit(self) -> None:
        """Recompute every invariant of the KV bookkeeping from scratch; raises naming the one that is broken."""
        self._scheduler.audit()

    def reset_prefix_cache(self) -> bool:
        return self._scheduler.reset_prefix_cache()

    def shutdown(self) -> None:
        self._executor.shutdown()
