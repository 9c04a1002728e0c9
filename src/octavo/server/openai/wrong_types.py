"""What msgspec says of a body that is not of its struct, as a 400: it names the field, and what may stand there."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, get_type_hints

import msgspec
from msgspec import inspect

from octavo.server.openai.errors import APIError, invalid

_PATH = re.compile(r" - at `\$\.?(.*)`\Z")
_KEY = re.compile(r" - at `key` in `\$\.(.*)`\Z")
_NAMED_FIELD = re.compile(r"(?:unknown|required) field `(.*?)`")
_STEP = re.compile(r"\[(?:\d+|\.\.\.)\]|[^.\[\]]+")
_OWN_PATH = re.compile(r"[\w.]+(?==)")  # of a struct that checks itself: its message begins with it
_ANY_KEY = "[...]"
_MAX_ENTRIES = 1024  # that are looked at, one by one; no map in a body may have more


def wrong_type(message: str, kind: type[msgspec.Struct], body: bytes) -> APIError:
    """msgspec says "what - at `$.path`"; a field that is missing or unknown is named in `what`."""
    message = _KEY.sub(rf" - at `$.\1{_ANY_KEY}`", message)
    where = _PATH.search(message)
    path = where[1] if where else ""
    what = message[: where.start()] if where else message
    named = _NAMED_FIELD.search(what)
    if named is not None:
        path = f"{path}.{named[1]}" if path else named[1]
        if "unknown field" in what:
            return unknown_field(named[1], path, kind.__struct_fields__ if "." not in path else ())
        return invalid(f"missing required field {path!r}{_allowed(kind, path)}", path, "missing_required_parameter")
    if not path:
        return invalid(f"the body must be a JSON object: {what}", code="invalid_type")
    own = _OWN_PATH.match(what)
    if own is not None and f"{own[0]}.".startswith(f"{path}."):
        return invalid(what, own[0])
    is_type = what.startswith("Expected") and " of length " not in what and " matching " not in what
    code = "invalid_type" if is_type else "invalid_value"
    allowed, path = _allowed(kind, path), _with_key(path, kind, body)
    return invalid(f"{path}: {what[:1].lower()}{what[1:]}{allowed}", path, code)


def unknown_field(name: str, path: str, known: tuple[str, ...]) -> APIError:
    near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return invalid(f"unknown field {name[:64]!r}{hint}", path[:128], "unknown_parameter")


def _allowed(kind: type[msgspec.Struct], path: str) -> str:
    """The values that a body's struct names for a path such as messages[0].role, in words; else nothing."""
    types: list[inspect.Type] = [_type_of(kind)]
    for step in _STEP.findall(path):
        types = [inner for each in types for option in _options(each) for inner in _inside(option, step)]
    words = dict.fromkeys(word for each in types for option in _options(each) for word in _words(option))
    return f"; allowed: {', '.join(words)}" if any(word != _AN_OBJECT for word in words) else ""


@functools.cache
def _type_of(kind: type[msgspec.Struct]) -> inspect.Type:
    return inspect.type_info(kind)


def _options(given: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(given, inspect.UnionType):
        for each in given.types:
            yield from _options(each)
    else:
        yield given


def _inside(given: inspect.Type, step: str) -> Iterator[inspect.Type]:
    if isinstance(given, inspect.ListType) and step.startswith("["):
        yield given.item_type
    elif isinstance(given, inspect.StructType):
        if step == given.tag_field:
            yield inspect.LiteralType((given.tag,))
        yield from (field.type for field in given.fields if field.encode_name == step)


_AN_OBJECT = "an object"


def _words(given: inspect.Type) -> Iterator[str]:
    if isinstance(given, inspect.LiteralType):
        for value in given.values:
            yield value if value and isinstance(value, str) else msgspec.json.encode(value).decode()
    elif isinstance(given, inspect.StructType):
        yield _AN_OBJECT


def _with_key(path: str, kind: type[msgspec.Struct], body: bytes) -> str:
    """The path with the key at fault where msgspec has "...": of a field of the body that maps names to values."""
    name = path.removesuffix(_ANY_KEY)
    if name == path or name not in kind.__struct_fields__:
        return path
    hint = get_type_hints(kind, include_extras=True)[name]
    try:
        values = msgspec.json.decode(body, type=dict[str, Any])[name]
    except (msgspec.MsgspecError, RecursionError):  # of a number that is too large, say
        return path
    for key, value in islice(values.items(), _MAX_ENTRIES):
        try:
            msgspec.convert({key: value}, hint)
        except msgspec.ValidationError:
            return f"{name}[{key[:64]!r}]"
    return path
