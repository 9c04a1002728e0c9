"""The engine's end of the socket: one ROUTER that every front end connects to."""

from __future__ import annotations

import logging

import msgspec
import zmq

from octavo.protocol.messages import FromEngine, ToEngine

_log = logging.getLogger(__name__)

# Messages a front end may leave unread before it counts as gone. One message carries a whole step's outputs.
_MAX_UNREAD_MESSAGES = 50_000


class EngineChannel:
    """msgpack over a unix socket. A message that does not decode is logged and dropped."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, _MAX_UNREAD_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()

    def poll(self, timeout: float | None) -> bool:
        """Whether a message waits, after at most `timeout` seconds (None: as long as it takes)."""
        return bool(self._socket.poll(None if timeout is None else int(timeout * 1000)))

    def receive(self) -> tuple[bytes, ToEngine] | None:
        """The next message with its sender's identity, or None when there is none."""
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                identity, body = parts
                return identity, self._decoder.decode(body)
            except (ValueError, msgspec.MsgspecError) as error:
                _log.warning("dropped a message that does not decode: %s", error)

    def send(self, identity: bytes, message: FromEngine) -> bool:
        """Send without blocking. False when that front end is gone, or no longer reads."""
        try:
            self._socket.send_multipart((identity, self._encoder.encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()
        self._context.term()
