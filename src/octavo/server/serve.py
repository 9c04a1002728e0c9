"""Running the application: uvicorn on a bound socket, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from octavo.server.app import build_app
from octavo.server.context import ServerContext
from octavo.server.lifecycle import Lifecycle
from octavo.server.limits import MAX_HEADER_BYTES
from octavo.server.transport import GuardedProtocol, TransportConfig

logger = logging.getLogger("octavo.server")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ERROR_SECONDS = 3  # for the last error frames to be written


async def serve(
    context: ServerContext,
    sock: socket.socket,
    on_ready: Callable[[], None] | None = None,
    on_signal: Callable[[], None] | None = None,
) -> None:
    """Serve on `sock` (from `bind`) until SIGTERM or SIGINT, then return.

    The first signal drains: /health and new requests answer 503, running ones get
    options.drain_timeout seconds. What is left then, or at a second signal, gets a clean error.
    on_ready: called once requests are accepted. on_signal: called at each signal.
    """
    app = build_app(context)
    config = TransportConfig(
        app,
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=int(context.timeouts.keep_alive),
        timeout_graceful_shutdown=_ERROR_SECONDS,
    )
    config.timeouts = context.timeouts
    server = _Server(config, on_ready)
    ending = _Ending(app.state.server.lifecycle, server, context.options.drain_timeout)
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        if on_signal is not None:
            on_signal()
        ending.signal()

    for number in _SIGNALS:
        loop.add_signal_handler(number, signalled)
    try:
        await server.serve(sockets=[sock])
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        ending.cancel()


class _Server(uvicorn.Server):
    """Leaves the signals to us."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready()


class _Ending:
    """Drain on the first signal, end on the second."""

    def __init__(self, lifecycle: Lifecycle, server: uvicorn.Server, drain_timeout: float) -> None:
        self._lifecycle = lifecycle
        self._server = server
        self._drain_timeout = drain_timeout
        self._task: asyncio.Task[None] | None = None

    def signal(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        else:
            self._end()

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _drain(self) -> None:
        self._lifecycle.draining = True
        running = self._lifecycle.num_running
        if running:
            logger.info("draining: %d requests have %.0f s; a second signal ends them", running, self._drain_timeout)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout):
                while self._lifecycle.num_running:
                    await asyncio.sleep(0.05)
        self._end()

    def _end(self) -> None:
        if self._lifecycle.num_running:
            logger.warning("ending %d requests", self._lifecycle.num_running)
        self._lifecycle.end_all()
        self._server.should_exit = True
