"""Parsers written as one story: a generator that reads on, and waits inside where the text has not come yet."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import TypeVar

from octavo.structured.events import Event
from octavo.structured.json_text import JsonReader

T = TypeVar("T")
Script = Generator[None, None, T]  # each yield waits for more text; the return value is what was read

_SPACES = re.compile(r"\s*")


class Markers:
    """Strings to look for. None may lie within another or overlap its beginning from the left."""

    def __init__(self, *markers: str) -> None:
        self.all = markers
        self.pattern = re.compile("|".join(map(re.escape, markers)))
        self._longest = max(map(len, markers))

    def num_held(self, text: str, at: int) -> int:
        """Characters at the end of text[at:] that may be the beginning of a marker."""
        for size in range(min(self._longest - 1, len(text) - at), 0, -1):
            if any(marker.startswith(text[-size:]) for marker in self.all):
                return size
        return 0


class IncrementalParser(ABC):
    """OutputParser over the generator `_parse`. Time is linear in the text."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # what comes before it in _text has been read
        self._ended = False
        self._events: list[Event] = []
        self._source: list[str] = []  # all that was read since it was last cleared
        self._script = self._parse()

    @abstractmethod
    def _parse(self) -> Script[None]:
        """Read everything; return when _ended and nothing is left."""

    def feed(self, text: str) -> list[Event]:
        """See OutputParser."""
        self._text = self._text[self._at :] + text
        self._at = 0
        return self._advance()

    def finish(self) -> list[Event]:
        """See OutputParser."""
        self._ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        next(self._script, None)
        events, self._events = self._events, []
        return events

    def _read(self, end: int) -> str:
        """Consume up to position `end`."""
        text = self._text[self._at : end]
        self._at = end
        self._source.append(text)
        return text

    def _more(self) -> Script[bool]:
        """Wait for text beyond what is there. False: there will be none."""
        size = len(self._text) - self._at
        while not self._ended:
            yield
            if len(self._text) - self._at > size:
                return True
        return False

    def _peek(self) -> Script[str]:
        """The next character, "" at the end."""
        if self._at == len(self._text):
            yield from self._more()
        return self._text[self._at : self._at + 1]

    def _run(self, pattern: re.Pattern[str]) -> Script[str]:
        """The longest run of the characters that `pattern` (such as [a-z]*) matches."""
        pieces = []
        while True:
            match = pattern.match(self._text, self._at)
            assert match is not None
            pieces.append(self._read(match.end()))
            if self._at < len(self._text) or not (yield from self._more()):
                return "".join(pieces)

    def _spaces(self) -> Script[str]:
        return (yield from self._run(_SPACES))

    def _accept(self, *literals: str) -> Script[bool]:
        """Consume one of the literals, where it is next."""
        while True:
            for literal in literals:
                if self._text.startswith(literal, self._at):
                    self._read(self._at + len(literal))
                    return True
            rest = self._text[self._at : self._at + max(map(len, literals))]
            if not any(literal.startswith(rest) for literal in literals) or not (yield from self._more()):
                return False

    def _until(self, markers: Markers, sink: Callable[[str], None]) -> Script[str]:
        """Pass text to `sink` up to a marker, which is consumed and returned; "" at the end."""
        while True:
            match = markers.pattern.search(self._text, self._at)
            if match is not None:
                if match.start() > self._at:
                    sink(self._read(match.start()))
                return self._read(match.end())
            held = 0 if self._ended else markers.num_held(self._text, self._at)
            if len(self._text) - held > self._at:
                sink(self._read(len(self._text) - held))
            if not (yield from self._more()):
                if self._at < len(self._text):
                    sink(self._read(len(self._text)))
                return ""

    def _json(self, sink: Callable[[str], None]) -> Script[bool]:
        """Pass one JSON value to `sink`; whether it was one. A bad one ends before the character that is wrong."""
        reader = JsonReader()
        while True:
            self._read(reader.read(self._text, self._at))
            text = reader.take()
            if text:
                sink(text)
            if reader.ended:
                return reader.done
            if not (yield from self._more()):
                return False
