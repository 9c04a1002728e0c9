"""Arguments as Qwen3-Coder writes them, one <parameter=name> after another, held to a schema."""

from __future__ import annotations

from typing import Any

_OBJECT_WORDS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema"}
_LABELS = {"title", "description", "default", "examples"}
_END = "\n</parameter>\n"
# What the parser takes for the end of a value that is text.
_ENDINGS = ["</parameter>", "\n<parameter=", "\n</function>"]
_ANY_TEXT = {"type": "any_text", "excludes": _ENDINGS}


def parameter_tags(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A structural tag's format for the arguments of function `name`: its properties in their order, those that are
    not required only maybe. Texts stand as they are, other values as JSON.

    Raises ValueError naming what of the schema cannot be held to.
    """
    unknown = set(schema) - _OBJECT_WORDS - _LABELS
    properties = schema.get("properties", {})
    if unknown or schema.get("type") != "object" or not isinstance(properties, dict):
        said = f"has {sorted(unknown)[0]!r}" if unknown else "is no object with properties"
        raise ValueError(f"the schema of {name!r} {said}, to which calls in this format cannot be held")
    shared: dict[str, Any] = {word: schema[word] for word in ("$defs", "definitions") if word in schema}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    elements: list[dict[str, Any]] = []
    for key, wanted in properties.items():
        value = _value(wanted, shared) if isinstance(wanted, dict) and not set(key) & set("<>\n") else None
        if value is None:
            raise ValueError(f"calls in this format cannot be held to the schema of {name!r} for its parameter {key!r}")
        tag = {"type": "tag", "begin": f"<parameter={key}>\n", "content": value, "end": _END}
        elements.append(tag if key in required else {"type": "or", "elements": [tag, _constant("")]})
    return {"type": "sequence", "elements": elements} if elements else _constant("")


def _value(schema: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any] | None:
    """The format of one value; None where text as it stands cannot be held to the schema."""
    options = [schema]
    if isinstance(schema.get("anyOf"), list) and not set(schema) - _LABELS - {"anyOf"}:
        options = schema["anyOf"]
    if not any(_may_be_text(option) for option in options):
        return {"type": "json_schema", "json_schema": {**schema, **shared}}
    if all(_is_plain(option) for option in options):
        return _ANY_TEXT
    only_enum = set(schema) - _LABELS <= {"type", "enum"} and schema.get("type", "string") == "string"
    values = schema.get("enum") if only_enum else None
    if isinstance(values, list) and values and all(_fits(value) for value in values):
        return {"type": "or", "elements": [_constant(value) for value in values]}
    return None


def _fits(value: Any) -> bool:
    """Whether a value may stand as text: nothing in it is taken for its end."""
    return isinstance(value, str) and not any(end in f"\n{value}" for end in _ENDINGS)


def _may_be_text(schema: Any) -> bool:
    """Whether a value could be a string by a schema's own words; what it refers to is written as JSON."""
    if not isinstance(schema, dict):
        return True
    types = schema.get("type")
    return "$ref" not in schema and (types is None or "string" in _listed(types))


def _is_plain(schema: Any) -> bool:
    """Whether any text will do, or null, which is told from it."""
    if not isinstance(schema, dict) or set(schema) - _LABELS != {"type"}:
        return False
    return all(each in ("string", "null") for each in _listed(schema["type"]))


def _listed(types: Any) -> list[Any]:
    return types if isinstance(types, list) else [types]


def _constant(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}
