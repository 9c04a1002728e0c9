"""A batch: the requests of a file through the server's own endpoints, without a socket between."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec
from starlette.types import ASGIApp, Message, Scope

from octavo.engine.client import EngineDeadError
from octavo.server.batch_files import (
    BatchError,
    BatchRequest,
    BatchResponse,
    BatchResult,
    Finished,
    digest,
    read_requests,
)
from octavo.server.context import ServerState
from octavo.server.openai.chat import ChatCompletions
from octavo.server.openai.completions import Completions
from octavo.server.openai.embeddings import Embeddings
from octavo.server.openai.errors import APIError, internal, invalid
from octavo.server.openai.responses import Responses
from octavo.server.openai.scoring import Rerank, Scores

logger = logging.getLogger("octavo.server")

_ATTEMPTS = 3  # of a request whose engine died; the third death of one request is taken for its fault
_BUSY_SECONDS = 0.05
_HEADERS = [(b"content-type", b"application/json")]


class Progress(Protocol):
    """A bar such as tqdm's."""

    def update(self, n: float = 1) -> object: ...


@dataclass(frozen=True, kw_only=True)
class BatchFiles:
    """finished: what `output` holds already (read_finished)."""

    input: Path
    output: Path
    finished: Finished


class Batch:
    """Runs each request once. Results are written as they come, in no order, each line at once and whole.

    given_up: set when the engine is dead for good.
    """

    def __init__(self, state: ServerState, given_up: asyncio.Event) -> None:
        self._state = state
        self._given_up = given_up
        chat = ChatCompletions(state)
        self._endpoints: dict[str, ASGIApp] = {
            "/v1/chat/completions": chat,
            "/v1/completions": Completions(state),
            "/v1/embeddings": Embeddings(state),
            "/v1/rerank": Rerank(state),
            "/v1/responses": Responses(chat),
            "/v1/score": Scores(state),
        }
        # Enough to keep every place of the engine taken, and few enough to hold.
        seats = state.context.max_num_seqs
        self._window = seats + min(seats, 256)

    async def run(self, files: BatchFiles, bar: Progress) -> int:
        """Returns how many lines of the output, old and new, are failures.

        Raises EngineDeadError when the engine stays dead: what is not written then is left for the next run.
        """
        failures = files.finished.num_failed
        places = asyncio.Semaphore(self._window)

        with files.output.open("ab") as output:

            async def answer(name: str, request: BatchRequest) -> None:
                nonlocal failures
                try:
                    result = await self._result(name, request)
                    failures += _write(output, result)
                finally:
                    places.release()
                bar.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for name, request, custom_id in read_requests(
                        files.input, self._state.context.options.max_body_bytes
                    ):
                        if _is_finished(files.finished, name, request):
                            continue
                        if isinstance(request, BatchError):
                            failures += _write(output, BatchResult(name, custom_id, None, request))
                            bar.update()
                            continue
                        await places.acquire()
                        group.create_task(answer(name, request))
            except BaseExceptionGroup as several:
                raise several.exceptions[0] from None
        return failures

    async def _result(self, name: str, request: BatchRequest) -> BatchResult:
        endpoint = self._endpoints.get(request.url)
        if endpoint is None:
            known = ", ".join(self._endpoints)
            error = BatchError("invalid_url", f"url {request.url!r} is not available in a batch; allowed: {known}")
            return BatchResult(name, request.custom_id, None, error)
        body = bytes(request.body)
        status, answer = 400, _STREAM.body()
        if not _streams(body):
            status, answer = await self._post(endpoint, request.url, body, name)
        response = BatchResponse(status, name, msgspec.Raw(answer))
        return BatchResult(name, request.custom_id, response, None)

    async def _post(self, endpoint: ASGIApp, url: str, body: bytes, request_id: str) -> tuple[int, bytes]:
        """Status and body, once the server had room and an engine. Raises EngineDeadError."""
        attempt = 0
        while True:
            status, answer = await _call(endpoint, url, body, request_id)
            if status == 429:
                await asyncio.sleep(_BUSY_SECONDS)
                continue
            attempt += status == 503
            if status != 503 or (attempt == _ATTEMPTS and not self._given_up.is_set()):
                return status, answer
            await self._engine_alive()

    async def _engine_alive(self) -> None:
        while self._state.context.engine.dead is not None:
            if self._given_up.is_set():
                raise EngineDeadError("the engine stays dead; the same command continues where this one stopped")
            await asyncio.sleep(_BUSY_SECONDS)


_STREAM = invalid("stream is not available in a batch; allowed: false", "stream")


class _Streaming(msgspec.Struct):
    stream: msgspec.Raw = msgspec.Raw(b"false")


def _streams(body: bytes) -> bool:
    """Whether a body asks for a stream. One that is no object does not, and the endpoint says what is wrong."""
    try:
        return bytes(msgspec.json.decode(body, type=_Streaming).stream) == b"true"
    except (msgspec.DecodeError, RecursionError):
        return False


def _is_finished(finished: Finished, name: str, request: BatchRequest | BatchError) -> bool:
    if name in finished.refused:
        return True
    return isinstance(request, BatchRequest) and digest(request.custom_id) in finished.custom_ids


def _write(output: BinaryIO, result: BatchResult) -> bool:
    """Returns whether the result is a failure."""
    output.write(msgspec.json.encode(result) + b"\n")
    output.flush()
    return result.failed


async def _call(endpoint: ASGIApp, url: str, body: bytes, request_id: str) -> tuple[int, bytes]:
    """One POST as ASGI has it, by a client that sends all at once and never leaves."""
    scope: Scope = {"type": "http", "method": "POST", "path": url, "headers": _HEADERS, "extensions": {}}
    scope["state"] = {"request_id": request_id}
    status, answer = 0, bytearray()

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b""))

    try:
        await endpoint(scope, _receiver(body), send)
    except APIError as error:
        return error.status, error.body()
    except Exception:
        logger.exception("request %s failed", request_id)
        failure = internal("internal server error")
        return failure.status, failure.body()
    return status, bytes(answer)


def _receiver(body: bytes) -> Callable[[], Awaitable[Message]]:
    waiting = [body]

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never  # there is no disconnect

    return receive
