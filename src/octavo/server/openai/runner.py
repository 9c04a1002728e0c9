"""From prompts to deltas: one engine request a completion, and one place where all their tokens arrive."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import msgspec

from octavo.engine.client import EngineClient, EngineDeadError
from octavo.protocol.outputs import FinishReason, TokenOutput
from octavo.protocol.reasoning import ReasoningMarks
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.server.adapters import ServedModel
from octavo.server.context import ServerState
from octavo.server.metrics import MetricsRegistry, RequestRecord
from octavo.server.openai.cost import RequestCost
from octavo.server.openai.errors import APIError, internal, invalid, unavailable
from octavo.server.openai.schema import GenerationBody
from octavo.server.openai.structured import Wish
from octavo.text.generation import Delta, Generation, best_first

logger = logging.getLogger("octavo.server")


def _fresh_seed() -> int:
    return secrets.randbits(63)


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens. A prompt with several completions counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


@dataclass(slots=True)
class Choice:
    """One completion on its way. `index` counts over all prompts, completions of one prompt together."""

    index: int
    prompt: str
    request: Request
    generation: Generation
    text_offset: int = 0  # characters of token texts so far; written by the logprobs formatter


# What a Run's deltas are given to, one call each, as they arrive. The last delta of a choice, and only
# that, has a finish_reason. An exception it raises fails the run.
Consumer = Callable[[Choice, Delta], None]


def _ignore(choice: Choice, delta: Delta) -> None:
    """The consumer of those who read the choices at the end."""


class Run:
    """All completions of one HTTP request."""

    def __init__(
        self, state: ServerState, body: GenerationBody, model: ServedModel, arrival: float, request_id: str
    ) -> None:
        """request_id: the public one. The engine's ids add random bits, for a client may repeat its own."""
        self._context = state.context
        self._engine: EngineClient = state.context.engine
        self._metrics: MetricsRegistry = state.metrics
        self._tokenizer = state.context.tokenizer
        self._body = body
        self.model = model
        self._arrival = arrival
        self._engine_id = f"{request_id}-{uuid.uuid4().hex[:8]}"
        self.choices: list[Choice] = []
        self._num_made = body.best_of or body.n or 1  # choices of one prompt
        self.wish: Wish | None = None  # what constrains all completions; written by the endpoint ahead of `add`
        self.grammar: str | None = None  # the same, compiled; written likewise
        self.reasoning: ReasoningMarks | None = None  # see Request; written likewise, of the one prompt of a chat
        self._num_prompt_tokens = 0
        self._cost = RequestCost(state.context.options.max_request_cost)
        self._feeds: list[_Feed] = []
        self._num_unfinished = 0
        self._consume: Consumer | None = None
        # Done with the last delta of the last choice, or with what failed the run.
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, prompt: str, token_ids: list[int], params: SamplingParams, names: Mapping[str, str]) -> None:
        """Plan n completions of one prompt; params.max_tokens is resolved. names: see RequestCost.add.

        Raises APIError 400.
        """
        self._cost.add(len(token_ids), params, names)
        self._num_prompt_tokens += len(token_ids)
        assert params.max_tokens is not None
        for own in params.completions(_fresh_seed):
            index = len(self.choices)
            request = Request(
                request_id=f"{self._engine_id}-{index}",
                prompt_token_ids=token_ids,
                sampling=own,
                max_tokens=params.max_tokens,
                eos_token_ids=() if self._tokenizer is None else self._tokenizer.eos_token_ids,
                arrival_time=self._arrival,
                priority=self._body.priority or 0,
                cache_salt=self._body.cache_salt,
                grammar=self.grammar,
                reasoning=self.reasoning,
                lora=self.model.lora,
            )
            try:
                generation = Generation(self._tokenizer, own, token_ids)
            except ValueError as error:
                raise invalid(str(error), "stop") from None
            self.choices.append(Choice(index, prompt, request, generation))

    def start(self, consume: Consumer) -> None:
        """Submit everything; what comes goes to `consume`, from the loop. `close` must follow, whatever happens.

        Raises APIError when the engine is dead.
        """
        self._metrics.histograms["request_params_n"].observe(self._body.n or 1)
        self._consume = consume
        self._num_unfinished = len(self.choices)
        try:
            for choice in self.choices:
                request = choice.request
                num_prompt_tokens = len(request.prompt_token_ids)
                record = RequestRecord(self._metrics, self._arrival, num_prompt_tokens, request.max_tokens)
                self._feeds.append(_Feed(self, choice, record))
                self._engine.submit(request, self._feeds[-1])
        except EngineDeadError as error:
            self._feeds[-1](error)

    async def ended(self) -> None:
        """Wait for the last delta of the last choice. Raises what failed the run: mostly APIError, by the engine."""
        await self.end
        longest = max(len(choice.generation.token_ids) for choice in self.choices)
        self._metrics.histograms["request_max_num_generation_tokens"].observe(longest)

    def close(self) -> None:
        """Abort what still runs, and forget the consumer. Idempotent."""
        self._consume = None
        for feed in self._feeds:
            feed.leave()
        self.end.cancel()

    async def complete(self) -> None:
        """Run to the end, for those who want the choices whole. Raises like `ended`."""
        try:
            self.start(_ignore)
            await self.ended()
        finally:
            self.close()

    def deliver(self, choice: Choice, delta: Delta) -> None:
        """For the feeds: one delta of one choice."""
        if self._consume is None or self.end.done():
            return
        self._consume(choice, delta)
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
            if not self._num_unfinished:
                self.end.set_result(None)

    def fail(self, error: Exception) -> None:
        """For the feeds: the first failure is that of the run."""
        if not self.end.done():
            self.end.set_exception(error)
            self.end.exception()  # heard, also where the consumer has left

    def usage(self) -> Usage:
        """Tokens so far."""
        completion = sum(len(choice.generation.token_ids) for choice in self.choices)
        firsts = self.choices[:: self._num_made]
        cached = sum(choice.generation.num_cached_tokens for choice in firsts)
        prompt = self._num_prompt_tokens
        return Usage(prompt, completion, prompt + completion, CachedTokens(cached))

    @property
    def answered(self) -> list[Choice]:
        """The choices that are returned: all, or the n best of the best_of of each prompt."""
        n, num_made = self._body.n or 1, self._num_made
        if num_made == n:
            return self.choices
        found: list[Choice] = []
        for begin in range(0, len(self.choices), num_made):
            made = self.choices[begin : begin + num_made]
            for best in best_first([choice.generation for choice in made], n):
                choice = next(choice for choice in made if choice.generation is best)
                found.append(replace(choice, index=len(found)))
        return found

    def abort(self, choice: Choice) -> None:
        """For the feeds: tell the engine to stop working on a choice."""
        self._engine.abort(choice.request.request_id)


