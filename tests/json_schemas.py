"""Schemas whose every instance is short, by what they are about: for tests of structured output."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_WORD: Schema = {"type": "string", "pattern": "^[a-z]{1,6}$"}
_DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
_TREE: Schema = {
    "type": "object",
    "properties": {"v": _DIGIT, "kids": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}},
    "required": ["v", "kids"],
    "additionalProperties": False,
}


def object_of(required: list[str] | None = None, **properties: Schema) -> Schema:
    """Closed; all properties required unless said otherwise."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def array_of(items: Schema, low: int = 0, high: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


SCHEMAS: dict[str, Schema] = {
    # types
    "string": {"type": "string", "maxLength": 8},
    "integer": {"type": "integer", "minimum": -999, "maximum": 999},
    "number": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "union of types": {"type": ["boolean", "null"]},
    "type and title": {"type": "boolean", "title": "Yes?", "description": "d", "default": True, "examples": [True]},
    # enum and const
    "enum of strings": {"enum": ["red", "green", "blue"]},
    "enum of mixed values": {"enum": [1, "one", None, True, [1, 2], {"a": 1}]},
    "enum with quotes": {"enum": ['say "hi"', "back\\slash", "new\nline", "é", "日本"]},
    "typed enum": {"type": "string", "enum": ["small", "large"]},
    "const string": {"const": "fixed"},
    "const number": {"const": 3.5},
    "const object": {"const": {"a": [1, None]}},
    # bounds
    "minimum and maximum": {"type": "integer", "minimum": 18, "maximum": 65},
    "negative range": {"type": "integer", "minimum": -20, "maximum": -5},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 4},
    "multiple of": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 25},
    "minLength": {"type": "string", "minLength": 3, "maxLength": 5},
    "exact length": {"type": "string", "minLength": 4, "maxLength": 4},
    "empty string": {"type": "string", "maxLength": 0},
    "minItems": array_of(_DIGIT, 2, 4),
    "exactly two items": array_of({"type": "boolean"}, 2, 2),
    "empty array": array_of({"type": "string"}, 0, 0),
    # pattern
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern alternatives": {"type": "string", "pattern": "^(cat|dog)s?$"},
    "pattern with escapes": {"type": "string", "pattern": r"^\d+\.\d{2}$", "maxLength": 8},
    "phone": {"type": "string", "pattern": r"^\(\d{3}\) \d{3}-\d{4}$"},
    # format
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time", "maxLength": 16},
    "ipv4": {"type": "string", "format": "ipv4"},
    "uuid": {"type": "string", "format": "uuid"},
    # objects
    "object": object_of(name=_WORD, age=_DIGIT),
    "optional properties": object_of(["a"], a=_DIGIT, b=_DIGIT, c=_DIGIT),
    "all optional": object_of([], a=_DIGIT, b={"type": "null"}),
    "no properties": object_of(),
    "nested objects": object_of(a=object_of(b=object_of(c=_DIGIT))),
    "odd names": {**object_of(), "properties": {'a "b"': _DIGIT, "é.ü": _DIGIT}, "required": ['a "b"', "é.ü"]},
    "typed additional": {
        "type": "object",
        "properties": {"k": _DIGIT},
        "required": ["k"],
        "additionalProperties": False,
    },
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": _DIGIT},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "same schema twice": object_of(start=_DIGIT, end=_DIGIT),
    # arrays
    "array of enums": array_of({"enum": ["a", "b"]}, 1, 3),
    "nested arrays": array_of(array_of(_DIGIT, 1, 2), 1, 2),
    "array of objects": array_of(object_of(x=_DIGIT), 1, 2),
    "tuple": {"type": "array", "prefixItems": [_DIGIT, _WORD], "items": False, "minItems": 2},
    "tuple and rest": {"type": "array", "prefixItems": [{"const": 1}], "items": _WORD, "minItems": 2, "maxItems": 3},
    "array of unions": array_of({"type": ["null", "boolean"]}, 1, 3),
    # $ref and recursion
    "$ref": {"$defs": {"digit": _DIGIT}, **object_of(a={"$ref": "#/$defs/digit"}, b={"$ref": "#/$defs/digit"})},
    "definitions": {"definitions": {"w": _WORD}, **object_of(a={"$ref": "#/definitions/w"})},
    "$ref to the root's part": {**object_of(a=_DIGIT, b={"$ref": "#/properties/a"})},
    "$ref through $ref": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": _DIGIT}, **object_of(v={"$ref": "#/$defs/a"})},
    "tree of two floors": {"$defs": {"leaf": object_of(v=_DIGIT)}, **_TREE},
    "linked list": {
        "$defs": {"node": object_of(v=_DIGIT, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})},
        "$ref": "#/$defs/node",
    },
    # combinations
    "anyOf": {"anyOf": [_DIGIT, {"type": "boolean"}]},
    "anyOf objects": {"anyOf": [object_of(a=_DIGIT), object_of(b=_WORD)]},
    "optional value": object_of(a={"anyOf": [_DIGIT, {"type": "null"}]}),
    "oneOf by type": {"oneOf": [_DIGIT, _WORD]},
    "oneOf by constant": {
        "oneOf": [
            object_of(kind={"const": "cat"}, lives=_DIGIT),
            object_of(kind={"const": "dog"}, good={"type": "boolean"}),
        ]
    },
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    "allOf objects": {
        "allOf": [
            {"type": "object", "properties": {"a": _DIGIT, "b": _DIGIT}, "required": ["a"]},
            {"properties": {"a": {"minimum": 5}, "b": {}}, "required": ["b"], "additionalProperties": False},
        ]
    },
    # what applications send
    "product": {
        "title": "Product",
        **object_of(name=_WORD, price={"type": "number", "minimum": 0, "maximum": 99}, in_stock={"type": "boolean"}),
    },
    "sentiment": object_of(label={"enum": ["good", "bad"]}, score={"type": "integer", "maximum": 5, "minimum": 1}),
    "person with address": object_of(
        name=_WORD, address=object_of(city=_WORD, zip={"pattern": "^[0-9]{5}$", **_STRING})
    ),
    "tool call": object_of(name={"const": "get_weather"}, arguments=object_of(city=_WORD, unit={"enum": ["C", "F"]})),
}
