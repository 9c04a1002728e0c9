"""SocketEngineClient: the EngineClient of an engine that listens on a unix socket, whoever started it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from octavo.engine.client import EngineDeadError, Sink
from octavo.protocol.messages import (
    AbortRequests,
    AddRequest,
    Control,
    ControlReply,
    FromEngine,
    Outputs,
    Ready,
    ToEngine,
)
from octavo.protocol.outputs import SchedulerStats
from octavo.protocol.request import Request

_log = logging.getLogger(__name__)


class SocketEngineClient:
    """One front end's connection to the engine. Whoever knows of the engine's life calls `connect` and `lost`.

    Between `lost` and the next engine's Ready, `dead` says why and new requests are refused.
    """

    ready: Ready
    stats: SchedulerStats

    def __init__(self) -> None:
        self.stats = SchedulerStats()
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.first_ready.add_done_callback(asyncio.Future.exception)  # heard, also where nobody waits for it
        self.last_words: str | None = None  # the engine's own reason for its end, ahead of its death
        self._dead: str | None = "the engine is starting"
        self._sinks: dict[str, Sink] = {}  # by id of an unfinished request
        self._replies: dict[int, asyncio.Future[ControlReply]] = {}
        self._control_ids = itertools.count(1)
        self._listeners: list[Callable[[Outputs], None]] = []
        self._context = zmq.asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def num_unfinished(self) -> int:
        return len(self._sinks)

    @property
    def dead(self) -> str | None:
        return self._dead

    def add_listener(self, listener: Callable[[Outputs], None]) -> None:
        self._listeners.append(listener)

    async def wait_ready(self) -> None:
        """Wait for the first engine to be ready. Raises EngineDeadError if it could not start, saying why."""
        await asyncio.shield(self.first_ready)

    def submit(self, request: Request, sink: Sink) -> None:
        """See EngineClient.submit."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        if request.request_id in self._sinks:
            raise ValueError(f"request_id={request.request_id!r} is that of an unfinished request")
        self._sinks[request.request_id] = sink
        self._send(AddRequest(request))

    def abort(self, request_id: str) -> None:
        """See EngineClient.abort."""
        if self._sinks.pop(request_id, None) is not None:
            self._send(AbortRequests([request_id]))

    async def control(self, name: str) -> dict[str, Any]:
        """See EngineClient.control. Raises ValueError when the engine refuses."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        control_id = next(self._control_ids)
        future: asyncio.Future[ControlReply] = asyncio.get_running_loop().create_future()
        self._replies[control_id] = future
        self._send(Control(control_id, name))
        reply = await future
        if reply.error is not None:
            raise ValueError(reply.error)
        return reply.value or {}

    def connect(self, address: str) -> None:
        """Talk to the engine at `address`, which may bind some time after this."""
        assert self._socket is None
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 10)  # ms
        self._socket.connect(address)
        self.last_words = None
        self._send(Control(0, "hello"))
        self._reader = asyncio.create_task(self._read(self._socket))

    def lost(self, reason: str) -> None:
        """The engine is dead: everyone who waits hears it now."""
        self._disconnect()
        self._dead = reason
        error = EngineDeadError(reason)
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            _give(sink, error)
        replies, self._replies = self._replies, {}
        for future in replies.values():
            if not future.done():
                future.set_exception(error)
        if not self.first_ready.done():
            self.first_ready.set_exception(error)

    async def close(self) -> None:
        """See EngineClient.close. Only the connection: the engine is somebody else's."""
        self._dead = self._dead or "the connection was closed"
        self._disconnect()
        self._context.term()

    def _disconnect(self) -> None:
        if self._reader is not None and self._socket is not None:
            self._reader.cancel()
            self._socket.close()
            self._reader = self._socket = None

    def _send(self, message: ToEngine) -> None:
        if self._socket is None:
            return  # what was said to a dead engine has no meaning: its requests have ended
        # Through the asyncio socket: a send takes up the edge that also tells of what can be received, and
        # only that socket looks again. It never waits, for there is no limit on what may be unsent.
        self._socket.send(self._encoder.encode(message))

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = self._decoder.decode(await socket.recv())
            if isinstance(message, Outputs):
                self._hand_out(message)
            elif isinstance(message, ControlReply):
                future = self._replies.pop(message.control_id, None)
                if future is not None and not future.done():
                    future.set_result(message)
            elif isinstance(message, Ready):
                self.ready = message
                self._dead = None
                if not self.first_ready.done():
                    self.first_ready.set_result(None)
            else:
                self.last_words = message.message
            # Where messages wait, `recv` does not: without this, nothing else would get a turn between them.
            await asyncio.sleep(0)

    def _hand_out(self, message: Outputs) -> None:
        self.stats = message.stats
        for listener in self._listeners:
            listener(message)
        sinks = self._sinks
        for output in message.outputs:
            # An end takes the sink out first: from then on, aborting that request is nobody's business.
            name = output.request_id
            sink = sinks.get(name) if output.finish_reason is None else sinks.pop(name, None)
            if sink is not None:
                _give(sink, output)


def _give(sink: Sink, what: Any) -> None:
    try:
        sink(what)
    except Exception:
        _log.exception("the sink of a request failed")
