"""The schemas of required calls."""

from __future__ import annotations

import pytest

from octavo.structured.tools.schema import named_call_schema, required_calls_schema

TREE = {
    "type": "object",
    "properties": {"node": {"$ref": "#/$defs/Node"}},
    "required": ["node"],
    "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}, "$ref": {"const": 1}}}},
}
FUNCTIONS = {"f": {"type": "object", "properties": {"a": {"type": "integer"}}}, "g": None, "tree": TREE}


def test_required() -> None:
    schema = required_calls_schema(FUNCTIONS)
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    assert "maxItems" not in schema
    assert schema["items"]["anyOf"][0] == {
        "type": "object",
        "properties": {"name": {"const": "f"}, "parameters": FUNCTIONS["f"]},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    assert schema["items"]["anyOf"][1]["properties"]["parameters"] == {"type": "object"}
    assert required_calls_schema(FUNCTIONS, parallel=False)["maxItems"] == 1


def test_references_lead_to_where_the_schema_went() -> None:
    schema = required_calls_schema(FUNCTIONS)
    moved = schema["items"]["anyOf"][2]["properties"]["parameters"]
    target = moved["properties"]["node"]["$ref"]
    assert target == moved["$defs"]["Node"]["properties"]["next"]["$ref"]
    found = schema
    for step in target.removeprefix("#/").split("/"):
        found = found[int(step) if isinstance(found, list) else step]
    assert found is moved["$defs"]["Node"]
    assert found["properties"]["$ref"] == {"const": 1}  # a property of that name is no reference
    assert TREE["properties"]["node"]["$ref"] == "#/$defs/Node"


def test_named() -> None:
    assert named_call_schema(FUNCTIONS, "tree") == TREE
    assert named_call_schema(FUNCTIONS, "g") == {"type": "object"}
    with pytest.raises(ValueError, match="'h', which is not among tools; allowed: f, g, tree"):
        named_call_schema(FUNCTIONS, "h")


def test_a_schema_that_is_nested_too_deeply() -> None:
    schema: dict[str, object] = {}
    for _ in range(5000):
        schema = {"not": schema}
    with pytest.raises(ValueError, match="nested too deeply"):
        required_calls_schema({"f": schema})


def test_no_functions() -> None:
    with pytest.raises(ValueError, match="tools is empty"):
        required_calls_schema({})
