"""HTTP/1.1 on h11 with the limits that uvicorn leaves open: slow heads, slow readers, error bodies."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable

import h11
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from octavo.server.limits import MAX_HEADER_BYTES, Timeouts
from octavo.server.openai.errors import APIError, timed_out

_READ_BYTES = 16 * 1024


_EXTENSION = "octavo.stream_writer"  # where a request's scope has its StreamWriter


def stream_writer(scope: Scope) -> StreamWriter:
    """The writer for the request of `scope`. Raises KeyError under a server other than GuardedProtocol."""
    writer: StreamWriter = scope["extensions"][_EXTENSION]
    return writer


class StreamWriter:
    """Writes pieces of one answer's body straight to the socket, between ASGI's first and last body messages.

    Only for answers without a content-length. While the client does not keep up, pieces wait here and not in the
    transport, so that its buffer empties, and the write timeout stops, as the client reads.
    """

    def __init__(self, protocol: GuardedProtocol, cycle: RequestResponseCycle) -> None:
        self._transport = protocol.transport
        self._flow = protocol.flow
        self._cycle = cycle
        self._chunked = cycle.scope["http_version"] != "1.0"  # for 1.0, the end of the connection ends the body
        self._waiting: deque[bytes] = deque()

    def write(self, data: bytes) -> None:
        """Send `data`, which is not empty. After a disconnect, nothing happens."""
        piece = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
        if self._flow.write_paused or self._waiting:
            self._waiting.append(piece)
        elif not self._cycle.disconnected:
            self._transport.write(piece)

    def resume(self) -> None:
        """For the protocol: the transport's buffer has room."""
        while self._waiting and not self._flow.write_paused:
            self._transport.write(self._waiting.popleft())

    async def drain(self) -> None:
        """Wait until all is with the transport, or the client is gone."""
        while self._waiting and not self._cycle.disconnected:
            await self._flow.drain()


class TransportConfig(uvicorn.Config):
    """uvicorn's configuration plus our timeouts, which the protocol reads per connection."""

    timeouts: Timeouts = Timeouts()


class GuardedProtocol(H11Protocol):
    """One connection. A request head must arrive within `header` seconds of its first byte (of the
    connection, for the first one), and a client must read something every `write` seconds.

    A head that is longer than MAX_HEADER_BYTES and still not complete is answered 431.
    """

    config: TransportConfig
    _refused = False  # an error was sent in place of an answer: what still comes is discarded
    _head_timer: asyncio.TimerHandle | None = None  # runs only while no request is in progress
    _write_timer: asyncio.TimerHandle | None = None  # runs only while the write buffer is full
    _writer: StreamWriter | None = None  # of the request in progress

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app = self._with_writer
        # asyncio reads up to 256 KiB at once; in chunks of one byte, that would hold the loop for a second.
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        self._watch_head()

    def _with_writer(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        self._writer = StreamWriter(self, self.cycle)
        scope.setdefault("extensions", {})[_EXTENSION] = self._writer
        answer: Awaitable[None] = self.config.loaded_app(scope, receive, send)
        return answer

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _stop(self._head_timer)
        self._write_timer = _stop(self._write_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()

    def _watch_head(self) -> None:
        """One timer at most, for what the connection waits for now."""
        timeouts = self.config.timeouts
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            self._head_timer = _stop(self._head_timer)
        elif self.conn.their_state is h11.SEND_BODY:
            # Answered before its body was read: the rest is discarded for a while, since closing with
            # unread data resets the connection, and the client might never see the answer.
            self._head_timer = self._head_timer or self.loop.call_later(timeouts.drain, self.transport.close)
        elif self.cycle is None or self.conn.trailing_data[0]:
            self._head_timer = self._head_timer or self.loop.call_later(timeouts.header, self._head_late)
        else:
            self._head_timer = _stop(self._head_timer)
            if self.timeout_keep_alive_task is None:  # data_received stopped it
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )

    def _head_late(self) -> None:
        self._head_timer = None
        self._refuse(timed_out("the request did not arrive in time"))

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 (uvicorn's words; ours are more exact)
        # uvicorn calls this from `except h11.RemoteProtocolError`, so the cause is at hand.
        cause = sys.exception()
        status = cause.error_status_hint if isinstance(cause, h11.RemoteProtocolError) else 400
        if status == 431:
            self._refuse(APIError(431, f"the request head is larger than {MAX_HEADER_BYTES} bytes"))
        else:
            self._refuse(APIError(status, "this is not a valid HTTP/1.1 request", code="invalid_http"))

    def _refuse(self, error: APIError) -> None:
        """Answer and close. In the middle of an answer there is no way to say it: just close."""
        self._head_timer = _stop(self._head_timer)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = error.body()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(data=body)):
                self.transport.write(self.conn.send(event) or b"")
            self.conn.send(h11.EndOfMessage())
            self._refused = True
            if self.cycle is not None:
                self.cycle.disconnected = True  # a handler that waits for the rest of a body must not answer too
                self.cycle.message_event.set()
            self.transport.write_eof()
            self._head_timer = self.loop.call_later(self.config.timeouts.drain, self.transport.close)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.config.timeouts.write, self.transport.abort)

    def resume_writing(self) -> None:
        self._write_timer = _stop(self._write_timer)
        super().resume_writing()
        if self._writer is not None:
            self._writer.resume()

    def _unsupported_upgrade_warning(self) -> None:
        """An Upgrade header is ignored, as HTTP allows, and is not worth a log line."""


def _stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
