"""EngineClient: what a front end may ask of an engine, wherever that engine runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from octavo.protocol.messages import Outputs, Ready
from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.request import Request


class EngineDeadError(RuntimeError):
    """The engine process is gone, or said that it cannot go on. The message says why."""


# What a request's outputs are given to, on the event loop, as they arrive: each TokenOutput up to the one with a
# finish_reason, or an EngineDeadError as the last. It must not block, and should not raise: that is a bug, and logged.
Sink = Callable[[TokenOutput | EngineDeadError], None]


class EngineClient(Protocol):
    """Requests in, tokens out, on one asyncio loop.

    `ready` and `stats` are plain attributes: the last that the engine said.
    """

    ready: Ready
    stats: SchedulerStats

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted through this client that have not ended."""
        ...

    @property
    def dead(self) -> str | None:
        """Why the engine is gone, or None while it lives."""
        ...

    def submit(self, request: Request, sink: Sink) -> None:
        """Start a request; what comes of it goes to `sink`, which is called from the loop, never from here.

        Calls instead of a queue: at 10,000 tokens a second, waking a task for each is most of the cost.
        Raises EngineDeadError if the engine is dead, ValueError for the id of an unfinished request.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request: its sink hears nothing more. An id that is unknown or finished is ignored."""
        ...

    async def control(self, name: str) -> dict[str, Any]:
        """Ask for "audit" or "reset_prefix_cache" and return the answer. Raises EngineDeadError."""
        ...

    def add_listener(self, listener: Callable[[Outputs], None]) -> None:
        """Call `listener` with every Outputs message, before its tokens are handed out."""
        ...

    async def close(self) -> None:
        """Stop the engine and wait for its process to end."""
        ...
