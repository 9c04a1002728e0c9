"""Qwen3-Coder and Qwen3.5: <function=name> with <parameter=key>value</parameter>, mostly within <tool_call>."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from octavo.structured.incremental import Markers, Script
from octavo.structured.json_text import JsonReader, string_pieces, valid_json
from octavo.structured.tools.base import NAME_RUN, ToolParser
from octavo.structured.tools.pythonic import literal_as_json

_FUNCTION = "<function="
_PARAMETER = "<parameter="
_FUNCTION_END = "</function>"
_CALL_END = "</tool_call>"
_OPENING = Markers("<tool_call>", _FUNCTION)
# A value ends with its tag, or with the next tag on a line of its own where the model forgot it.
_PARAMETER_END = "</parameter>"
_VALUE_END = Markers(_PARAMETER_END, f"\n{_PARAMETER}", f"\n{_FUNCTION_END}", f"\n{_CALL_END}")
_KEY_RUN = re.compile(r"[^<>\n]*")


class Qwen3CoderParser(ToolParser):
    """Values are typed by the function's schema: strings come out as they grow, others when they are complete.
    Where a value is not of its type, it is a string."""

    def _parse(self) -> Script[None]:
        while opening := (yield from self._content_until(_OPENING)):
            if opening != _FUNCTION:
                yield from self._spaces()
                if not (yield from self._accept(_FUNCTION)):
                    self._degrade()
                    continue
            complete = yield from self._call()
            self._settle(complete)
            if complete:
                yield from self._skip(_CALL_END)
        self._all_is_read()

    def _call(self) -> Script[bool]:
        name = yield from self._run(NAME_RUN)
        if not (yield from self._accept(">")) or not self._begin(name):
            return False
        properties = (self._functions.get(name) or {}).get("properties")
        self._arguments("{")
        is_first = True
        ended_by = ""
        while True:
            if not ended_by:
                yield from self._spaces()
            if ended_by.endswith((_FUNCTION_END, _CALL_END)) or (yield from self._accept(_FUNCTION_END, _CALL_END)):
                break
            if not ended_by.endswith(_PARAMETER) and not (yield from self._accept(_PARAMETER)):
                return False
            key = yield from self._run(_KEY_RUN)
            if not key or not (yield from self._accept(">")):
                return False
            self._arguments(f'{"" if is_first else ", "}"{string_pieces(key)}": ')
            is_first = False
            wanted = properties.get(key) if isinstance(properties, Mapping) else None
            ended_by = yield from self._value(wanted)
            if not ended_by:
                return False
            ended_by = ended_by.removeprefix(_PARAMETER_END)
        self._arguments("}")
        return True

    def _value(self, schema: object) -> Script[str]:
        """One value; returns the tag that ends it. One line break after the opening tag and one before the end are
        not part of it."""
        yield from self._accept("\n")
        if schema is None or _types(schema) == {"string"}:
            self._arguments('"')
            end = yield from self._until(_VALUE_END, _WithoutLastBreak(self._string_text))
            if end:
                self._arguments('"')
            return end
        value = _MaybeJson()
        while (end := (yield from self._until(_VALUE_END, value))) == _PARAMETER_END and value.holds_next_tag:
            value(end)
        if end:
            self._arguments(_typed(value.text.removesuffix("\n"), _types(schema)))
        return end

    def _string_text(self, text: str) -> None:
        self._arguments(string_pieces(text))


class _WithoutLastBreak:
    """A sink that holds a line break back until something follows it."""

    def __init__(self, sink: Callable[[str], None]) -> None:
        self._sink = sink
        self._held = ""

    def __call__(self, text: str) -> None:
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        text = text.removesuffix("\n")
        if text:
            self._sink(text)


class _MaybeJson:
    """A sink that reads JSON along: a tag within a string of it is text, unless it begins a line, as no text in JSON
    can and as the value's own end does."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._reader = JsonReader()

    def __call__(self, text: str) -> None:
        self._pieces.append(text)
        self._reader.read(text, 0)
        self._reader.take()

    @property
    def holds_next_tag(self) -> bool:
        return self._reader.in_inner_string and not self._pieces[-1].endswith("\n")

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
