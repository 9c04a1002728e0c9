"""The header of a GGUF file: its metadata and where its tensors lie (GGUF specification, ggml project, v2 and v3).

The gguf package's reader makes a numpy array of every token of the vocabulary, which takes a second or more.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STRING, _ARRAY = 8, 9
# Value type -> struct letter: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """shape: slowest dimension first, as in torch; type: a ggml type number; offset: in bytes, in the file."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """metadata: scalars, strings and lists of numbers; lists of strings (the vocabulary) are left out."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Raises ValueError naming a file that is not GGUF, of a version other than 2 or 3, or cut short."""
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(data).read(path)
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable GGUF file: {error}") from error


class _Header:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self, path: Path) -> GgufFile:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        self._at = 4
        version, num_tensors, num_keys = self._unpack("IQQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; supported: 2, 3")
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(*self._unpack("I"))
        tensors = {}
        for _ in range(num_tensors):
            name = self._string()
            tensors[name] = self._tensor()
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment={alignment!r} is out of range; allowed: >= 1")
        start = -(-self._at // alignment) * alignment
        placed = {name: GgufTensor(t.shape, t.type, start + t.offset) for name, t in tensors.items()}
        return GgufFile(path, {k: v for k, v in metadata.items() if v is not None}, placed)

    def _unpack(self, letters: str) -> tuple[Any, ...]:
        """Raises struct.error at the end of the file."""
        values = struct.unpack_from("<" + letters, self._data, self._at)
        self._at += struct.calcsize("<" + letters)
        return values

    def _string(self) -> str:
        (size,) = self._unpack("Q")
        self._at += size
        if self._at > len(self._data):
            raise ValueError(f"it ends at byte {len(self._data)}, inside its header")
        return self._data[self._at - size : self._at].decode()

    def _value(self, kind: int) -> Any:
        """A metadata value; None for a list of strings, which is only skipped."""
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, length = self._unpack("IQ")
            if element == _STRING:
                return self._skip_strings(length)
            return list(self._unpack(f"{length}{self._letter(element)}"))
        return self._unpack(self._letter(kind))[0]

    def _letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind} before byte {self._at}")
        return _SCALARS[kind]

    def _skip_strings(self, length: int) -> None:
        size_of, data, at = struct.Struct("<Q").unpack_from, self._data, self._at
        for _ in range(length):
            at += 8 + size_of(data, at)[0]
        self._at = at

    def _tensor(self) -> GgufTensor:
        """Its offset is still relative to the start of the data."""
        (num_dimensions,) = self._unpack("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {num_dimensions} dimensions; allowed: 1..{_MAX_DIMENSIONS}")
        *shape, kind, offset = self._unpack(f"{num_dimensions}QIQ")
        return GgufTensor(tuple(reversed(shape)), kind, offset)
