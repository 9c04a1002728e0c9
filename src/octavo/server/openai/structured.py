"""The fields of a body that constrain its output's text, and the one constraint they come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.protocol.structured import KINDS, StructuredOutputsParams, check_backend
from octavo.server.openai.errors import APIError, invalid

_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


class TextFormat(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True, frozen=True):
    """No constraint."""


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True, frozen=True):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The schema binds whatever `strict` says. name, description: labels, which change nothing."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True, frozen=True):
    json_schema: NamedSchema


class StructuralTagFormat(
    msgspec.Struct, tag_field="type", tag="structural_tag", forbid_unknown_fields=True, frozen=True, omit_defaults=True
):
    """Either `format`, or `structures` and `triggers`: the grammar's compiler reads them."""

    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat


class StructuredOutputsBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """StructuredOutputsParams as a body has it: without a kind it only sets options of the one that is elsewhere."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class StructuredFields(msgspec.Struct, kw_only=True, frozen=True):
    """guided_*: the older names of what structured_outputs says."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsBody | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None


@dataclass(frozen=True)
class Wish:
    """params: the constraint. path: the field that gives it, for errors."""

    params: StructuredOutputsParams
    path: str

    def refusal(self, error: ValueError) -> APIError:
        return _refusal(error, self.params.kind, self.path)


def wish_of(body: StructuredFields) -> Wish | None:
    """The one constraint of a body, or None. Raises APIError 400 for several, and for one that cannot be."""
    found = [*_from_response_format(body.response_format), *_from_structured_outputs(body), *_from_guided(body)]
    if len(found) > 1:
        paths = [path for path, _, _ in found]
        raise invalid(f"{' and '.join(paths)} exclude each other: a request has one constraint", paths[-1])
    options = _options(body)
    if not found:
        if body.structured_outputs is not None:
            raise invalid(f"structured_outputs has no constraint; allowed: one of {', '.join(KINDS)}", _SO)
        if options:
            raise invalid("guided_whitespace_pattern needs guided_json or guided_json_object", _PATTERN)
        return None
    [(path, kind, value)] = found
    try:
        return Wish(StructuredOutputsParams(**{kind: value}, **options), path)
    except ValueError as error:
        raise _refusal(error, kind, path) from None


_SO, _PATTERN, _BACKEND = "structured_outputs", "guided_whitespace_pattern", "guided_decoding_backend"
_Found = list[tuple[str, str, Any]]  # the field's path, its kind, its value


def _from_response_format(given: ResponseFormat | None) -> _Found:
    if given is None or isinstance(given, TextFormat):
        return []
    if isinstance(given, JsonObjectFormat):
        return [("response_format", "json_object", True)]
    if isinstance(given, JsonSchemaFormat):
        return [("response_format.json_schema.schema", "json", given.json_schema.schema)]
    return [("response_format", "structural_tag", msgspec.json.encode(given).decode())]


def _from_structured_outputs(body: StructuredFields) -> _Found:
    given = body.structured_outputs
    values = {} if given is None else {kind: getattr(given, kind) for kind in KINDS}
    return [(f"{_SO}.{kind}", kind, value) for kind, value in values.items() if value is not None]


def _from_guided(body: StructuredFields) -> _Found:
    values = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "choice": body.guided_choice,
        "grammar": body.guided_grammar,
        "json_object": body.guided_json_object or None,
    }
    return [(f"guided_{kind}", kind, value) for kind, value in values.items() if value is not None]


def _options(body: StructuredFields) -> dict[str, Any]:
    try:
        check_backend(_BACKEND, body.guided_decoding_backend)
    except ValueError as error:
        raise invalid(str(error), _BACKEND) from None
    values = {name: getattr(body.structured_outputs, name, None) for name in _OPTIONS}
    if body.guided_whitespace_pattern is not None:
        if values["whitespace_pattern"] is not None:
            raise invalid(f"{_PATTERN} and {_SO}.whitespace_pattern exclude each other", _PATTERN)
        values["whitespace_pattern"] = body.guided_whitespace_pattern
    return {name: value for name, value in values.items() if value is not None}


def _refusal(error: ValueError, kind: str, path: str) -> APIError:
    """Messages begin with the parameter's name, "structured_outputs.kind" or without the kind."""
    message = str(error)
    for name in (f"{_SO}.{kind}", _SO):
        rest = message.removeprefix(name)
        if rest != message and not rest.startswith("."):
            return invalid(path + rest, path)
    return invalid(message, path)
