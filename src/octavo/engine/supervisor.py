"""EngineProcess: one engine process as its parent sees it, from spawn to reaping."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence

# An engine that dies this many times in the window stays down; before that, it is started again.
MAX_DEATHS = 5
RESTART_WINDOW = 600.0  # seconds


class EngineProcess:
    """A child that cannot outlive its parent, whose death the parent hears of at once.

    The child reads its options from the first line of its standard input and takes the end of that
    pipe as its parent's death. `on_exit` is called once, on the event loop, with the exit code in words.
    """

    def __init__(self, command: Sequence[str], options: bytes, on_exit: Callable[[str], None]) -> None:
        self._directory = tempfile.mkdtemp(prefix="octavo-")  # mode 0700: nobody else can connect
        self.address = f"ipc://{self._directory}/engine.sock"
        self._on_exit = on_exit
        # A session of its own: a Ctrl-C at the terminal reaches the parent only, which then drains.
        self._child = subprocess.Popen([*command, self.address], stdin=subprocess.PIPE, start_new_session=True)
        self.pid = self._child.pid
        self.exited = asyncio.Event()
        assert self._child.stdin is not None
        self._child.stdin.write(options + b"\n")
        self._child.stdin.flush()
        self._pidfd = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._child.wait()
        assert self._child.stdin is not None
        self._child.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        self.exited.set()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._on_exit(f"the engine process {how}")

    async def stop(self, patience: float) -> None:
        """Wait `patience` seconds for the process to end by itself, then kill it."""
        try:
            await asyncio.wait_for(self.exited.wait(), patience)
        except TimeoutError:
            self._child.kill()
            await self.exited.wait()
