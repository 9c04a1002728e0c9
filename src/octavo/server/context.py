"""What the server is given, and what it keeps while it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from octavo.config import OutputFacts, SchedulingPolicy, ServerOptions
from octavo.engine.client import EngineClient
from octavo.protocol.structured import StructuredOutputsParams
from octavo.server.adapters import AdapterRegistry, ServedModel
from octavo.server.front_ends import FrontEndGroup
from octavo.server.lifecycle import Lifecycle
from octavo.server.limits import Admission, Timeouts
from octavo.server.metrics import MetricsRegistry
from octavo.server.metrics_exchange import MetricsExchange
from octavo.server.openai.errors import model_not_found, unavailable
from octavo.structured.compiler import GrammarCompiler
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

logger = logging.getLogger("octavo.server")

T = TypeVar("T")

_TEXT_THREADS = 2
_TEXT_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """Everything the HTTP server serves with.

    tokenizer: None serves token ids only. chat_template: None refuses chat.
    served_model_names: at least one; answers carry the first.
    generation_defaults: SamplingParams fields by name (protocol.sampling.generation_defaults): they
    stand in where a request names none; max_tokens does so in chats only.
    outputs: what the model is for. max_model_len, max_num_seqs: the engine's, in tokens and sequences.
    group: which of the server's API processes this is; each takes an equal part of the places in the queue.
    adapters: those that requests may name as their model; what is loaded by request is added there.
    """

    engine: EngineClient
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    served_model_names: tuple[str, ...]
    max_model_len: int
    max_num_seqs: int
    options: ServerOptions
    version: str
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    outputs: OutputFacts = field(default_factory=OutputFacts)
    scheduling_policy: SchedulingPolicy = "fcfs"
    timeouts: Timeouts = field(default_factory=Timeouts)
    group: FrontEndGroup = field(default_factory=FrontEndGroup)
    adapters: AdapterRegistry = field(default_factory=AdapterRegistry)

    @property
    def vocab_size(self) -> int:
        """Token ids of the model lie below it; the tokenizer may know fewer."""
        return self.engine.ready.vocab_size


class ServerState:
    """The context plus what changes: admissions, running work, metrics, the thread pool for text."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self.lifecycle = Lifecycle()
        places = context.max_num_seqs + context.options.max_waiting_requests
        self.admission = Admission(context.engine, -(-places // context.group.count))
        ready = context.engine.ready
        cache_config = {"block_size": str(ready.block_size), "num_gpu_blocks": str(ready.num_blocks)}
        name = context.served_model_names[0]
        self.metrics = MetricsRegistry(name, context.max_model_len, cache_config, ready.max_loras)
        self.metrics_exchange = MetricsExchange(self.metrics, context.group)
        self.max_prompt_chars = context.max_model_len * _longest_token(context.tokenizer)
        self._pool = ThreadPoolExecutor(_TEXT_THREADS, "octavo-text")
        self._grammars: GrammarCompiler | None = None
        if context.tokenizer is not None:
            self._grammars = GrammarCompiler(context.tokenizer, context.vocab_size)
        self._grammar_pool = ThreadPoolExecutor(1, "octavo-grammars")
        context.engine.add_listener(self.metrics.on_outputs)

    async def compile(self, params: StructuredOutputsParams) -> str:
        """The text of the grammar that Request.grammar carries. Raises ValueError for one that cannot be used,
        APIError 503 if that is not known within a minute."""
        if self._grammars is None:
            raise ValueError(f"structured_outputs.{params.kind} needs a tokenizer, and this server has none")
        return await self._await_in(self._grammar_pool, self._grammars.compile, params)

    def start_compiler(self) -> None:
        """Make ready for grammars, beside the loop."""
        if self._grammars is not None:
            self._grammar_pool.submit(self._grammars.start)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run text work (tokenizing, rendering) off the loop. Raises APIError 503 if it takes a minute."""
        return await self._await_in(self._pool, function, *args)

    async def _await_in(self, pool: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> T:
        call = asyncio.get_running_loop().run_in_executor(pool, function, *args)
        try:
            async with asyncio.timeout(_TEXT_TIMEOUT_SECONDS):
                return await call
        except TimeoutError:
            logger.error("%s took over %.0f s", function.__name__, _TEXT_TIMEOUT_SECONDS)
            raise unavailable("the prompt could not be prepared in time") from None

    def find_model(self, name: str | None) -> ServedModel:
        """What a request's model stands for; None is the model as it is. Raises APIError 404 for one that is not
        served."""
        names = self.context.served_model_names
        if name is None or name in names:
            return ServedModel(names[0], None)
        adapter = self.context.adapters.find(name)
        if adapter is None:
            raise model_not_found(name)
        return ServedModel(name, adapter.lora)

    def check_alive(self) -> None:
        """Raises APIError 503 when the engine is gone or the server is ending."""
        if self.context.engine.dead is not None:
            raise unavailable("the engine has stopped")
        refusal = self.lifecycle.refusal()
        if refusal is not None:
            raise refusal

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._grammar_pool.shutdown(wait=False, cancel_futures=True)
        if self._grammars is not None:
            self._grammars.close()


def _longest_token(tokenizer: Tokenizer | None) -> int:
    """Bytes of the longest token: no prompt of more characters than that per token can fit the context."""
    if tokenizer is None:
        return 1
    return max(len(tokenizer.token_bytes(token_id) or b"") for token_id in range(tokenizer.vocab_size))
