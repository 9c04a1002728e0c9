"""Embedder: prompts to embeddings, for the routes that answer with these or with what follows from them."""

from __future__ import annotations

import asyncio
import time
import uuid

import msgspec

from octavo.engine.client import EngineDeadError
from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.pooling import SAMPLING, Pooling, PoolingParams
from octavo.protocol.request import Request
from octavo.server.context import ServerState
from octavo.server.metrics import RequestRecord
from octavo.server.openai.errors import context_too_long, invalid, unavailable
from octavo.server.openai.runner import failure
from octavo.server.openai.schema import Salt


class EmbeddingFields(msgspec.Struct, kw_only=True, frozen=True):
    """What the bodies of all these routes take. pooling: of the prompt's last hidden states, by default the model's."""

    model: str
    pooling: Pooling | None = None
    add_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: Salt | None = None


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embedder:
    """Runs one engine request a prompt."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._engine = state.context.engine

    def fitting(self, ids: list[int], param: str) -> list[int]:
        """The token ids of a prompt that fits. Raises APIError 400 naming `param`: one token is drawn beside it."""
        limit = self._state.context.max_model_len
        if len(ids) >= limit:
            raise context_too_long(f"{param} has {len(ids)} tokens; an embedding takes at most {limit - 1}", param)
        return ids

    async def embed(
        self, prompts: list[list[int]], fields: EmbeddingFields, pooling: PoolingParams, lora: LoRARequest | None
    ) -> list[bytes]:
        """What `pooling` asks of each prompt (protocol.pooling.floats), in order. Where it is cancelled, or one fails,
        the rest is aborted.

        prompts: that are `fitting`. Raises APIError: 400 for the priority, others by the engine.
        """
        self._check_priority(fields)
        self._state.check_alive()
        name, arrival = f"embd-{uuid.uuid4().hex}", time.monotonic()
        waits = []
        try:
            for index, ids in enumerate(prompts):
                request = Request(
                    request_id=f"{name}-{index}",
                    prompt_token_ids=ids,
                    sampling=SAMPLING,
                    max_tokens=1,
                    arrival_time=arrival,
                    priority=fields.priority or 0,
                    cache_salt=fields.cache_salt,
                    pooling=pooling,
                    lora=lora,
                )
                waits.append(_Wait(self._state, request))
                self._engine.submit(request, waits[-1])
            return await asyncio.gather(*(wait.vector for wait in waits))
        except EngineDeadError as error:
            raise unavailable(f"the engine stopped: {error}") from None
        finally:
            for wait in waits:
                if wait.leave():
                    self._engine.abort(wait.request_id)

    def _check_priority(self, fields: EmbeddingFields) -> None:
        if fields.priority and self._state.context.scheduling_policy != "priority":
            raise invalid("priority needs a server that runs with --scheduling-policy priority", "priority")


class _Wait:
    """The engine's sink for one request, and what is waited for."""

    def __init__(self, state: ServerState, request: Request) -> None:
        self.request_id = request.request_id
        self._record = RequestRecord(state.metrics, request.arrival_time, len(request.prompt_token_ids), 1)
        self._open = True  # the record has yet to be finished, which happens exactly once
        self.vector: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # Heard, also where another prompt's failure came first.
        self.vector.add_done_callback(_hear)

    def __call__(self, output: TokenOutput | EngineDeadError) -> None:
        if not self._open:
            return
        self._open = False
        if isinstance(output, EngineDeadError):
            self._record.finish("abort")
            self.vector.set_exception(unavailable("the engine stopped before the request was complete"))
        elif output.embedding is None:
            self._record.finish("abort" if output.finish_reason == "abort" else "error")
            self.vector.set_exception(failure(output))
        else:
            self._record.tokens(1, output.num_cached_tokens, output.scheduled_time)
            self._record.finish("length")
            self.vector.set_result(output.embedding)

    def leave(self) -> bool:
        """Nobody waits any more. True: the engine still works on it."""
        was_open, self._open = self._open, False
        if was_open:
            self._record.finish("abort")
            self.vector.cancel()
        return was_open


def _hear(vector: asyncio.Future[bytes]) -> None:
    if not vector.cancelled():
        vector.exception()
