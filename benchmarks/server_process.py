"""A real server in a process of its own, for benchmarks, demos and end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


class ServerProcess:
    """`octavo serve` under way. `base_url` has no /v1; `log` is the file with what it printed."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log = log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "octavo.cli", "serve", *arguments, "--port", str(self.port)],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def wait_ready(self, timeout: float) -> float:
        """Seconds until /health answered 200. Raises RuntimeError with the log if it never did."""
        began = time.monotonic()
        while time.monotonic() - began < timeout and self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{self.base_url}/health", timeout=2).close()
                return time.monotonic() - began
            time.sleep(0.05)
        raise RuntimeError(f"the server is not ready:\n{self.log.read_text()}")

    def metric(self, name: str) -> float:
        """Sum of a metric's samples, as /metrics has them now."""
        with urllib.request.urlopen(f"{self.base_url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " "))]
        if not found:
            raise KeyError(name)
        return sum(found)

    def stop(self, timeout: float = 20.0) -> int:
        """SIGTERM, then SIGKILL; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


@contextlib.contextmanager
def running(arguments: list[str], log: Path, timeout: float = 60.0) -> Iterator[ServerProcess]:
    """A ready server, stopped on the way out."""
    server = ServerProcess(arguments, log)
    try:
        server.wait_ready(timeout)
        yield server
    finally:
        server.stop()
