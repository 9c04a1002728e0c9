"""EngineService: the engine process's main loop, between the socket and the Engine."""

from __future__ import annotations

import logging
import time
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


class EngineService:
    """Serves an Engine to the front ends of a channel until one of them says "shutdown".

    Owns which front end each unfinished request belongs to.
    """

    def __init__(self, engine: Engine, channel: EngineChannel, ready: Ready) -> None:
        self._engine = engine
        self._channel = channel
        self._ready = ready
        self._owners: dict[str, bytes] = {}
        self._front_ends: set[bytes] = set()
        self._running = True

    def run(self) -> None:
        """Drain the inbox, step, send; sleep on the socket when there is nothing to do."""
        while self._running:
            if not self._engine.has_work:
                self._channel.poll(None)
            self._drain()
            if self._engine.has_work:
                self._send(self._engine.step())
        self._engine.shutdown()

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
            refused = TokenOutput(request.request_id, [], finish_reason="error", error=str(error))
            self._send([refused])

    def _send(self, outputs: list[TokenOutput]) -> None:
        """One message to each front end that owns an output; to every one of them when the engine falls idle,
        so that the statistics they hold end up true."""
        by_owner: dict[bytes, list[TokenOutput]] = {}
        if not self._engine.has_work:
            by_owner = {identity: [] for identity in self._front_ends}
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue
            by_owner.setdefault(owner, []).append(output)
            if output.finish_reason is not None:
                del self._owners[output.request_id]
        stats = self._engine.stats()
        for owner, own in by_owner.items():
            if not self._channel.send(owner, Outputs(own, stats, self._engine.num_step_tokens)):
                self._forget(owner)

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
