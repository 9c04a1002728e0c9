"""What the checker process and its parent say to each other: msgpack, each message behind its length."""

from __future__ import annotations

import struct
from typing import BinaryIO

import msgspec

_LENGTH = struct.Struct("<I")


class Verdict(msgspec.Struct, frozen=True):
    """The grammar's text, or why there is none. Neither: the checker is ready."""

    grammar: str | None = None
    error: str | None = None


def read_frame(source: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream."""
    header = source.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(header)
    body = source.read(size)
    return body if len(body) == size else None


def write_frame(target: BinaryIO, message: msgspec.Struct) -> None:
    body = msgspec.msgpack.encode(message)
    target.write(_LENGTH.pack(len(body)) + body)
    target.flush()
