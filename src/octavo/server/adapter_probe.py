"""Whether an adapter works is found out by a request of one token."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence

from octavo.config import OutputFacts
from octavo.engine.client import EngineClient, EngineDeadError
from octavo.protocol.lora import LoRARequest
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.pooling import SAMPLING, SCORE, PoolingParams
from octavo.protocol.request import Request
from octavo.server.adapters import AdapterModule, AdapterRegistry
from octavo.server.openai.errors import APIError, unavailable
from octavo.server.openai.runner import failure


class AdapterError(Exception):
    """An adapter that the server was to start with cannot be used. The message says why."""


async def serve_modules(
    modules: Sequence[AdapterModule], registry: AdapterRegistry, engine: EngineClient, outputs: OutputFacts
) -> None:
    """Let `registry` serve the modules, each once it has been tried. Raises AdapterError for the first that fails."""
    for module in modules:
        try:
            with registry.loading(module.name, module.path, parent=module.base_model_name) as lora:
                await probe(engine, lora, outputs)
        except APIError as error:
            raise AdapterError(f"lora_modules: {module.name}={module.path}: {error.message}") from None


async def probe(engine: EngineClient, lora: LoRARequest, outputs: OutputFacts) -> None:
    """Load the adapter and compute with it. outputs: what the model is for.

    Raises APIError: 400 in the engine's words where the adapter is at fault, else 500 or 503.
    """
    ended: asyncio.Future[TokenOutput | EngineDeadError] = asyncio.get_running_loop().create_future()

    def hear(output: TokenOutput | EngineDeadError) -> None:
        if not ended.done() and (isinstance(output, EngineDeadError) or output.finish_reason is not None):
            ended.set_result(output)

    request = Request(
        request_id=f"lora-{uuid.uuid4().hex}",
        prompt_token_ids=[0],
        sampling=SAMPLING,
        max_tokens=1,
        arrival_time=time.monotonic(),
        pooling=_pooling(outputs),
        lora=lora,
    )
    try:
        engine.submit(request, hear)
        output = await ended
    except EngineDeadError as error:
        output = error
    finally:
        engine.abort(request.request_id)
    if isinstance(output, EngineDeadError):
        raise unavailable(f"the engine stopped: {output}")
    if output.finish_reason in ("error", "abort"):
        raise failure(output)


def _pooling(outputs: OutputFacts) -> PoolingParams | None:
    """What a model that has no tokens to give is asked for."""
    if outputs.head == "tokens":
        return None
    return SCORE if outputs.head == "scores" else PoolingParams(outputs.pooling)
