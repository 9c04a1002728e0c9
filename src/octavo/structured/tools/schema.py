"""What an output must look like in which calls are required: the JSON schema for constrained decoding."""

from __future__ import annotations

from typing import Any

from octavo.structured.tools.base import Functions

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def required_calls_schema(functions: Functions, parallel: bool = True) -> dict[str, Any]:
    """An array of at least one {"name", "parameters"}, at most one where calls are not to be parallel.

    Raises ValueError where there are no functions, and for a schema that is nested too deeply.
    """
    if not functions:
        raise ValueError("tools is empty; a required call needs at least 1")
    try:
        calls = _alternatives(functions)
    except RecursionError:
        raise ValueError("tools: the schema of a function's parameters is nested too deeply") from None
    schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return schema if parallel else {**schema, "maxItems": 1}


def _alternatives(functions: Functions) -> list[dict[str, Any]]:
    calls = []
    for index, (name, parameters) in enumerate(functions.items()):
        where = f"#/items/anyOf/{index}/properties/parameters"
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": _moved(parameters or _ANY_OBJECT, where)},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    return calls


def named_call_schema(functions: Functions, name: str) -> dict[str, Any]:
    """The arguments of one function. Raises ValueError where there is none of that name."""
    if name not in functions:
        raise ValueError(f"tool_choice names {name!r}, which is not among tools; allowed: {', '.join(functions)}")
    return dict(functions[name] or _ANY_OBJECT)


def _moved(schema: Any, where: str) -> Any:
    """`schema` as part of a larger one, at `where`: references to its own root lead there."""
    if isinstance(schema, list):
        return [_moved(item, where) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: where + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, where)
        for key, value in schema.items()
    }
