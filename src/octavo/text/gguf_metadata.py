"""The key-value part of a GGUF file, read without its tensors (GGUF specification, ggml project, v2 and v3)."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

_STRING, _ARRAY, _BOOL = 8, 9, 7
# Value type -> struct letter, little-endian: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_NESTING = 4


def read_gguf_metadata(path: Path, prefix: str = "") -> dict[str, Any]:
    """The metadata whose keys start with `prefix`: scalars, strings and lists.

    Raises ValueError for a file that is not GGUF, of a version other than 2 or 3, or cut short.
    """
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data).read(prefix)
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable GGUF file: {error}") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self, prefix: str) -> dict[str, Any]:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        version, _num_tensors, num_keys = struct.unpack("<IQQ", self._take(20))
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; supported: 2, 3")
        found = {}
        for _ in range(num_keys):
            key = self._string()
            (kind,) = struct.unpack("<I", self._take(4))
            wanted = key.startswith(prefix)
            value = self._value(kind, wanted, _MAX_NESTING)
            if wanted:
                found[key] = value
        return found

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise ValueError(f"it ends at byte {len(self._data)}, inside its metadata")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _string(self) -> str:
        (size,) = struct.unpack("<Q", self._take(8))
        return self._take(size).decode()

    def _value(self, kind: int, wanted: bool, nesting: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and nesting:
            return self._array(wanted, nesting - 1)
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind} before byte {self._at}")
        letter = "<" + _SCALARS[kind]
        return struct.unpack(letter, self._take(struct.calcsize(letter)))[0]

    def _array(self, wanted: bool, nesting: int) -> list[Any]:
        kind, length = struct.unpack("<IQ", self._take(12))
        if kind not in _SCALARS:
            return [self._value(kind, wanted, nesting) for _ in range(length)]
        raw = self._take(length * struct.calcsize("<" + _SCALARS[kind]))
        return list(struct.unpack(f"<{length}{_SCALARS[kind]}", raw)) if wanted else []
