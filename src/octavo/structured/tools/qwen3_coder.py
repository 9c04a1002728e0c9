"""Qwen3-Coder and Qwen3.5: <function=name> with <parameter=key>value</parameter>, mostly within <tool_call>."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import ClassVar

from octavo.structured.incremental import Markers, Script
from octavo.structured.json_text import JsonReader, string_pieces, valid_json
from octavo.structured.tools.base import NAME_RUN, ToolParser
from octavo.structured.tools.pythonic import literal_as_json

_CALL = "<tool_call>"
_FUNCTION = "<function="
_PARAMETER = "<parameter="
_PARAMETER_END = "</parameter>"
_FUNCTION_END = "</function>"
_CALL_END = "</tool_call>"
_OPENING = Markers(_CALL, _FUNCTION)
_KEY_RUN = re.compile(r"[^<>\n]*")


class _Call:
    """What is known of the call that is being read."""

    def __init__(self) -> None:
        self.properties: Mapping[str, object] | None = None
        self.keys: set[str] = set()
        self.mark = _PARAMETER_END  # the last tag
        self.next_key = ""  # was read along with it
        self.space_after: str | None = None  # the end, where all of that was read

    def may_take(self, key: str) -> bool:
        """Whether a tag of this key could be of the call's next parameter, rather than text."""
        known = self.properties is None or key in self.properties
        return bool(key) and known and key not in self.keys


class Qwen3CoderParser(ToolParser):
    """Values are typed by the function's schema: strings come out as they grow, others when they are complete.
    Where a value is not of its type, it is a string.

    A value whose closing tag was forgotten ends with the next tag. Where the value may be text, that tag may be part of
    it. It is not if it begins a line, or names a parameter that the function has and was not given yet, or is followed
    by what follows the end of a call: the next closing tag, the next call on a line of its own, the output's end."""

    _value_ends: ClassVar[Markers] = Markers(_PARAMETER_END, _PARAMETER, _FUNCTION_END, _CALL_END)

    def _parse(self) -> Script[None]:
        while opening := (yield from self._content_until(_OPENING)):
            if opening != _FUNCTION:
                yield from self._spaces()
                if not (yield from self._accept(_FUNCTION)):
                    self._degrade()
                    continue
            call = _Call()
            complete = yield from self._call(call)
            self._settle(complete)
            if complete and call.space_after is not None:
                self._content(call.space_after)
            elif complete:
                yield from self._skip(_CALL_END)
        self._all_is_read()

    def _call(self, call: _Call) -> Script[bool]:
        name = yield from self._run(NAME_RUN)
        if not (yield from self._accept(">")) or not self._begin(name):
            return False
        properties = (self._functions.get(name) or {}).get("properties")
        call.properties = properties if isinstance(properties, Mapping) else None
        self._arguments("{")
        while (yield from self._parameter_begins(call)):
            key = call.next_key or (yield from self._key())
            if not key:
                return False
            self._arguments(f'{", " if call.keys else ""}"{string_pieces(key)}": ')
            call.keys.add(key)
            yield from self._value(call, (call.properties or {}).get(key))
        if call.mark not in (_FUNCTION_END, _CALL_END):
            return False
        if call.mark == _CALL_END and call.space_after is None:
            call.space_after = ""
        self._arguments("}")
        return True

    def _parameter_begins(self, call: _Call) -> Script[bool]:
        """Whether the next tag is another parameter's; the mark is the tag, "" for none."""
        if call.mark == _PARAMETER_END:
            yield from self._spaces()
            call.mark = yield from self._tag(_PARAMETER, _FUNCTION_END, _CALL_END)
        return call.mark == _PARAMETER

    def _tag(self, *tags: str) -> Script[str]:
        """The tag that is next, consumed; "" for none."""
        for tag in tags:
            if (yield from self._accept(tag)):
                return tag
        return ""

    def _key(self) -> Script[str]:
        """What names a parameter, up to the end of its tag; "" where that does not end."""
        key = yield from self._run(_KEY_RUN)
        return key if (yield from self._accept(">")) else ""

    def _value(self, call: _Call, schema: object) -> Script[None]:
        """One value and the mark that ends it, "" for the output's end. One line break after the opening tag and one
        before the mark are not part of it."""
        call.next_key = ""
        yield from self._accept("\n")
        types = _types(schema)
        if schema is None or types == {"string"}:
            self._arguments('"')
            call.mark = yield from self._until_end(call, _WithoutLastBreak(self._string_text))
            if call.mark:
                self._arguments('"')
            return
        value = _MaybeJson(may_be_text=not types or "string" in types)
        call.mark = yield from self._until_end(call, value)
        if call.mark:
            self._arguments(_typed(value.text.removesuffix("\n"), types))

    def _until_end(self, call: _Call, sink: _WithoutLastBreak | _MaybeJson) -> Script[str]:
        """Pass a value to `sink` up to the tag that ends it, which is returned; "" at the output's end."""
        while mark := (yield from self._until(self._value_ends, sink)):
            text = ""
            if sink.holds_next_tag:
                text = mark
            elif mark != _PARAMETER_END and sink.may_be_text and not sink.begins_line:
                text = yield from self._read_ahead(call, mark)
            if not text:
                return mark
            sink(text)
        return ""

    def _read_ahead(self, call: _Call, mark: str) -> Script[str]:
        """Read on after a tag within a line: "" where it ends the value, else what was read, which is of the value."""
        if mark == _PARAMETER:
            key = yield from self._run(_KEY_RUN)
            closed = yield from self._accept(">")
            call.next_key = key if closed and call.may_take(key) else ""
            return "" if call.next_key else mark + key + ">" * closed
        space = yield from self._spaces()
        read = mark + space
        if mark == _FUNCTION_END and (yield from self._accept(_CALL_END)):
            space = yield from self._spaces()
            read += _CALL_END + space
            is_text = yield from self._is_next(_PARAMETER_END)
        elif "\n" in space and (yield from self._is_next(_CALL, _FUNCTION)):
            is_text = False
        else:
            is_text = bool((yield from self._peek()))
        call.space_after = None if is_text else space
        return read if is_text else ""

    def _string_text(self, text: str) -> None:
        self._arguments(string_pieces(text))


