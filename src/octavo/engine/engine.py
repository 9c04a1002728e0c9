"""Engine: the scheduler and the workers, kept busy by one loop."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from octavo.engine.adapters import AdapterDesk
from octavo.engine.executor import Executor, StepHandle
from octavo.engine.grammars import GrammarDesk
from octavo.engine.pacing import Pacer
from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.plan import StepPlan
from octavo.protocol.request import Request
from octavo.scheduler.constraint import Constraint
from octavo.scheduler.scheduler import Scheduler

_log = logging.getLogger(__name__)


class _Step(NamedTuple):
    """A step in flight."""

    plan: StepPlan
    handle: StepHandle
    num_tokens: int
    decodes: bool
    submitted: float  # when it was, on the engine's clock


def _refusal(request: Request, error: Exception) -> TokenOutput:
    """The end of a request that never ran. A ValueError is the request's own fault."""
    refused = isinstance(error, ValueError)
    return TokenOutput(request.request_id, [], finish_reason="error", error=str(error), refused=refused)


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
        adapters: AdapterDesk | None = None,
    ) -> None:
        """grammars: None refuses requests with structured outputs, or with a budget of reasoning; adapters: None those
        with an adapter."""
        self._scheduler = scheduler
        self._executor = executor
        self._depth = depth
        self._clock = clock
        self._grammars = grammars
        self._adapters = adapters
        self._digests: dict[str, bytes] = {}  # of adapters, by id of a request that is yet to reach the scheduler
        self._pacer = Pacer()
        self._in_flight: deque[_Step] = deque()
        self._has_more_to_prepare = True  # False once the executor said so; written by warm_up()
        self.num_step_tokens = 0  # tokens computed in the last step committed; written by step()

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self._scheduler.has_unfinished() or self._is_compiling or self._is_loading

    @property
    def _is_compiling(self) -> bool:
        return self._grammars is not None and self._grammars.has_work

    @property
    def _is_loading(self) -> bool:
        return self._adapters is not None and self._adapters.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError, naming what does not fit, if it can never run. What its grammar or its
        adapter has to say against it comes as its only output."""
        if request.lora is None:
            self._add_with_adapter(request)
        elif self._adapters is None:
            raise ValueError(f"lora_request={request.lora.lora_name!r} needs an engine with enable_lora")
        else:
            self._adapters.take(request)

    def _add_with_adapter(self, request: Request) -> None:
        """Queue a request whose adapter, if it has one, is loaded."""
        structured = request.sampling.structured_outputs is not None
        if not structured and request.reasoning is None:
            self._schedule(request)
            return
        if self._grammars is None:
            name = "structured_outputs" if structured else "thinking_token_budget"
            raise ValueError(f"{name} needs a tokenizer, and this engine has none")
        constraint = self._grammars.find(request)
        if constraint is not None:
            self._schedule(request, constraint)
        else:
            self._grammars.take(request)

    def _schedule(self, request: Request, constraint: Constraint | None = None) -> None:
        self._scheduler.add(request, constraint, self._digests.pop(request.request_id, None))

    def abort(self, request_ids: Iterable[str]) -> list[TokenOutput]:
        """End requests now, in whatever state they are. Unknown ids are ignored."""
        request_ids = list(request_ids)
        dropped = [] if self._grammars is None else self._grammars.drop(request_ids)
        dropped += [] if self._adapters is None else self._adapters.drop(request_ids)
        outputs = [TokenOutput(name, [], finish_reason="abort") for name in dropped]
        return self._released(outputs + self._scheduler.abort(request_ids))

    def step(self) -> list[TokenOutput]:
        """Fill the pipeline, then wait for its oldest step and return what that brought.

        A step that raises costs the requests in it, never the engine.
        """
        self.num_step_tokens = 0
        refused = self._add_loaded() if self._is_loading else []
        refused += self._add_compiled() if self._is_compiling else []
        while len(self._in_flight) < self._depth and self._submit():
            pass
        if not self._in_flight:
            return self._released(refused)
        if self._has_more_to_prepare and len(self._in_flight) > 1:
            self._prepare()
        step = self._in_flight.popleft()
        plan, self.num_step_tokens = step.plan, step.num_tokens
        try:
            result = step.handle.result()
        except Exception as error:
            _log.exception("step %d failed: its %d requests end with an error", plan.step_id, len(plan.rows))
            message = f"the step that computed this request failed: {type(error).__name__}"
            self._finished(step, None)
            return self._released(refused + self._scheduler.fail(plan, message))
        self._finished(step, result.seconds)
        return self._released(refused + self._scheduler.commit(plan, result))

    def _finished(self, step: _Step, seconds: float | None) -> None:
        following = self._in_flight[0].submitted if self._in_flight else None
        rows = len(step.plan.rows)
        self._pacer.finished(rows, step.num_tokens, step.decodes, seconds, self._clock(), following)

    def _released(self, outputs: list[TokenOutput]) -> list[TokenOutput]:
        """The same outputs. Requests that end with one of them need their adapter no more."""
        if self._adapters is not None:
            for output in outputs:
                if output.finish_reason is not None:
                    self._adapters.release(output.request_id)
                    self._digests.pop(output.request_id, None)
        return outputs

    def _add_loaded(self) -> list[TokenOutput]:
        """Queue the requests whose adapter is loaded by now. Returns the ends of those that cannot run."""
        assert self._adapters is not None
        refused = []
        for request, loaded in self._adapters.ready(idle=self._is_idle):
            try:
                if isinstance(loaded, Exception):
                    raise loaded
                self._digests[request.request_id] = loaded
                self._add_with_adapter(request)
            except Exception as error:
                refused.append(_refusal(request, error))
        return refused

    @property
    def _is_idle(self) -> bool:
        return not self._in_flight and not self._scheduler.has_unfinished()

    def _add_compiled(self) -> list[TokenOutput]:
        """Queue the requests whose grammar is compiled by now. Returns the ends of those that cannot run."""
        assert self._grammars is not None
        refused = []
        for request, compiled in self._grammars.ready(idle=self._is_idle):
            try:
                self._schedule(request, compiled.result())
            except Exception as error:
                if not isinstance(error, ValueError):
                    _log.exception("the grammar of request %s could not be compiled", request.request_id)
                refused.append(_refusal(request, error))
        return refused

    def _submit(self) -> bool:
        """Schedule a step and start it. False: there is nothing to do."""
        began = self._clock()
        plan = self._scheduler.schedule(began)
        if plan is None:
            return False
        handle, now = self._executor.submit(plan), self._clock()
        step = _Step(plan, handle, plan.num_tokens, plan.decodes, now)
        self._in_flight.append(step)
        self._pacer.submitted(step.decodes, now - began, now, alone=len(self._in_flight) == 1)
        return True

    def _prepare(self) -> None:
        """Prepare what later steps need for as long as the device is kept busy by prompts in flight."""
        num_tokens = sum(step.num_tokens for step in self._in_flight if not step.decodes)
        began = self._clock()
        while self._pacer.may_prepare(num_tokens, began) and self.warm_up():
            now = self._clock()
            self._pacer.prepared(now - began)
            began = now

    def spare_seconds(self) -> float:
        """How long the next `step` may be put off, so that requests yet to come take part in it, without the device
        having to wait."""
        if not self._in_flight or len(self._in_flight) >= self._depth:
            return 0.0
        return self._pacer.spare(len(self._in_flight[0].plan.rows), self._clock())

    def warm_up(self) -> bool:
        """Prepare a little of what steps need. False: nothing is left to prepare."""
        self._has_more_to_prepare = self._executor.warm_up()
        return self._has_more_to_prepare

    def open_grammars(self) -> None:
        """Make ready for grammars, beside the loop."""
        if self._grammars is not None:
            self._grammars.open()

    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def audit(self) -> None:
        """Recompute every invariant of the KV bookkeeping from scratch; raises naming the one that is broken."""
        self._scheduler.audit()
        if self._adapters is not None:
            self._adapters.audit()

    def reset_prefix_cache(self) -> bool:
        return self._scheduler.reset_prefix_cache()

    def shutdown(self) -> None:
        if self._grammars is not None:
            self._grammars.shutdown()
        if self._adapters is not None:
            self._adapters.shutdown()
        self._executor.shutdown()
