"""EngineClient: what a front end may ask of an engine, wherever that engine runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from octavo.protocol.messages import Outputs, Ready
from octavo.protocol.outputs import SchedulerStats, TokenOutput
from octavo.protocol.request import Request


class EngineDeadError(RuntimeError):
    """The engine process is gone, or said that it cannot go on. The message says why."""


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

    def generate(self, request: Request) -> AsyncIterator[TokenOutput]:
        """Submit, and yield each TokenOutput up to the one with a finish_reason.

        Closing the iterator early (aclose, or cancelling its task) aborts the request.
        Raises EngineDeadError if the engine is or becomes dead, ValueError for a duplicate id.
        """
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