class _Feed:
    """The engine's sink for one choice: counts, detokenizes, and hands the delta on."""

    __slots__ = ("_choice", "_generation", "_open", "_record", "_run")

    def __init__(self, run: Run, choice: Choice, record: RequestRecord) -> None:
        self._run = run
        self._choice = choice
        self._generation = choice.generation
        self._record = record
        self._open = True  # the record has yet to be finished, which happens exactly once

    def __call__(self, output: TokenOutput | EngineDeadError) -> None:
        if not self._open:
            return
        if isinstance(output, EngineDeadError):
            self._finish("error")
            self._run.fail(unavailable("the engine stopped before the request was complete"))
            return
        try:
            self._take(output)
        except Exception as error:
            self.leave()
            self._run.fail(error)

    def leave(self) -> None:
        """Nobody wants more of this choice."""
        if self._open:
            self._finish("abort")
            self._run.abort(self._choice)

    def _take(self, output: TokenOutput) -> None:
        if output.new_token_ids:
            self._record.tokens(len(output.new_token_ids), output.num_cached_tokens, output.scheduled_time)
        reason = output.finish_reason
        if reason in ("error", "abort"):
            self._finish(reason)
            raise failure(output, self._run.wish)
        delta = self._generation.push(output)
        if delta.finish_reason is not None:
            self._finish(delta.finish_reason)
            if reason is None:  # a stop string: the engine does not know
                self._run.abort(self._choice)
        self._run.deliver(self._choice, delta)

    def _finish(self, reason: FinishReason) -> None:
        self._open = False
        self._record.finish(reason)


def failure(output: TokenOutput, wish: Wish | None = None) -> APIError:
    """What the client is told of a request that the engine gave up, refused or failed on. wish: what constrained its
    text, which is then at fault for a refusal."""
    if output.finish_reason == "abort":
        return unavailable("the engine gave the request up")
    logger.warning("request %s failed: %s", output.request_id, output.error)
    if output.refused:
        return invalid(output.error or "the engine refused this request", None if wish is None else wish.path)
    return internal(output.error or "the engine failed on this request")
