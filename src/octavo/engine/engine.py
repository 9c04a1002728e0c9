"""Engine: the scheduler and the workers, kept busy by one loop."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from octavo.engine.executor import Executor, StepHandle
from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.plan import StepPlan
from octavo.protocol.request import Request
from octavo.scheduler.scheduler import Scheduler

_log = logging.getLogger(__name__)


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
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
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
        while len(self._in_flight) < self._depth:
            plan = self._scheduler.schedule(self._clock())
            if plan is None:
                break
            self._in_flight.append((plan, self._executor.submit(plan)))
        if not self._in_flight:
            return []
        plan, handle = self._in_flight.popleft()
        self.num_step_tokens = plan.num_tokens
        try:
            result = handle.result()
        except Exception as error:
            _log.exception("step %d failed: its %d requests end with an error", plan.step_id, len(plan.rows))
            return self._scheduler.fail(plan, f"the step that computed this request failed: {type(error).__name__}")
        return self._scheduler.commit(plan, result)

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
