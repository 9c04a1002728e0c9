"""EngineService: the engine process's main loop, between the socket and the Engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from octavo.engine.channel import EngineChannel
from octavo.engine.engine import Engine
from octavo.protocol.messages import (
    AbortRequests,
    AddRequest,
    Control,
    ControlReply,
    Fatal,
    FromEngine,
    Outputs,
    Ready,
)
from octavo.protocol.outputs import TokenOutput

_log = logging.getLogger(__name__)

# Statistics cost O(running) to take. While the engine works, they are taken and told to all this often.
_STATS_SECONDS = 0.1
_QUIET_SECONDS = 1.0


class EngineService:
    """Serves an Engine to the front ends of a channel until one of them says "shutdown".

    Owns which front end each unfinished request belongs to.
    """

    def __init__(
        self,
        engine: Engine,
        channel: EngineChannel,
        ready: Ready,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._channel = channel
        self._ready = ready
        self._clock = clock
        self._owners: dict[str, bytes] = {}
        self._front_ends: set[bytes] = set()
        self._stats = engine.stats()  # as last told; written by `_send`
        self._stats_due = 0.0  # when they are told again, seconds of `clock`
        self._running = True

    def run(self) -> None:
        """Prepare all that makes steps faster. Then drain the inbox, step, send; with nothing to do, wait for one.

        A front end is not answered before: what is left to prepare would be prepared while a request waits.
        """
        while self._engine.warm_up():
            pass
        while self._running:
            if self._engine.has_work:
                self._gather()
            else:
                self._wait()
            self._drain()
            if self._engine.has_work:
                outputs = self._engine.step()
                self._send(outputs, self._engine.num_step_tokens)
        self._engine.shutdown()

    def _wait(self) -> None:
        """Until a message is there. What grammars need is read when nobody has come for a while: it takes a core for a
        second."""
        if not self._channel.poll(_QUIET_SECONDS):
            self._engine.open_grammars()
            self._channel.poll(None)

    def _gather(self) -> None:
        """Let messages come in for as long as the next step can wait for them."""
        while (seconds := self._engine.spare_seconds()) and self._channel.poll(seconds):
            self._drain()

    def _drain(self) -> None:
        while (received := self._channel.receive()) is not None:
            identity, message = received
            if isinstance(message, AddRequest):
                self._add(identity, message)
            elif isinstance(message, AbortRequests):
                ids = [i for i in message.request_ids if self._owners.get(i) == identity]
                self._send(self._engine.abort(ids))
            else:
                self._front_ends.add(identity)
                self._channel.send(identity, self._answer(message))

    def _add(self, identity: bytes, message: AddRequest) -> None:
        request = message.request
        if request.request_id in self._owners:
            _log.warning("dropped a second request with the id of an unfinished one: %s", request.request_id)
            return
        self._owners[request.request_id] = identity
        try:
            self._engine.add(request)
        except ValueError as error:
            refused = TokenOutput(request.request_id, [], finish_reason="error", error=str(error), refused=True)
            self._send([refused])

    def _send(self, outputs: list[TokenOutput], num_step_tokens: int = 0) -> None:
        """One message to each front end that owns an output. Fresh statistics go to every one of them: now and
        then, and when the engine falls idle, so that those they hold end up true.

        num_step_tokens: the size of the step that brought the outputs, if one did. It is told to one front end
        only: what they count is summed.
        """
        by_owner: dict[bytes, list[TokenOutput]] = {}
        now = self._clock()
        if now >= self._stats_due or not self._engine.has_work:
            self._stats, self._stats_due = self._engine.stats(), now + _STATS_SECONDS
            by_owner = {identity: [] for identity in self._front_ends}
        owners = self._owners
        for output in outputs:
            name = output.request_id
            owner = owners.get(name) if output.finish_reason is None else owners.pop(name, None)
            if owner is None:
                continue
            own = by_owner.get(owner)
            if own is None:
                own = by_owner[owner] = []
            own.append(output)
        for owner, own in by_owner.items():
            if not self._channel.send(owner, Outputs(own, self._stats, num_step_tokens)):
                self._forget(owner)
            num_step_tokens = 0

    def _forget(self, owner: bytes) -> None:
        """A front end that is gone leaves nothing running."""
        self._front_ends.discard(owner)
        ids = [i for i, identity in self._owners.items() if identity == owner]
        for request_id in ids:
            del self._owners[request_id]
        self._engine.abort(ids)
        _log.warning("a front end is gone: aborted its %d requests", len(ids))

    def _answer(self, message: Control) -> FromEngine:
        if message.name == "hello":
            return self._ready
        value: dict[str, Any] = {}
        try:
            if message.name == "audit":
                self._engine.audit()
            elif message.name == "reset_prefix_cache":
                value["reset"] = self._engine.reset_prefix_cache()
            elif message.name == "shutdown":
                self._running = False
            elif message.name != "stats":
                return ControlReply(message.control_id, error=f"unknown control {message.name!r}")
        except Exception as error:
            return ControlReply(message.control_id, error=str(error))
        stats = self._engine.stats()
        value["stats"] = {name: getattr(stats, name) for name in stats.__struct_fields__}
        return ControlReply(message.control_id, value)


def refuse_all(channel: EngineChannel, reason: str, timeout: float) -> None:
    """Tell whoever asks within `timeout` seconds that the engine could not start, and why."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0 and channel.poll(left):
        received = channel.receive()
        if received is not None:
            channel.send(received[0], Fatal(reason))
            return
