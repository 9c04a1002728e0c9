"""Stop strings: text passes through until one of them ends; what may be the beginning of one is held back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MAX_STOP_CHARACTERS = 16384


class _State:
    """A prefix of some stop string. `fail` is the longest proper suffix of it that is one too."""

    __slots__ = ("depth", "fail", "match", "next")

    def __init__(self, depth: int) -> None:
        self.depth = depth  # its length
        self.next: dict[str, _State] = {}
        self.fail: _State | None = None  # None only at the root
        self.match: str | None = None  # the longest stop string that it ends with


class StopStrings:
    """Finds the stop string that ends first; of several that end there, the longest. Does not depend on
    how the text is cut into pieces, and takes time linear in it (Aho & Corasick 1975).

    Held back is the longest end of the text that is a proper prefix of a stop string: at most the longest
    stop string less one character.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        """Raises ValueError when the stop strings together are longer than MAX_STOP_CHARACTERS."""
        size = sum(map(len, stops))
        if size > MAX_STOP_CHARACTERS:
            raise ValueError(f"stop has {size} characters in all; at most {MAX_STOP_CHARACTERS} are allowed")
        self._state = _automaton(stops)
        self._include = include_in_output
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, armed: bool = True) -> str:
        """Add text, and return what can be released. After a match, which sets `matched`, that is nothing.

        armed: whether a stop string that ends in `text` counts; one may begin in text that was not armed.
        """
        if self.matched is not None:
            return ""
        state = self._state
        for position, character in enumerate(text, start=1):
            state = _step(state, character)
            if armed and state.match is not None:
                self.matched = state.match
                end = len(self._held) + position - (0 if self._include else len(state.match))
                return (self._held + text)[:end]
        self._state = state
        while not state.next and state.fail is not None:  # a whole stop string, passed over: not a proper prefix
            state = state.fail
        text = self._held + text
        released = len(text) - state.depth
        self._held = text[released:]
        return text[:released]

    def flush(self) -> str:
        """The text still held back, at the end of an output."""
        held, self._held = self._held, ""
        return held if self.matched is None else ""


def _step(state: _State, character: str) -> _State:
    while (found := state.next.get(character)) is None:
        if state.fail is None:
            return state
        state = state.fail
    return found


def _automaton(stops: Sequence[str]) -> _State:
    root = _State(0)
    for stop in stops:
        state = root
        for character in stop:
            state = state.next.setdefault(character, _State(state.depth + 1))
        state.match = stop
    queue = deque([root])  # breadth first: a state's fail is shallower, so it is complete when read
    while queue:
        state = queue.popleft()
        for character, following in state.next.items():
            following.fail = root if state.fail is None else _step(state.fail, character)
            following.match = following.match or following.fail.match
            queue.append(following)
    return root
