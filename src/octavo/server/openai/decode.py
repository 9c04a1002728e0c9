"""From bytes to a typed body, or to a 400 that names the field at fault."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec

from octavo.server.openai.errors import APIError, invalid, unsupported
from octavo.server.openai.schema import UNSUPPORTED

Body = TypeVar("Body", bound=msgspec.Struct)

_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_MARKER = b"\\ue0f8\\uf8e0"
_PATH = re.compile(r" - at `\$\.?(.*)`\Z")
_NAMED_FIELD = re.compile(r"(?:unknown|required) field `(.*?)`")


def decode(body: bytes, kind: type[Body]) -> Body:
    """`body` as a `kind`. Raises APIError 400 for bad JSON, a wrong type, and a field that is not known or not
    supported (`kind.UNSUPPORTED`, or that of schema.py); a repeated key counts with its last value."""
    try:
        values = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        _check_names(values, kind)
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _bad_json(body, error) from None
    except RecursionError:
        raise invalid("the body is nested too deeply", code="invalid_json") from None


def _check_names(values: dict[str, msgspec.Raw], kind: type[Body]) -> None:
    known = kind.__struct_fields__
    refused: dict[str, tuple[Any, ...]] = getattr(kind, "UNSUPPORTED", UNSUPPORTED)
    for name, raw in values.items():
        if name in known:
            continue
        if name not in refused:
            raise _unknown_field(name, name, known)
        value = msgspec.json.decode(raw)
        if value is not None and not any(_same(value, harmless) for harmless in refused[name]):
            raise unsupported(name)


def _same(value: object, harmless: object) -> bool:
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)


def _unknown_field(name: str, path: str, known: tuple[str, ...]) -> APIError:
    near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return invalid(f"unknown field {name[:64]!r}{hint}", path[:128], "unknown_parameter")


def _wrong_type(message: str, kind: type[Body]) -> APIError:
    """msgspec says "what - at `$.path`"; a field that is missing or unknown is named in `what`."""
    where = _PATH.search(message)
    path = where[1] if where else ""
    what = message[: where.start()] if where else message
    named = _NAMED_FIELD.search(what)
    if named is not None:
        path = f"{path}.{named[1]}" if path else named[1]
        if "unknown field" in what:
            return _unknown_field(named[1], path, kind.__struct_fields__ if "." not in path else ())
        return invalid(f"missing required field {path!r}", path, "missing_required_parameter")
    if not path:
        return invalid(f"the body must be a JSON object: {what}", code="invalid_type")
    is_type = what.startswith("Expected") and " of length " not in what and " matching " not in what
    code = "invalid_type" if is_type else "invalid_value"
    return invalid(f"{path}: {what[:1].lower()}{what[1:]}", path, code)


def _bad_json(body: bytes, error: Exception) -> APIError:
    marked = _LONE_SURROGATE.sub(lambda _: _MARKER, body)
    if marked == body:
        return invalid(f"the body is not valid JSON: {error}", code="invalid_json")
    try:
        fields = msgspec.json.decode(marked, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return invalid(f"the body is not valid JSON: {error}", code="invalid_json")
    name = next((name for name, raw in fields.items() if _MARKER in bytes(raw)), None)
    return invalid("a lone surrogate such as \\ud800 is not Unicode text", name, "invalid_json")
