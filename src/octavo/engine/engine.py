"""Engine: the scheduler and the workers, kept busy by one loop."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from octavo.engine.executor import Executor, StepHandle
from octavo.engine.grammars import GrammarDesk
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
        grammars: GrammarDesk | None = None,
    ) -> None:
        """grammars: None refuses requests with structured outputs, or with a budget of reasoning."""
        self._scheduler = scheduler
        self._executor = executor
        self._depth = depth
        self._clock = clock
        self._grammars = grammars
        self._pacer = Pacer()
        self._in_flight: deque[_Step] = deque()
        self.num_step_tokens = 0  # tokens computed in the last step committed; written by step()

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self._scheduler.has_unfinished() or self._is_compiling

    @property
    def _is_compiling(self) -> bool:
        return self._grammars is not None and self._grammars.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError, naming what does not fit, if it can never run."""
        structured = request.sampling.structured_outputs is not None
        if not structured and request.reasoning is None:
            self._scheduler.add(request)
            return
        if self._grammars is None:
            name = "structured_outputs" if structured else "thinking_token_budget"
            raise ValueError(f"{name} needs a tokenizer, and this engine has none")
        constraint = self._grammars.find(request)
        if constraint is not None:
            self._scheduler.add(request, constraint)
        else:
            self._grammars.take(request)

    def abort(self, request_ids: Iterable[str]) -> list[TokenOutput]:
        """End requests now, in whatever state they are. Unknown ids are ignored."""
        request_ids = list(request_ids)
        dropped = [] if self._grammars is None else self._grammars.drop(request_ids)
        outputs = [TokenOutput(name, [], finish_reason="abort") for name in dropped]
        return outputs + self._scheduler.abort(request_ids)

    def step(self) -> list[TokenOutput]:
        """Fill the pipeline, then wait for its oldest step and return what that brought.

        A step that raises costs the requests in it, never the engine.
        """
        self.num_step_tokens = 0
        refused = self._add_compiled() if self._is_compiling else []
        while len(self._in_flight) < self._depth and self._submit():
            pass
        if not self._in_flight:
            return refused
        step = self._in_flight.popleft()
        plan, self.num_step_tokens = step.plan, step.num_tokens
        try:
            result = step.handle.result()
        except Exception as error:
            _log.exception("step %d failed: its %d requests end with an error", plan.step_id, len(plan.rows))
            message = f"the step that computed this request failed: {type(error).__name__}"
            return refused + self._scheduler.fail(plan, message)
        self._pacer.finished(len(plan.rows), step.decodes, result.seconds, self._clock())
        return refused + self._scheduler.commit(plan, result)

    def _add_compiled(self) -> list[TokenOutput]:
        """Queue the requests whose grammar is compiled by now. Returns the ends of those that cannot run."""
        assert self._grammars is not None
        refused = []
        idle = not self._in_flight and not self._scheduler.has_unfinished()
        for request, compiled in self._grammars.ready(idle=idle):
            try:
                self._scheduler.add(request, compiled.result())
            except Exception as error:
                is_refusal = isinstance(error, ValueError)
                if not is_refusal:
                    _log.exception("the grammar of request %s could not be compiled", request.request_id)
                name, words = request.request_id, str(error)
                refused.append(TokenOutput(name, [], finish_reason="error", error=words, refused=is_refusal))
        return refused

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
        """Prepare a little of what steps need. False: nothing is left to prepare."""
        return self._executor.warm_up()

    def open_grammars(self) -> None:
        """Make ready for grammars, beside the loop."""
        if self._grammars is not None:
            self._grammars.open()

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def audit(self) -> None:
        """Recompute every invariant of the KV bookkeeping from scratch; raises naming the one that is broken."""
        self._scheduler.audit()

    def reset_prefix_cache(self) -> bool:
        return self._scheduler.reset_prefix_cache()

    def shutdown(self) -> None:
        if self._grammars is not None:
            self._grammars.shutdown()
        self._executor.shutdown()
