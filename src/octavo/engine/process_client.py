"""ProcessEngineClient: the EngineClient of an engine in a process of its own, restarted when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from octavo.engine.socket_client import SocketEngineClient
from octavo.engine.supervisor import MAX_DEATHS, RESTART_WINDOW, EngineProcess
from octavo.protocol.messages import Control

_log = logging.getLogger(__name__)

# Told of the engine's life: (address, None) when one has been started, (None, reason) when it has died.
Follower = Callable[[str | None, str | None], None]


class ProcessEngineClient(SocketEngineClient):
    """Spawns the engine, talks to it, and spawns another when it dies.

    When a process dies, every request in it ends with EngineDeadError at once; new ones are refused
    until the next process is ready. After MAX_DEATHS deaths within RESTART_WINDOW seconds it gives up:
    `given_up` is then set, and `dead` stays.
    """

    def __init__(self, command: Sequence[str], options: bytes) -> None:
        super().__init__()
        self._command = command
        self._options = options
        self.given_up = asyncio.Event()
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._followers: list[Follower] = []
        self._closing = False
        self._spawn()

    @property
    def pid(self) -> int:
        """Process id of the engine as it now is."""
        return self._process.pid

    @property
    def address(self) -> str:
        """Where the engine as it now is listens; other front ends may connect there."""
        return self._process.address

    def add_follower(self, follower: Follower) -> None:
        """Tell `follower` of the engine as it now is, and of each death and start to come."""
        self._followers.append(follower)
        follower(self.address, None)

    async def close(self) -> None:
        """See EngineClient.close."""
        self._closing = True
        if self._dead is None:
            self._send(Control(0, "shutdown"))
            await self._process.stop(patience=5.0)
        await self._process.stop(patience=0.0)
        await super().close()

    def _spawn(self) -> None:
        self._process = EngineProcess(self._command, self._options, self._died)
        self.connect(self._process.address)
        for follower in self._followers:
            follower(self._process.address, None)

    def _died(self, how: str) -> None:
        """The process ended: everyone who waits hears it now; then it is started again, or given up."""
        was_ready = self.first_ready.done()
        reason = self.last_words or how
        self.lost(reason)
        for follower in self._followers:
            follower(None, reason)
        if not was_ready:
            self.given_up.set()
        elif not self._closing:
            self._restart()

    def _restart(self) -> None:
        now = asyncio.get_running_loop().time()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < RESTART_WINDOW:
            _log.error("%s; %d deaths in %.0f s: giving up", self._dead, MAX_DEATHS, now - self._deaths[0])
            self.given_up.set()
            return
        _log.error("%s: starting another", self._dead)
        self._spawn()
