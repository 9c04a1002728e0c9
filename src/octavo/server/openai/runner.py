"""From prompts to deltas: one engine request a completion, merged into one stream of batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import cast

import msgspec

from octavo.engine.client import EngineClient, EngineDeadError
from octavo.protocol.outputs import FinishReason, TokenOutput
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.server.context import ServerState
from octavo.server.metrics import MetricsRegistry, RequestRecord
from octavo.server.openai.errors import APIError, internal, invalid, unavailable
from octavo.server.openai.schema import GenerationBody
from octavo.text.generation import Delta, Generation

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


@dataclass
class Choice:
    """One completion on its way. `index` counts over all prompts, completions of one prompt together."""

    index: int
    prompt: str
    request: Request
    generation: Generation
    text_offset: int = 0  # characters of token texts so far; written by the logprobs formatter


class Run:
    """All completions of one HTTP request."""

    def __init__(self, state: ServerState, body: GenerationBody, arrival: float, request_id: str) -> None:
        """request_id: the public one. The engine's ids add random bits, for a client may repeat its own."""
        self._engine: EngineClient = state.context.engine
        self._metrics: MetricsRegistry = state.metrics
        self._tokenizer = state.context.tokenizer
        self._body = body
        self._arrival = arrival
        self._engine_id = f"{request_id}-{uuid.uuid4().hex[:8]}"
        self.choices: list[Choice] = []
        self._num_prompt_tokens = 0

    def add(self, prompt: str, token_ids: list[int], params: SamplingParams) -> None:
        """Plan n completions of one prompt; params.max_tokens is resolved. Raises APIError 400."""
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
            )
            try:
                generation = Generation(self._tokenizer, own, token_ids)
            except ValueError as error:
                raise invalid(str(error), "stop") from None
            self.choices.append(Choice(index, prompt, request, generation))

    async def deltas(self) -> AsyncGenerator[list[tuple[Choice, Delta]]]:
        """What came, in batches: all that is there by the time the consumer asks again.

        The last delta of a choice, and only that, has a finish_reason. Closing the generator aborts
        what still runs. Raises APIError when the engine fails one of the choices.
        """
        self._metrics.histograms["request_params_n"].observe(self._body.n or 1)
        batches = self._single(self.choices[0]) if len(self.choices) == 1 else self._merged()
        async with contextlib.aclosing(batches):
            async for batch in batches:
                yield batch
        longest = max(len(choice.generation.token_ids) for choice in self.choices)
        self._metrics.histograms["request_max_num_generation_tokens"].observe(longest)

    def usage(self) -> Usage:
        """Tokens so far."""
        completion = sum(len(choice.generation.token_ids) for choice in self.choices)
        firsts = self.choices[:: self._body.n or 1]
        cached = sum(choice.generation.num_cached_tokens for choice in firsts)
        prompt = self._num_prompt_tokens
        return Usage(prompt, completion, prompt + completion, CachedTokens(cached))

    async def _single(self, choice: Choice) -> AsyncGenerator[list[tuple[Choice, Delta]]]:
        async with contextlib.aclosing(self._complete(choice)) as deltas:
            async for delta in deltas:
                yield [(choice, delta)]

    async def _merged(self) -> AsyncGenerator[list[tuple[Choice, Delta]]]:
        queue: asyncio.Queue[tuple[Choice, Delta | Exception]] = asyncio.Queue()

        async def drive(choice: Choice) -> None:
            try:
                async for delta in self._complete(choice):
                    queue.put_nowait((choice, delta))
            except Exception as error:
                queue.put_nowait((choice, error))

        tasks = [asyncio.create_task(drive(choice)) for choice in self.choices]
        num_unfinished = len(tasks)
        try:
            while num_unfinished:
                arrived = [await queue.get()]
                while not queue.empty():
                    arrived.append(queue.get_nowait())
                batch = []
                for choice, item in arrived:
                    if isinstance(item, Exception):
                        raise item
                    num_unfinished -= item.finish_reason is not None
                    batch.append((choice, item))
                yield batch
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _complete(self, choice: Choice) -> AsyncGenerator[Delta]:
        request, generation = choice.request, choice.generation
        record = RequestRecord(self._metrics, self._arrival, len(request.prompt_token_ids), request.max_tokens)
        end: FinishReason = "abort"  # what it is if the consumer leaves
        try:
            outputs = cast(AsyncGenerator[TokenOutput], self._engine.generate(request))
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if output.new_token_ids:
                        record.tokens(len(output.new_token_ids), output.num_cached_tokens, output.scheduled_time)
                    if output.finish_reason in ("error", "abort"):
                        end = output.finish_reason
                        raise _failure(output)
                    delta = generation.push(output)
                    end = delta.finish_reason or end
                    yield delta
                    if delta.finish_reason is not None:
                        return
            raise internal("the engine ended the request without a reason")
        except EngineDeadError:
            end = "error"
            raise unavailable("the engine stopped before the request was complete") from None
        finally:
            record.finish(end)


def _failure(output: TokenOutput) -> APIError:
    if output.finish_reason == "abort":
        return unavailable("the engine gave the request up")
    logger.warning("request %s failed: %s", output.request_id, output.error)
    return internal(output.error or "the engine failed on this request")
