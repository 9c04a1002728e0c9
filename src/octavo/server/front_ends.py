"""Several API processes on one port: what they share, and the first one's view of the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

logger = logging.getLogger("octavo.server")

_READY = b"ready\n"


@dataclass(frozen=True, kw_only=True)
class FrontEndGroup:
    """The place of one API process among those of its server. directory: for their sockets to each other."""

    index: int = 0
    count: int = 1
    directory: str | None = None


class EngineNews(msgspec.Struct, frozen=True):
    """What the first API process tells the others, one line of JSON each: the engine listens at `address`, or it
    is dead for `reason`."""

    address: str | None = None
    reason: str | None = None


class FrontEnds:
    """The API processes besides the first: spawned by it, told of the engine by it, and ended with it.

    Each gets its options on the first line of standard input, the end of which is its parent's death; a listening
    socket; and a socket for EngineNews, on which it says once that it serves. `lost` is set when one ends unbidden.
    The server should end then: that one's counters are gone, and a restart of the whole is clean.
    """

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="octavo-api-")  # mode 0700
        self.lost = asyncio.Event()
        self._children: list[_Child] = []
        self._ending = False  # written by `signal` only

    def spawn(self, command: Sequence[str], options: bytes, listener: socket.socket) -> None:
        """Start one with `listener`, which is closed here."""
        self._children.append(_Child(command, options, listener, self._ended))

    def tell(self, address: str | None, reason: str | None) -> None:
        """Pass news of the engine on. See EngineNews."""
        line = msgspec.json.encode(EngineNews(address, reason)) + b"\n"
        for child in self._children:
            with contextlib.suppress(OSError):  # it is gone, or does not read: its end is heard elsewhere
                child.control.send(line)

    async def wait_ready(self) -> None:
        """Wait until all serve, or have ended."""
        await asyncio.gather(*(child.ready.wait() for child in self._children))

    def signal(self) -> None:
        """SIGTERM to all: the first drains, the second ends, as with a single process."""
        self._ending = True
        for child in self._children:
            if not child.exited.is_set():
                child.process.send_signal(signal.SIGTERM)

    async def close(self, patience: float) -> None:
        """Drain, unless a signal was passed on before; wait `patience` seconds for all to end, then kill the rest."""
        if not self._ending:
            self.signal()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await asyncio.gather(*(child.exited.wait() for child in self._children))
        for child in self._children:
            if not child.exited.is_set():
                child.process.kill()
                await child.exited.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _ended(self, child: _Child) -> None:
        if not self._ending:
            logger.error("API process %d ended with code %s", child.process.pid, child.process.returncode)
            self.lost.set()


class _Child:
    def __init__(
        self, command: Sequence[str], options: bytes, listener: socket.socket, on_exit: Callable[[_Child], None]
    ) -> None:
        self.control, theirs = socket.socketpair()
        self.control.setblocking(False)
        self.ready, self.exited = asyncio.Event(), asyncio.Event()
        self._on_exit = on_exit
        fds = (listener.fileno(), theirs.fileno())
        # A session of its own: a Ctrl-C at the terminal reaches the parent only, which passes it on once.
        self.process = subprocess.Popen(
            [*command, *map(str, fds)], stdin=subprocess.PIPE, pass_fds=fds, start_new_session=True
        )
        theirs.close()
        # Were it open here too, the kernel would go on giving it connections after the child's end.
        listener.close()
        assert self.process.stdin is not None
        self.process.stdin.write(options + b"\n")
        self.process.stdin.flush()
        self._pidfd = os.pidfd_open(self.process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, self._reap)
        loop.add_reader(self.control.fileno(), self._hear)

    def _hear(self) -> None:
        """It serves, or it has ended."""
        asyncio.get_running_loop().remove_reader(self.control.fileno())
        self.ready.set()

    def _reap(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        loop.remove_reader(self.control.fileno())
        self.control.close()
        self.ready.set()
        self.exited.set()
        self._on_exit(self)


async def follow(control: socket.socket, on_news: Callable[[EngineNews], None]) -> None:
    """In an API process besides the first: hear of the engine, until the first process closes the socket."""
    reader, writer = await asyncio.open_connection(sock=control)
    try:
        while line := await reader.readline():
            on_news(msgspec.json.decode(line, type=EngineNews))
    finally:
        writer.close()


def announce(control: socket.socket) -> None:
    """In an API process besides the first: say that it serves."""
    control.send(_READY)
