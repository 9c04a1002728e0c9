"""ProcessEngineClient: the EngineClient of an engine in a process of its own, restarted when it dies."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from octavo.engine.client import EngineDeadError
from octavo.engine.supervisor import MAX_RESTARTS, RESTART_WINDOW, EngineProcess
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
from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.request import Request

_log = logging.getLogger(__name__)

_Queue = asyncio.Queue[TokenOutput | EngineDeadError]


class ProcessEngineClient:
    """Spawns the engine, talks to it, and spawns another when it dies.

    When a process dies, every request in it ends with EngineDeadError at once; new ones are refused
    until the next process is ready. After MAX_RESTARTS deaths within RESTART_WINDOW seconds it gives up:
    `given_up` is then set, and `dead` stays.
    """

    ready: Ready
    stats: SchedulerStats

    def __init__(self, command: Sequence[str], options: bytes) -> None:
        self._command = command
        self._options = options
        self.stats = SchedulerStats()
        self.given_up = asyncio.Event()
        self._dead: str | None = "the engine is starting"
        self._started: asyncio.Future[None] | None = None
        self._queues: dict[str, _Queue] = {}
        self._replies: dict[int, asyncio.Future[ControlReply]] = {}
        self._control_ids = itertools.count(1)
        self._listeners: list[Callable[[Outputs], None]] = []
        self._deaths: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._closing = False
        self._context = zmq.asyncio.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._spawn()

    @property
    def num_unfinished(self) -> int:
        return len(self._queues)

    @property
    def dead(self) -> str | None:
        return self._dead

    @property
    def pid(self) -> int:
        """Process id of the engine as it now is."""
        return self._process.pid

    def add_listener(self, listener: Callable[[Outputs], None]) -> None:
        self._listeners.append(listener)

    async def wait_ready(self) -> None:
        """Wait for the first process to be ready. Raises EngineDeadError if it could not start, saying why."""
        assert self._started is not None
        await asyncio.shield(self._started)

    async def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        """See EngineClient.generate."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        if request.request_id in self._queues:
            raise ValueError(f"request_id={request.request_id!r} is that of an unfinished request")
        queue: _Queue = asyncio.Queue()
        self._queues[request.request_id] = queue
        self._send(AddRequest(request))
        try:
            while True:
                output = await queue.get()
                if isinstance(output, EngineDeadError):
                    raise output
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            # Still here: the caller left before the end, and the engine is to stop working on it.
            if self._queues.pop(request.request_id, None) is not None:
                self._send(AbortRequests([request.request_id]))

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

    async def close(self) -> None:
        """See EngineClient.close."""
        self._closing = True
        if self._dead is None:
            self._send(Control(0, "shutdown"))
            await self._process.stop(patience=5.0)
        await self._process.stop(patience=0.0)
        self._context.term()

    def _spawn(self) -> None:
        self._fatal: str | None = None  # the process's own last words
        self._process = EngineProcess(self._command, self._options, self._died)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 10)  # ms: the child binds some time after this connects
        self._socket.connect(self._process.address)
        self._send(Control(0, "hello"))
        if self._started is None:
            self._started = asyncio.get_running_loop().create_future()
            self._started.add_done_callback(asyncio.Future.exception)  # heard, also where nobody waits for it
        self._reader = asyncio.create_task(self._read(self._socket))

    def _send(self, message: ToEngine) -> None:
        if self._process.exited.is_set():
            return  # what was said to a dead process has no meaning: its requests have ended
        # Through the asyncio socket: a send takes up the edge that also tells of what can be received, and
        # only that socket looks again. It never waits, for there is no limit on what may be unsent.
        self._socket.send(self._encoder.encode(message))

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        while True:
            message = decoder.decode(await socket.recv())
            if isinstance(message, Outputs):
                self._hand_out(message)
            elif isinstance(message, ControlReply):
                future = self._replies.pop(message.control_id, None)
                if future is not None and not future.done():
                    future.set_result(message)
            elif isinstance(message, Ready):
                self.ready = message
                self._dead = None
                assert self._started is not None
                if not self._started.done():
                    self._started.set_result(None)
            else:
                self._fatal = message.message

    def _hand_out(self, message: Outputs) -> None:
        self.stats = message.stats
        for listener in self._listeners:
            listener(message)
        for output in message.outputs:
            queue = self._queues.get(output.request_id)
            if queue is None:
                continue
            if output.finish_reason is not None:
                del self._queues[output.request_id]
            queue.put_nowait(output)

    def _died(self, how: str) -> None:
        """The process ended: everyone who waits hears it now; then it is started again, or given up."""
        self._reader.cancel()
        self._socket.close()
        self._dead = self._fatal or how
        error = EngineDeadError(self._dead)
        for queue in self._queues.values():
            queue.put_nowait(error)
        self._queues.clear()
        for future in self._replies.values():
            if not future.done():
                future.set_exception(error)
        self._replies.clear()
        assert self._started is not None
        if not self._started.done():
            self._started.set_exception(error)
            self.given_up.set()
        elif not self._closing:
            self._restart()

    def _restart(self) -> None:
        now = asyncio.get_running_loop().time()
        self._deaths.append(now)
        if len(self._deaths) == MAX_RESTARTS and now - self._deaths[0] < RESTART_WINDOW:
            _log.error("%s; %d deaths in %.0f s: giving up", self._dead, MAX_RESTARTS, now - self._deaths[0])
            self.given_up.set()
            return
        _log.error("%s: starting another", self._dead)
        self._spawn()