class StrictQwen3CoderParser(Qwen3CoderParser):
    """What was held to a schema forgets no tag (see parameter_tags): one within a line is text."""

    _value_ends = Markers(_PARAMETER_END, _PARAMETER, _FUNCTION_END)

    def _read_ahead(self, call: _Call, mark: str) -> Script[str]:  # noqa: ARG002
        yield from ()
        return mark


class _WithoutLastBreak:
    """A sink of text that holds a line break back until something follows it. begins_line: what comes next does."""

    may_be_text = True
    holds_next_tag = False

    def __init__(self, sink: Callable[[str], None]) -> None:
        self._sink = sink
        self._held = ""

    @property
    def begins_line(self) -> bool:
        return bool(self._held)

    def __call__(self, text: str) -> None:
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if text:
            self._sink(text)


class _MaybeJson:
    """A sink that reads JSON along: a tag within a string of it is text, unless it begins a line, as no text in JSON
    can and as the value's own end does."""

    def __init__(self, may_be_text: bool) -> None:
        """may_be_text: a value that is no JSON may be of its type."""
        self.may_be_text = may_be_text
        self._pieces: list[str] = []
        self._reader = JsonReader()

    def __call__(self, text: str) -> None:
        self._pieces.append(text)
        self._reader.read(text, 0)
        self._reader.take()

    @property
    def begins_line(self) -> bool:
        return bool(self._pieces) and self._pieces[-1].endswith("\n")

    @property
    def holds_next_tag(self) -> bool:
        return self._reader.in_inner_string and not self.begins_line

    @property
    def text(self) -> str:
        return "".join(self._pieces)


def _types(schema: object) -> set[str]:
    """The JSON types that a schema names; empty where it names none. Takes any value for a schema: clients send it."""
    if not isinstance(schema, Mapping):
        return set()
    types = set(_strings(schema.get("type")))
    for word in ("anyOf", "oneOf"):
        for option in _items(schema.get(word)):
            types.update(_strings(option.get("type")) if isinstance(option, Mapping) else ())
    values = _items(schema.get("enum"))
    if not types and values and len(_strings(values)) == len(values):
        return {"string"}
    return types


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _strings(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [item for item in _items(value) if isinstance(item, str)]


def _typed(text: str, types: set[str]) -> str:
    """The JSON text of a value that may be of `types`, of any where there are none."""
    constant = {"true": "true", "false": "false", "null": "null", "none": "null"}.get(text.strip().lower())
    if constant is not None and (not types or ("null" if constant == "null" else "boolean") in types):
        return constant
    value = valid_json(text)
    if value is None and text.strip().startswith(("{", "[", "(")):
        value = literal_as_json(text.strip())
    allowed = (types | {"number"} if "integer" in types else types) - {"string"}
    if value is not None and (not types or _type_of(value) in allowed):
        return value
    return f'"{string_pieces(text)}"'


def _type_of(value: str) -> str:
    """The type of a value that is JSON text."""
    words = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
    return words.get(value[0], "number")
