"""A Run that searches: each step asks the engine for one token of every beam, with its alternatives."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from octavo.engine.client import EngineDeadError
from octavo.protocol.outputs import FinishReason, TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.server.adapters import ServedModel
from octavo.server.context import ServerState
from octavo.server.metrics import RequestRecord
from octavo.server.openai.errors import internal, unavailable
from octavo.server.openai.runner import Choice, Run, failure
from octavo.server.openai.sampling import beam_search
from octavo.server.openai.schema import GenerationBody
from octavo.text.beam_search import BeamSearch

_Step = asyncio.Future[TokenOutput]


@dataclass(slots=True)
class _Search:
    """One prompt's. num_cached_tokens, scheduled_time: of its first step; written by `_step`."""

    prompt: str
    request: Request
    params: SamplingParams
    search: BeamSearch
    num_cached_tokens: int = 0
    scheduled_time: float = 0.0


class BeamRun(Run):
    """All searches of one HTTP request, side by side. Not for streams: nothing is certain before the end."""

    def __init__(
        self, state: ServerState, body: GenerationBody, model: ServedModel, arrival: float, request_id: str
    ) -> None:
        super().__init__(state, body, model, arrival, request_id)
        self._searches: list[_Search] = []
        self._num_made = body.n or 1  # what is searched beside them never was a choice

    def add(self, prompt: str, token_ids: list[int], params: SamplingParams, names: Mapping[str, str]) -> None:
        """Plan a search for the n best of best_of outputs. Raises APIError 400."""
        assert params.max_tokens is not None
        self._cost.add(len(token_ids), params, names)
        self._num_prompt_tokens += len(token_ids)
        request = Request(
            request_id=f"{self._engine_id}-{len(self._searches)}",
            prompt_token_ids=token_ids,
            sampling=params,
            max_tokens=params.max_tokens,
            arrival_time=self._arrival,
            priority=self._body.priority or 0,
            cache_salt=self._body.cache_salt,
            lora=self.model.lora,
        )
        self._searches.append(_Search(prompt, request, params, beam_search(params, self._context)))

    async def complete(self) -> None:
        """Search to the end. Raises APIError, by the engine."""
        self._metrics.histograms["request_params_n"].observe(self._body.n or 1)
        records = [
            RequestRecord(self._metrics, self._arrival, len(own.request.prompt_token_ids), own.request.max_tokens)
            for own in self._searches
        ]
        reasons: list[FinishReason] = ["abort"] * len(records)
        try:
            while running := [own for own in self._searches if not own.search.done]:
                await self._step(running)
            for index, own in enumerate(self._searches):
                found = self._choices_of(own)
                records[index].tokens(
                    sum(len(choice.generation.token_ids) for choice in found), own.num_cached_tokens, own.scheduled_time
                )
                reasons[index] = found[0].generation.finish_reason or "length"
        except Exception:
            reasons = ["error"] * len(records)
            raise
        finally:
            for record, reason in zip(records, reasons):
                record.finish(reason)
            self.close()

    @property
    def answered(self) -> list[Choice]:
        return self.choices

    async def _step(self, running: list[_Search]) -> None:
        """Every beam of these searches becomes one token longer."""
        loop = asyncio.get_running_loop()
        steps: dict[str, _Step] = {}
        asked = [
            own.search.requests(own.request.request_id, own.request.prompt_token_ids, own.request) for own in running
        ]
        try:
            for requests in asked:
                for request in requests:
                    step: _Step = loop.create_future()
                    self._engine.submit(request, partial(_settle, step))
                    steps[request.request_id] = step
            await asyncio.gather(*steps.values())
        except EngineDeadError:
            raise _stopped() from None
        finally:
            for name, step in steps.items():
                if not step.done() or step.cancelled():
                    self._engine.abort(name)
        for own, requests in zip(running, asked):
            outputs = [steps[request.request_id].result() for request in requests]
            if not own.search.running[0].token_ids:
                own.num_cached_tokens, own.scheduled_time = outputs[0].num_cached_tokens, outputs[0].scheduled_time
            own.search.advance([output.logprobs[0] for output in outputs if output.logprobs])

    def _choices_of(self, own: _Search) -> list[Choice]:
        """The n best, added to the run's."""
        prompt, first = own.request.prompt_token_ids, len(self.choices)
        for beam in own.search.ended[: own.params.n]:
            generation = beam.generation(self._tokenizer, own.params, prompt, own.num_cached_tokens)
            self.choices.append(Choice(len(self.choices), own.prompt, own.request, generation))
        return self.choices[first:]


def _settle(step: _Step, output: TokenOutput | EngineDeadError) -> None:
    """The engine's sink for one beam's token."""
    if step.done():
        return
    if isinstance(output, EngineDeadError):
        step.set_exception(_stopped())
    elif output.finish_reason in ("error", "abort"):
        step.set_exception(failure(output))
    elif not output.logprobs:
        step.set_exception(internal("the engine told no log-probabilities"))
    else:
        step.set_result(output)


def _stopped() -> Exception:
    return unavailable("the engine stopped before the request was complete")
