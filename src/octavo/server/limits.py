"""What one client may cost: time to send a request, its size, and a place in the queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive

from octavo.engine.client import EngineClient
from octavo.server.openai.errors import APIError, invalid, timed_out, too_busy

MAX_HEADER_BYTES = 16 * 1024
MAX_HEADERS = 100


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Seconds. header: to send a whole request head. body_idle: between two pieces of a body.
    body: for all of it. drain: to discard a body that is refused, so that the answer is read before
    the socket closes. keep_alive: between requests. write: without the client reading anything."""

    header: float = 10.0
    body_idle: float = 30.0
    body: float = 300.0
    drain: float = 2.0
    keep_alive: float = 75.0
    write: float = 60.0


async def read_json_body(headers: Headers, receive: Receive, max_bytes: int, timeouts: Timeouts) -> bytes:
    """The request's body, of which never more than `max_bytes` is held.

    Raises APIError 415 (not plain JSON), 413 (too large), 408 (too slow), ClientGone.
    """
    error = _refusal(headers, max_bytes)
    if error is not None:
        # A client that waits for 100-continue has sent nothing yet, and `receive` would invite it to.
        if headers.get("expect", "").lower() != "100-continue":
            await _discard(receive, timeouts)
        raise error
    body = bytearray()
    deadline = asyncio.get_running_loop().time() + timeouts.body
    more = True
    while more:
        wait = min(timeouts.body_idle, deadline - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(wait):
                message = await receive()
        except TimeoutError:
            raise timed_out("the request body did not arrive in time") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message["body"]
        more = message["more_body"]
        if len(body) > max_bytes:
            body.clear()
            if more:
                await _discard(receive, timeouts)
            raise _too_large(max_bytes)
    return bytes(body)


def _refusal(headers: Headers, max_bytes: int) -> APIError | None:
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        return APIError(415, "Content-Type must be application/json", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        return APIError(415, "a request body with a Content-Encoding is not supported", code="unsupported_media_type")
    # h11 has checked that Content-Length, where given, is digits only.
    if int(headers.get("content-length", "0")) > max_bytes:
        return _too_large(max_bytes)
    return None


def _too_large(max_bytes: int) -> APIError:
    message = f"the request body is larger than {max_bytes} bytes"
    return APIError(413, message, code="request_too_large")


async def _discard(receive: Receive, timeouts: Timeouts) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeouts.drain):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message["more_body"]:
                    return


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


class Admission:
    """Counts the sequences that handlers have in hand, so that the engine's queue stays bounded."""

    def __init__(self, engine: EngineClient, max_sequences: int) -> None:
        self._engine = engine
        self.max_sequences = max_sequences
        self._num_held = 0  # written by `hold` only

    @contextlib.contextmanager
    def hold(self, num_sequences: int, param: str) -> Iterator[None]:
        """A place for `num_sequences`. Raises APIError 429 when the queue is full, 400 when no queue could take them.

        Held from before tokenization: sequences on their way to the engine count too.
        """
        if num_sequences > self.max_sequences:
            raise invalid(f"{num_sequences} sequences in one request; at most {self.max_sequences} are allowed", param)
        busy = max(self._num_held, self._engine.num_unfinished)
        if busy + num_sequences > self.max_sequences:
            raise too_busy(f"the server is full: {busy} sequences run or wait; try again shortly")
        self._num_held += num_sequences
        try:
            yield
        finally:
            self._num_held -= num_sequences
