"""A real server on a real socket over a scripted engine and a tokenizer of single bytes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from octavo.config import ServerOptions
from octavo.engine.client import EngineDeadError, Sink
from octavo.protocol.messages import Outputs, Ready
from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.plan import TokenLogprobs
from octavo.protocol.request import Request
from octavo.server import ServerContext, Timeouts, bind, serve
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer
from octavo.text.tokenizer_files import TokenizerParts

EOS = 256
VOCAB_SIZE = 257
MAX_MODEL_LEN = 512
READY = Ready(max_model_len=MAX_MODEL_LEN, max_num_seqs=8, num_blocks=64, block_size=16, vocab_size=VOCAB_SIZE)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ suffix }}"
)


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; 256 ends an output."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    spelling = {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: spelling[c] for c in alphabet}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(TokenizerParts(backend, None, "<eos>", (EOS,), TEMPLATE))


@dataclass
class Script:
    """What the engine does with one request. `fault` happens in place of the last token."""

    text: bytes = b"hello"
    step: int = 1  # tokens an output
    delay: float = 0.0  # seconds before each output
    gate: asyncio.Event | None = None  # waited for before the first output
    fault: str | None = None  # "die", "error", "refuse", "abort", "mute" (an error without words)


@dataclass
class FakeEngine:
    """EngineClient. `script` chooses what a request gets; `aborted` and `requests` say what happened."""

    script: Callable[[Request], Script] = field(default=lambda _: Script())
    ready: Ready = READY
    stats: SchedulerStats = field(default_factory=SchedulerStats)
    dead: str | None = None
    requests: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    listeners: list[Callable[[Outputs], None]] = field(default_factory=list)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def num_unfinished(self) -> int:
        return len(self.running)

    def add_listener(self, listener: Callable[[Outputs], None]) -> None:
        self.listeners.append(listener)

    def emit(self, stats: SchedulerStats, num_step_tokens: int = 0) -> None:
        self.stats = stats
        for listener in self.listeners:
            listener(Outputs([], stats, num_step_tokens))

    def submit(self, request: Request, sink: Sink) -> None:
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        assert request.request_id not in self.running
        assert request.sampling.n == 1
        assert request.sampling.seed is not None
        assert len(request.prompt_token_ids) + request.max_tokens <= self.ready.max_model_len
        self.requests.append(request)
        self.running.add(request.request_id)
        self.tasks[request.request_id] = asyncio.create_task(self._feed(request, sink))

    def abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.running.discard(request_id)
            self.aborted.append(request_id)
            self.tasks[request_id].cancel()

    async def _feed(self, request: Request, sink: Sink) -> None:
        try:
            async for output in self._outputs(request, self.script(request)):
                if output.finish_reason is not None:
                    self.running.discard(request.request_id)
                sink(output)
        except EngineDeadError as error:
            self.running.discard(request.request_id)
            sink(error)

    async def _outputs(self, request: Request, script: Script) -> AsyncIterator[TokenOutput]:
        if script.gate is not None:
            await script.gate.wait()
        ids = [*script.text, EOS]
        reason, stop = "stop", len(ids)
        for index, token in enumerate(ids):
            if token == EOS and request.sampling.ignore_eos:
                continue
            if index + 1 >= request.max_tokens:
                reason, stop = ("stop" if token == EOS else "length"), index + 1
                break
        for at in range(0, stop, script.step):
            await asyncio.sleep(script.delay)
            self._check_alive()
            piece, last = ids[at : min(at + script.step, stop)], at + script.step >= stop
            if last and script.fault is not None:
                self._fail(script.fault)
                mute = script.fault == "mute"
                reason, words = ("error", None) if mute else (script.fault, "the row failed")
                refused = script.fault == "refuse"
                reason = "error" if refused else reason
                yield TokenOutput(request.request_id, [], finish_reason=reason, error=words, refused=refused)
                return
            yield TokenOutput(
                request.request_id,
                piece,
                self._logprobs(request.sampling.logprobs, piece),
                self._logprobs(request.sampling.prompt_logprobs, request.prompt_token_ids[1:]) if at == 0 else None,
                reason if last else None,
                num_cached_tokens=4,
                embedding=embedding_of(request) if last and request.pooling else None,
            )

    def _check_alive(self) -> None:
        if self.dead is not None:
            raise EngineDeadError(self.dead)

    def _fail(self, fault: str) -> None:
        if fault == "die":
            self.dead = "killed"
            raise EngineDeadError("killed")

    def _logprobs(self, number: int | None, ids: list[int]) -> list[TokenLogprobs] | None:
        """The token itself at -1, then 65, 66, … at -2, -3, … and minus infinity at the end."""
        if number is None:
            return None
        top = [float("-inf") if i == number - 1 else -2.0 - i for i in range(number)]
        return [TokenLogprobs([i, *range(65, 65 + number)], [-1.0, *top], 1) for i in ids]

    async def control(self, name: str) -> dict[str, Any]:
        return {"name": name}

    async def close(self) -> None:
        self.dead = "closed"


def embedding_of(request: Request) -> bytes:
    """Two numbers, of length 1: the angle is the first token's in degrees, or the last one's. Of a score, one: a tenth
    of the number of tokens."""
    ids = request.prompt_token_ids
    if request.pooling is not None and request.pooling.kind == "score":
        return struct.pack("<f", len(ids) / 10)
    angle = math.radians(ids[0] if request.pooling is not None and request.pooling.kind == "mean" else ids[-1])
    return struct.pack("<2f", math.cos(angle), math.sin(angle))


@dataclass
class Rig:
    """A running server and ways to talk to it."""

    engine: FakeEngine
    context: ServerContext
    port: int
    task: asyncio.Task[None]
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A plain connection, closed with the rig."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def close(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def raw(self, data: bytes, timeout: float = 5.0) -> bytes:
        """Send bytes, and read until the server closes."""
        reader, writer = await self.connect()
        writer.write(data)
        try:
            async with asyncio.timeout(timeout):
                return await reader.read()
        finally:
            writer.close()

    async def healthy(self) -> None:
        """A control request gets its proper answer."""
        answer = await self.http.post("/v1/completions", json={"model": "fake", "prompt": "control"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == "hello"

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name with labels, model_name and engine left out."""
        text = (await self.http.get("/metrics")).text
        samples = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[
                    re.sub(r',?(engine="0"|model_name="fake")(?=[,}])', "", name).replace("{,", "{").replace("{}", "")
                ] = float(value)
        return samples


