"""Reading JSON (RFC 8259) as text that comes in pieces, without building values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR_RUN = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_SPACE = re.compile(r"[ \t\n\r]+")
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonReader:
    """One value. What `take` gives is always the beginning of valid JSON: a scalar is given out when it is complete,
    and control characters inside strings, which models like to leave bare, are given out escaped."""

    def __init__(self) -> None:
        self.done = False  # the value is complete
        self.failed = False  # no continuation makes it one
        self._mode: Callable[[str, int], int] = self._structure
        self._closers: list[str] = []  # of the objects and arrays that are open
        self._expected = "value"  # or "value or end", "key", "key or end", "colon", "comma or end"
        self._pending = ""  # a scalar or an escape that is not complete
        self._out: list[str] = []

    @property
    def ended(self) -> bool:
        return self.done or self.failed

    @property
    def in_inner_string(self) -> bool:
        """Whether what comes next belongs to a string within an object or an array."""
        return bool(self._closers) and not self.failed and self._mode in (self._string, self._escape)

    def read(self, text: str, at: int) -> int:
        """Read on from text[at:]. Returns the position after the value, of the wrong character, or of the end."""
        while at < len(text) and not self.ended:
            at = self._mode(text, at)
        return at

    def take(self) -> str:
        """What was read since the last time."""
        text = "".join(self._out)
        self._out.clear()
        return text

    def _structure(self, text: str, at: int) -> int:
        character = text[at]
        space = _SPACE.match(text, at)
        if space is not None:
            self._out.append(space[0])
            return space.end()
        if character == '"' and self._expected.startswith(("value", "key")):
            self._mode = self._string
        elif character in "{[" and self._expected.startswith("value"):
            self._closers.append("}" if character == "{" else "]")
            self._expected = "key or end" if character == "{" else "value or end"
        elif character == ":" and self._expected == "colon":
            self._expected = "value"
        elif character == "," and self._expected == "comma or end":
            self._expected = "key" if self._closers[-1] == "}" else "value"
        elif self._expected.endswith("or end") and character == self._closers[-1]:
            self._closers.pop()
            self._value_is_complete()
        elif self._expected.startswith("value") and (character.isalnum() or character == "-"):
            self._mode = self._scalar
            return at
        else:
            self.failed = True
            return at
        self._out.append(character)
        return at + 1

    def _string(self, text: str, at: int) -> int:
        plain = _PLAIN.match(text, at)
        if plain is not None:
            self._out.append(plain[0])
            return plain.end()
        character = text[at]
        if character == '"':
            self._out.append(character)
            self._mode = self._structure
            if self._expected.startswith("key"):
                self._expected = "colon"
            else:
                self._value_is_complete()
        elif character == "\\":
            self._pending, self._mode = character, self._escape
        else:
            self._out.append(json.dumps(character)[1:-1])
        return at + 1

    def _escape(self, text: str, at: int) -> int:
        character = text[at]
        starts = len(self._pending) == 1
        if character not in ('"\\/bfnrtu' if starts else _HEX):
            self.failed = True
            return at
        self._pending += character
        if (starts and character != "u") or len(self._pending) == len("\\u0000"):
            self._out.append(self._pending)
            self._pending, self._mode = "", self._string
        return at + 1

    def _scalar(self, text: str, at: int) -> int:
        run = _SCALAR_RUN.match(text, at)
        assert run is not None
        self._pending += run[0]
        if run.end() < len(text):
            if _SCALAR.fullmatch(self._pending) is None:
                self.failed = True
            else:
                self._out.append(self._pending)
                self._pending, self._mode = "", self._structure
                self._value_is_complete()
        return run.end()

    def _value_is_complete(self) -> None:
        self._expected = "comma or end"
        self.done = not self._closers


def valid_json(text: str) -> str | None:
    """`text`, which holds one JSON value between spaces, with bare control characters escaped; None where it does
    not."""
    reader = JsonReader()
    padded = text.strip() + "\n"  # a number ends with what follows it
    end = reader.read(padded, 0)
    return reader.take().rstrip("\n") if reader.done and end >= len(padded) - 1 else None


def string_pieces(text: str) -> str:
    """`text` as it stands inside a JSON string, without the quotes: the encoding of a whole is that of its parts."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def json_of(value: object) -> str:
    """`value` as JSON text that is valid UTF-8. Raises ValueError and TypeError where there is none."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(value, allow_nan=False)
    return text
