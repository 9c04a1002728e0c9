"""GrammarDesk: where requests with a constraint wait until it is compiled, beside the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from octavo.protocol.request import Request

if TYPE_CHECKING:
    from octavo.structured.grammars import Constraint, Grammars

_WAIT_SECONDS = 0.01


class GrammarDesk:
    """Compiles on a thread of its own, so that the sequences that run go on. Its owner is the engine's thread."""

    def __init__(self, open_grammars: Callable[[], Grammars]) -> None:
        """open_grammars: called on that thread once, at `open` or at the first grammar."""
        self._open = open_grammars
        self._grammars: Grammars | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._pending: dict[str, tuple[Request, Future[Constraint]]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._pending)

    def open(self) -> None:
        """Read the tokenizer now, on that thread, unless that was done: the first grammar then need not wait for it."""
        self._pool.submit(self._opened)

    def find(self, request: Request) -> Constraint | None:
        """The constraint of a request whose grammar and marks were compiled before. Raises ValueError for one without
        the grammar that it needs."""
        if request.grammar is None and request.sampling.structured_outputs is not None:
            raise ValueError("structured_outputs came without a grammar: the front end compiles it")
        return None if self._grammars is None else self._grammars.find(request)

    def take(self, request: Request) -> None:
        """Start compiling. The request comes back from `ready`. Raises ValueError for an id that is here already."""
        name = request.request_id
        if name in self._pending:
            raise ValueError(f"request_id={name!r} is in use by an unfinished request")
        self._pending[name] = request, self._pool.submit(self._compile, request)

    def ready(self, *, idle: bool) -> list[tuple[Request, Future[Constraint]]]:
        """Requests whose constraint is compiled, or could not be. idle: wait a little for one."""
        if not self._pending:
            return []
        if idle:
            wait([future for _, future in self._pending.values()], _WAIT_SECONDS, FIRST_COMPLETED)
        names = [name for name, (_, future) in self._pending.items() if future.done()]
        return [self._pending.pop(name) for name in names]

    def drop(self, request_ids: Iterable[str]) -> list[str]:
        """Forget requests that wait here. Returns which of them did."""
        dropped = [name for name in dict.fromkeys(request_ids) if name in self._pending]
        for name in dropped:
            self._pending.pop(name)[1].cancel()
        return dropped

    def shutdown(self) -> None:
        """What is being compiled is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, request: Request) -> Constraint:
        return self._opened().compile(request)

    def _opened(self) -> Grammars:
        if self._grammars is None:
            self._grammars = self._open()
        return self._grammars
