"""The life of the server and of each piece of work in it: run, drain, end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from octavo.server.limits import ClientGone
from octavo.server.openai.errors import APIError, unavailable

T = TypeVar("T")


class Lifecycle:
    """Owns the tasks that do requests' work.

    draining: no new work is taken; `closing`: running work is being ended too.
    """

    def __init__(self) -> None:
        self.draining = False
        self.closing = False
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    def refusal(self) -> APIError | None:
        """Why new work is not taken, or None."""
        return unavailable("the server is shutting down") if self.draining else None

    async def run(self, receive: Receive, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled as soon as the client goes or the server ends.

        The request's body must have been read: from then on `receive` only tells of a disconnect.
        Raises ClientGone, and APIError 503 when the server ends.
        """
        task = asyncio.create_task(work)
        watcher = asyncio.create_task(_disconnect(receive))
        self._tasks.add(task)
        try:
            await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            if task.cancelled():
                raise unavailable("the server is shutting down")
            return task.result()
        finally:
            watcher.cancel()
            task.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)
            self._tasks.discard(task)

    def end_all(self) -> None:
        """Cancel all running work; each client gets a clean error."""
        self.draining = self.closing = True
        for task in self._tasks:
            task.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
