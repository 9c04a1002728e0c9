"""From bytes to a typed body, or to a 400 that names the field at fault."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import QueryParams
from starlette.types import Scope

from octavo.protocol.fields import fields_of
from octavo.server.openai.errors import APIError, invalid, unsupported
from octavo.server.openai.schema import UNSUPPORTED
from octavo.server.openai.wrong_types import unknown_field, wrong_type

logger = logging.getLogger("octavo.server")

Body = TypeVar("Body", bound=msgspec.Struct)

MAX_NAMES_SHOWN = 16
_NOT_HEADER_SAFE = re.compile(r"[^A-Za-z0-9_.\-]")

_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_MARKER = b"\\ue0f8\\uf8e0"


@dataclass
class Ignored:
    """The names of a query's parameters and of a body's fields that no code reads, for the answer's header. Where
    strict, there are none: such a name is refused."""

    strict: bool
    names: list[str] = field(default_factory=list)  # written by `read_query` and `decode`

    @property
    def header(self) -> str:
        """The names, as a header may carry them."""
        shown = [_NOT_HEADER_SAFE.sub("?", name[:64]) or "?" for name in self.names[:MAX_NAMES_SHOWN]]
        more = len(self.names) - len(shown)
        return ", ".join([*shown, f"and {more} more"] if more else shown)


def read_query(scope: Scope, strict: bool, known: Collection[str] = ()) -> Ignored:
    """What a request's answer will say was ignored, its query's parameters first; those that are `known` are not.

    Raises APIError 400 for another where strict.
    """
    ignored = Ignored(strict)
    scope["state"]["ignored"] = ignored  # for the answer's header
    for name in QueryParams(scope.get("query_string", b"")):
        if name in known:
            continue
        if strict:
            allowed = ", ".join(known) or "none"
            raise invalid(f"unknown parameter {name[:64]!r}; allowed: {allowed}", name[:128], "unknown_parameter")
        ignored.names.append(name)
    return ignored


def decode(body: bytes, kind: type[Body], ignored: Ignored, vocab_size: int) -> Body:
    """`body` as a `kind`, whose fields are in their ranges. A field that is not known goes to `ignored`; a repeated
    key counts with its last value. vocab_size: what token ids lie below.

    Raises APIError 400 for bad JSON, a wrong type, a value out of range, a field that is not supported
    (`kind.UNSUPPORTED`, or that of schema.py), and, where `ignored` is strict, one that is not known.
    """
    try:
        values = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        _check_names(values, kind, ignored)
        decoded = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise wrong_type(str(error), kind, body) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _bad_json(body, error) from None
    except RecursionError:
        raise invalid("the body is nested too deeply", code="invalid_json") from None
    _check_ranges(values, decoded, vocab_size)
    return decoded


def _check_ranges(names: Iterable[str], body: msgspec.Struct, vocab_size: int) -> None:
    """Hold the fields that were given to their rows of the table."""
    rows = fields_of(type(body).__name__)
    for name in names:
        row = rows.get(name)
        if row is None or (value := getattr(body, name)) is None:
            continue
        try:
            row.range.in_vocabulary(vocab_size).check(name, value)
        except ValueError as error:
            raise invalid(str(error), name) from None
        if row.new_name:
            warn_of_old_name(name, row.new_name)


@functools.cache
def warn_of_old_name(name: str, new_name: str) -> None:
    """Once a process and name."""
    logger.warning("requests use %s, which is now called %s; both work", name, new_name)


def _check_names(values: dict[str, msgspec.Raw], kind: type[Body], ignored: Ignored) -> None:
    known = kind.__struct_fields__
    refused: dict[str, tuple[Any, ...]] = getattr(kind, "UNSUPPORTED", UNSUPPORTED)
    for name, raw in values.items():
        if name in known:
            continue
        if name not in refused:
            if ignored.strict:
                raise unknown_field(name, name, known)
            ignored.names.append(name)
            continue
        value = msgspec.json.decode(raw)
        if value is not None and not any(_same(value, harmless) for harmless in refused[name]):
            raise unsupported(name, value, refused[name])


def _same(value: object, harmless: object) -> bool:
    return value == harmless and isinstance(value, bool) == isinstance(harmless, bool)


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
