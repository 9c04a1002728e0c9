"""What the parsers of all tool-call formats share."""

from __future__ import annotations

import re
import secrets
import string
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from octavo.structured.events import ArgumentsText, ContentText, ToolCallBegun, ToolCallBroken
from octavo.structured.incremental import IncrementalParser, Markers, Script

Functions = Mapping[str, Mapping[str, Any] | None]  # name -> JSON schema of the parameters

NAME_RUN = re.compile(r"[A-Za-z0-9_-]*")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME_KEYS = ("name",)
_ARGUMENTS_KEYS = ("arguments", "parameters")
# An object that begins with another key is no call: what it is need not be held back.
_FIRST_KEYS = frozenset((*_NAME_KEYS, *_ARGUMENTS_KEYS, "type", "id"))


def new_call_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


def new_short_call_id() -> str:
    """As Mistral's templates ask for: nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class _Call:
    """A call whose name and arguments may come in either order."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments: list[str] = []  # held until the name is known
        self.complete = False  # the arguments are


class ToolParser(IncrementalParser):
    """Content and calls. Space next to a call is neither; other space comes out when something follows it."""

    def __init__(self, functions: Functions, new_id: Callable[[], str] = new_call_id) -> None:
        """functions: those that may be called."""
        super().__init__()
        self._functions = functions
        self._new_id = new_id
        self._num_calls = 0
        self._begun = False  # a call is open
        self._follows_call = False  # since the last call there was nothing but space
        self._space: list[str] = []  # content, if content follows
        self._space_before = ""  # the open call: content, if the call breaks

    def _content(self, text: str) -> None:
        visible = text.rstrip()
        if visible:
            self._events.append(ContentText("".join(self._space) + visible))
            self._space.clear()
            self._follows_call = False
        if len(visible) < len(text):
            self._space.append(text[len(visible) :])

    def _content_until(self, markers: Markers) -> Script[str]:
        """Content up to a marker, "" for up to the end; the source begins with the marker."""
        marker = yield from self._until(markers, self._content_and_forget)
        self._source = [marker]
        return marker

    def _content_and_forget(self, text: str) -> None:
        self._content(text)
        self._source.clear()

    def _rest(self) -> Script[None]:
        """All that is left is content."""
        while (yield from self._peek()):
            self._content_and_forget(self._read(len(self._text)))
        self._all_is_read()

    def _all_is_read(self) -> None:
        if self._space and not self._follows_call:
            self._events.append(ContentText("".join(self._space)))

    def _is_known(self, name: str) -> bool:
        return name in self._functions

    def _begin(self, name: str, call_id: str | None = None) -> bool:
        """Open a call; False where there is no function that has such a name."""
        if _NAME.fullmatch(name) is None:
            return False
        self._space_before = "".join(self._space)
        self._space.clear()
        self._begun = True
        self._events.append(ToolCallBegun(self._num_calls, call_id or self._new_id(), name))
        return True

    def _arguments(self, text: str) -> None:
        self._events.append(ArgumentsText(self._num_calls, text))

    def _end(self) -> None:
        self._num_calls += 1
        self._begun = False
        self._follows_call = True
        self._source.clear()

    def _degrade(self) -> None:
        """What was read for a call is content."""
        text = "".join(self._source)
        self._source.clear()
        if self._begun:
            self._begun = False
            self._events.append(ToolCallBroken(self._num_calls, self._space_before + text))
            self._num_calls += 1
            self._follows_call = False
        else:
            self._content(text)

    def _settle(self, complete: bool) -> None:
        """End the call, or degrade what was to be one."""
        if complete:
            self._end()
        else:
            self._degrade()

    def _skip(self, *literals: str) -> Script[bool]:
        """Consume one of the literals after space, for what follows a call; space before anything else is content."""
        space = yield from self._spaces()
        if (yield from self._accept(*literals)):
            self._source.clear()
            return True
        self._content(space)
        self._source.clear()
        return False

    def _json_arguments(self, name: str, call_id: str | None = None) -> Script[bool]:
        """A call of `name`, whose arguments come next, as a JSON object; whether all of it is there."""
        yield from self._spaces()
        if (yield from self._peek()) != "{" or not self._begin(name, call_id):
            return False
        return (yield from self._json(self._arguments))

    def _json_call(self) -> Script[bool]:
        """A call as {"name": …, "arguments": {…}}, its brace consumed; whether it has all that makes a call.

        The keys may come in any order, "parameters" may stand for "arguments", and other keys are passed over.
        """
        call = _Call()
        is_first = True
        while True:
            yield from self._spaces()
            key = yield from self._json_string()
            if key is None or (is_first and key not in _FIRST_KEYS):
                break
            is_first = False
            yield from self._spaces()
            if not (yield from self._accept(":")):
                break
            yield from self._spaces()
            if not (yield from self._member(call, key)):
                break
            yield from self._spaces()
            if not (yield from self._accept(",")):
                yield from self._accept("}")
                break
        return call.complete and self._begun

    def _member(self, call: _Call, key: str) -> Script[bool]:
        """The value of one key."""
        if key in _NAME_KEYS and call.name is None:
            call.name = yield from self._json_string()
            return call.name is not None and self._release(call)
        if key not in _ARGUMENTS_KEYS or call.complete:
            return (yield from self._json(_ignore))
        first = yield from self._peek()
        if first == "{":

            def add(text: str) -> None:
                call.arguments.append(text)
                self._release(call)

            call.complete = yield from self._json(add)
            return call.complete
        pieces: list[str] = []
        if not (yield from self._json(pieces.append)):
            return False
        text = "{}" if pieces == ["null"] else _decoded("".join(pieces))
        if text is None or not _is_object(text):
            return False
        call.arguments.append(text)
        call.complete = True
        return self._release(call)

    def _release(self, call: _Call) -> bool:
        """Give out what the call has, once it has a name and arguments; False where it cannot be a call."""
        if call.name is None or not call.arguments:
            return True
        if not self._begun and not (self._is_known(call.name) and self._begin(call.name)):
            return False
        self._arguments("".join(call.arguments))
        call.arguments.clear()
        return True

    def _json_string(self) -> Script[str | None]:
        if (yield from self._peek()) != '"':
            return None
        pieces: list[str] = []
        if not (yield from self._json(pieces.append)):
            return None
        return _decoded("".join(pieces))


def _ignore(text: str) -> None:
    """The sink of what is passed over."""


def _decoded(text: str) -> str | None:
    """The string that a JSON string is; None for other values, and where it holds what is no Unicode text."""
    try:
        return msgspec.json.decode(text, type=str)
    except msgspec.DecodeError:
        return None


def _is_object(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