def make_context(engine: FakeEngine, **changes: Any) -> ServerContext:
    """A context for tests; `options` and other fields can be given."""
    tokenizer = byte_tokenizer()
    fields: dict[str, Any] = {
        "engine": engine,
        "tokenizer": tokenizer,
        "chat_template": ChatTemplate.of(tokenizer),
        "served_model_names": ("fake", "org/alias"),
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "options": ServerOptions(max_waiting_requests=8, drain_timeout=5.0, strict=True),
        "version": "1.2.3",
        "timeouts": Timeouts(header=0.5, body_idle=0.5, body=1.0, drain=1.0, keep_alive=5.0, write=0.5),
    }
    return ServerContext(**{**fields, **changes})


@contextlib.asynccontextmanager
async def running(
    engine: FakeEngine | None = None, send_buffer: int | None = None, **changes: Any
) -> AsyncIterator[Rig]:
    """A server for the time of the block. It is ended as in life, by SIGTERM."""
    engine = engine or FakeEngine()
    context = make_context(engine, **changes)
    sock = bind("127.0.0.1", 0)
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = sock.getsockname()[1]
    ready = asyncio.Event()
    task = asyncio.create_task(serve(context, sock, ready.set))
    await ready.wait()
    key = context.options.api_key[0] if context.options.api_key else "none"
    base = f"http://127.0.0.1:{port}"
    # verify=False: nothing here is https, and reading the machine's certificates takes longer than most tests.
    async with (
        httpx.AsyncClient(base_url=base, timeout=10, verify=False) as http,
        openai.DefaultAsyncHttpxClient(verify=False) as inner,
    ):
        client = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=10, http_client=inner)
        rig = Rig(engine, context, port, task, http, client)
        try:
            yield rig
        finally:
            await rig.close()
            if not task.done():
                os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(10):
                await task


async def until(condition: Callable[[], bool], seconds: float = 2.0) -> None:
    """Wait for `condition`, which must hold in time."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
