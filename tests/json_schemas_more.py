"""Schemas in families, and a generator that composes schemas: with those of json_schemas.py more than 300.

Every instance is short enough for a small model to come to its end, and no schema is there twice.
"""

from __future__ import annotations

import json
import random
from typing import Any

from json_schemas import SCHEMAS, Schema, array_of, object_of

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
NUM_GENERATED = 150
_BIT: Schema = {"type": "boolean"}
_DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
_WORD: Schema = {"type": "string", "minLength": 1, "maxLength": 6}


def _strings() -> dict[str, Schema]:
    patterns = (
        r"^[a-f0-9]{6}$", r"^#[A-F0-9]{6}$", r"^v[0-9]+\.[0-9]+$", r"^(GET|POST|PUT) /[a-z]{0,8}$", r"^\w{2,5}$",
        r"^\s?x\S$", r"^[^aeiou]{3}$", r"^a.c$", r"^(ab){1,3}$", r"^$|^none$", r"^[\u00e0-\u00ff]{2}$", r"^\"q\"$",
        r"^[+-]?\d{1,3}$", r"^\\d$", r"^(?:x|y)+z$", r"^a{0}b$", r"^[\]\-^]{2}$", r"^\x41[\x30-\x32]$",
    )  # fmt: skip
    new = [name for name in FORMATS if name == "time" or name not in SCHEMAS]
    lengths = ((0, 1), (1, 1), (2, 4), (7, 9), (12, 12))
    return {
        **{f"format {name}": {"type": "string", "format": name} for name in new},
        **{f"optional {name}": object_of([], at={"type": "string", "format": name}) for name in FORMATS[2:6]},
        **{f"pattern {text}": {"type": "string", "pattern": text, "maxLength": 12} for text in patterns},
        **{f"{low} to {high} characters": {"type": "string", "minLength": low, "maxLength": high}
           for low, high in lengths},
        "a part matches": {"type": "string", "pattern": "ab", "maxLength": 4},
        "pattern and length": {"type": "string", "pattern": "^a+b*$", "minLength": 3, "maxLength": 5},
        "format and length": {"type": "string", "format": "email", "maxLength": 12},
        "encoded": {"type": "string", "maxLength": 4, "contentEncoding": "base64", "contentMediaType": "text/plain"},
    }  # fmt: skip


def _numbers() -> dict[str, Schema]:
    integers = ((-1, 1), (0, 0), (7, 7), (-105, -95), (99, 1001), (10**9, 10**9 + 5), (-(10**12), -(10**12) + 9))
    reals = ((0, 0.5), (-1.5, 2.25), (99.9, 100.1), (-0.001, 0.001), (1e-3, 1e-2), (3, 4))
    steps: tuple[tuple[float, float, float], ...] = ((3, -9, 9), (7, 0, 50), (0.5, 0, 4), (0.25, -1, 1), (100, 0, 900))
    return {
        **{f"integer {a}..{b}": {"type": "integer", "minimum": a, "maximum": b} for a, b in integers},
        **{f"integer between {a} and {b}": {"type": "integer", "exclusiveMinimum": a - 1, "exclusiveMaximum": b + 1}
           for a, b in integers[:4]},
        **{f"number {a}..{b}": {"type": "number", "minimum": a, "maximum": b} for a, b in reals},
        **{f"number between {a} and {b}": {"type": "number", "exclusiveMinimum": a, "exclusiveMaximum": b}
           for a, b in reals[:4]},
        **{f"{a}..{b} in steps of {step}":
           {"type": "number" if step % 1 else "integer", "minimum": a, "maximum": b, "multipleOf": step}
           for step, a, b in steps},
        "one bound below": {"type": "integer", "minimum": 5},
        "one bound above": {"type": "number", "maximum": -2.5},
        "both kinds of bounds": {"type": "integer", "minimum": 2, "exclusiveMinimum": 2, "maximum": 9},
        "bounds that are no integers": {"type": "integer", "minimum": 0.5, "maximum": 3.5},
        "integer or number": {"type": ["integer", "number"], "minimum": 0, "maximum": 2},
    }  # fmt: skip


def _constants() -> dict[str, Schema]:
    values: tuple[Any, ...] = (
        None, True, 0, -17, 2.5, "", "two words", 'a "quote"', "back\\slash", "tab\tand\nbreak", "日本語", "🙂", "</x>",
        [], [1, [2, []]], {}, {"b": 1, "a": {"c": None}}, {"é": "ü"}, 1.0, 123456789012,
    )  # fmt: skip
    return {
        **{f"const {json.dumps(value)}": {"const": value} for value in values},
        "enum of numbers": {"enum": [0, -1, 1.5, 100]},
        "enum of prefixes": {"enum": ["a", "ab", "abc", "abcd"]},
        "enum of one": {"enum": ["only"]},
        "enum, and its type": {"type": "integer", "enum": [1, 2, "a", 3.5]},
        "enum of lists": {"enum": [[], [1], [1, 2]]},
        "enum of objects": {"enum": [{"a": 1}, {"a": 2}, {}]},
        "enum of 50": {"enum": [f"option-{n}" for n in range(50)]},
        "enum with null": {"enum": ["x", None]},
    }


def _arrays() -> dict[str, Schema]:
    items = {
        "null": {"type": "null"}, "word": _WORD, "digit": _DIGIT, "object": object_of(k=_BIT), "date":
        {"type": "string", "format": "date"}, "enum": {"enum": ["x", 1, None]}, "array": array_of(_BIT, 0, 2),
    }  # fmt: skip
    bounds = ((0, 1), (1, 1), (2, 3))
    return {
        **{f"{a} to {b} of {name}": array_of(item, a, b) for name, item in items.items() for a, b in bounds},
        "tuple of three": {"type": "array", "prefixItems": [_DIGIT, _BIT, _WORD], "items": False, "minItems": 3},
        "short tuple": {"type": "array", "prefixItems": [_DIGIT, _BIT], "items": False},
        "tuple in tuple": {
            "type": "array", "minItems": 1, "items": False,
            "prefixItems": [{"type": "array", "prefixItems": [_BIT, _DIGIT], "items": False, "minItems": 2}],
        },
        "tuple, then digits": {
            "type": "array", "prefixItems": [{"const": "head"}], "items": _DIGIT, "minItems": 1, "maxItems": 3
        },
        "no more than the tuple has": {"type": "array", "prefixItems": [_BIT, _BIT, _BIT], "maxItems": 2},
        "no items": {"type": "array", "items": False},
        "four deep": array_of(array_of(array_of(array_of(_DIGIT, 1, 1), 1, 1), 1, 1), 1, 2),
    }  # fmt: skip


def _objects() -> dict[str, Schema]:
    names = ("with space", 'qu"ote', "sla/sh~", "ünï", "日本", "🙂", "$ref", "back\\slash", "", "-", "type", "a.b")
    closed = {"type": "object", "additionalProperties": False}
    deep: Schema = _DIGIT
    for name in "edcba":
        deep = object_of(**{name: deep})
    return {
        **{f"property {name!r}": object_of(**{name: _BIT}) for name in names},
        **{f"{count} properties": object_of(**{f"p{n}": _DIGIT for n in range(count)}) for count in (4, 8, 12)},
        "five floors": deep,
        "typed rest": {"type": "object", "additionalProperties": _DIGIT, "maxProperties": 2},
        "rest besides a name": {
            "type": "object", "properties": {"id": _DIGIT}, "required": ["id"], "additionalProperties": _BIT,
            "maxProperties": 2,
        },
        "at least one property": {"type": "object", "additionalProperties": _BIT, "minProperties": 1,
                                  "maxProperties": 2},
        "exactly two properties": {"type": "object", "additionalProperties": _BIT, "minProperties": 2,
                                   "maxProperties": 2},
        "two patterns": {**closed, "patternProperties": {"^a[0-9]$": _DIGIT, "^b[0-9]$": _BIT}, "maxProperties": 2},
        "a name and a pattern": {
            **closed, "properties": {"id": _DIGIT}, "required": ["id"], "patternProperties": {"^x-[a-z]$": _BIT},
            "maxProperties": 2,
        },
        "required, not described": {"type": "object", "properties": {}, "required": ["id"],
                                    "additionalProperties": _DIGIT, "maxProperties": 1},
        "a property that may not be": {**closed, "properties": {"a": _BIT, "b": False}, "required": ["a"]},
        "anything for a property": {**closed, "properties": {"a": {"enum": [0]}, "b": {"type": "null"}}},
        "order of required": {**closed, "properties": {"a": _BIT, "b": _BIT}, "required": ["b", "a"]},
        "last of three": object_of(["c"], a=_BIT, b=_BIT, c=_BIT),
        "annotated": {**object_of(a={**_BIT, "readOnly": True, "deprecated": True}), "$comment": "note",
                      "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "x-own": 1},
    }  # fmt: skip


def _references() -> dict[str, Schema]:
    node = object_of(v=_DIGIT, next={"anyOf": [{"type": "null"}, {"$ref": "#"}]})
    tree = object_of(kids={"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1})
    pair = object_of(["left"], left=_DIGIT, right={"$ref": "#/$defs/other"})
    other = object_of(["right"], right=_BIT, left={"$ref": "#/$defs/pair"})
    return {
        "the root again": node,
        "tree": {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"},
        "two that name each other": {"$defs": {"pair": pair, "other": other}, "$ref": "#/$defs/pair"},
        "escaped pointer": {"$defs": {"a/b": _BIT, "c~d": _DIGIT},
                            **object_of(x={"$ref": "#/$defs/a~1b"}, y={"$ref": "#/$defs/c~0d"})},
        "beside a reference": {"$defs": {"n": {"type": "integer", "minimum": 0}}, "$ref": "#/$defs/n", "maximum": 20},
        "reference in a list": {"$defs": {"n": _DIGIT}, **array_of({"$ref": "#/$defs/n"}, 1, 3)},
        "reference with an $id": {"$defs": {"n": {"$id": "https://example.org/n", **_DIGIT}},
                                  "$ref": "https://example.org/n"},
        "expression": {
            "$defs": {"e": {"anyOf": [_DIGIT, object_of(op={"enum": ["+", "-"]}, of=array_of({"$ref": "#/$defs/e"},
                                                                                              1, 2))]}},
            "$ref": "#/$defs/e",
        },
    }  # fmt: skip


def _combinations() -> dict[str, Schema]:
    cat, dog = object_of(kind={"const": "cat"}, lives=_DIGIT), object_of(kind={"const": "dog"}, good=_BIT)
    return {
        "type list of three": {"type": ["null", "boolean", "integer"], "minimum": 0, "maximum": 9},
        "type list with lengths": {"type": ["string", "array"], "maxLength": 3, "maxItems": 1, "items": _BIT},
        "nullable word": {"type": ["string", "null"], "maxLength": 4},
        "nullable object": {"anyOf": [object_of(a=_BIT), {"type": "null"}]},
        "anyOf of ranges": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 2}, {"type": "integer",
                                       "minimum": 10, "maximum": 12}]},
        "anyOf of one": {"anyOf": [_DIGIT]},
        "anyOf of kinds": {"anyOf": [cat, dog]},
        "anyOf within anyOf": {"anyOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"const": "x"}]},
        "anyOf beside type": {"type": "integer", "anyOf": [{"maximum": 3, "minimum": 0}, {"minimum": 90,
                                                            "maximum": 99}]},
        "either property": {**object_of([], a=_BIT, b=_BIT), "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        "oneOf of types": {"oneOf": [{"type": "null"}, _BIT, _DIGIT, {"type": "string", "maxLength": 2}]},
        "oneOf of kinds": {"oneOf": [dog, cat]},
        "oneOf in a list": array_of({"oneOf": [{"type": "null"}, _DIGIT]}, 1, 2),
        "allOf of lengths": {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
        "allOf of pattern and length": {"allOf": [{"type": "string", "pattern": "^[ab]*$"}, {"maxLength": 4}]},
        "allOf of enum and bound": {"allOf": [{"enum": [1, 2, 3, "a"]}, {"type": "integer", "minimum": 2}]},
        "allOf of anyOf": {"allOf": [{"anyOf": [{"type": "null"}, _BIT]}, {"type": ["null", "integer"]}]},
        "allOf of references": {"$defs": {"a": {"type": "integer", "minimum": 3}, "b": {"maximum": 6}},
                                "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]},
        "allOf of one": {"allOf": [_WORD]},
        "allOf of objects": {"allOf": [{"type": "object", "properties": {"a": _DIGIT}, "required": ["a"]},
                                       {"properties": {"a": {"maximum": 3}}, "additionalProperties": False}]},
    }  # fmt: skip


class _Composer:
    """Draws schemas: any kind within any other, to a depth, with few parts at each."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._defs: dict[str, Schema] = {}

    def draw(self) -> Schema:
        schema = self._any(self._rng.randint(2, 3))
        if self._defs:
            return {"$defs": self._defs, **schema}
        return schema

    def _any(self, depth: int) -> Schema:
        kinds = [self._object, self._array, self._union, self._reference] if depth else []
        if depth < 2:
            kinds += [self._string, self._number, self._enum, self._constant]
        return self._rng.choice(kinds)(depth - 1)

    def _object(self, depth: int) -> Schema:
        rng = self._rng
        names = rng.sample(("id", "name", "größe", "a b", "x_1", "tags", "ok?", "値"), rng.randint(1, 3))
        made = object_of([name for name in names if rng.random() < 0.7], **{name: self._any(depth) for name in names})
        return {**made, "title": rng.choice(("Thing", "Ding"))} if rng.random() < 0.3 else made

    def _array(self, depth: int) -> Schema:
        rng = self._rng
        if rng.random() < 0.3:
            parts = [self._any(depth) for _ in range(rng.randint(1, 2))]
            return {"type": "array", "prefixItems": parts, "items": False, "minItems": rng.randint(0, len(parts))}
        low = rng.randint(0, 1)
        return array_of(self._any(depth), low, low + rng.randint(0, 1))

    def _union(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth), self._rng.choice(({"type": "null"}, _BIT, {"const": "none"}))]}

    def _reference(self, depth: int) -> Schema:
        name = f"d{len(self._defs)}"
        self._defs[name] = {}  # the name is taken
        self._defs[name] = self._any(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _string(self, _: int) -> Schema:
        rng = self._rng
        low = rng.randint(0, 3)
        return rng.choice(
            (
                {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 5)},
                {"type": "string", "pattern": f"^[{rng.choice(('a-z', '0-9', 'A-F0-9', 'xyz_'))}]{{1,{low + 1}}}$"},
                {"type": "string", "format": rng.choice(("date", "ipv4", "date", "duration"))},
                {"type": ["string", "null"], "maxLength": low + 1},
            )
        )

    def _number(self, _: int) -> Schema:
        rng = self._rng
        low = rng.randint(-50, 50)
        high = low + rng.randint(1, 200)
        return rng.choice(
            (
                {"type": "integer", "minimum": low, "maximum": high},
                {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 1},
                {"type": "number", "minimum": low / 4, "maximum": high / 4, "multipleOf": 0.25},
                {"type": "integer", "minimum": low, "maximum": low + 60, "multipleOf": rng.randint(2, 9)},
            )
        )

    def _enum(self, _: int) -> Schema:
        values = ("red", "green", 1, 2.5, None, True, [], ["a"], {"k": 0}, "ä", 'q"')
        return {"enum": self._rng.sample(values, self._rng.randint(1, 4))}

    def _constant(self, _: int) -> Schema:
        return self._rng.choice((_BIT, {"type": "null"}, {"const": self._rng.choice(("ok", 0, None, [1, 2]))}))


def _generated() -> dict[str, Schema]:
    rng, found = random.Random(20_12), {json.dumps(schema) for schema in SCHEMAS.values()}
    made: dict[str, Schema] = {}
    while len(made) < NUM_GENERATED:
        schema = _Composer(rng).draw()
        if (text := json.dumps(schema)) not in found:
            found.add(text)
            made[f"generated {len(made)}"] = schema
    return made


FAMILIES: dict[str, Schema] = {
    **_strings(), **_numbers(), **_constants(), **_arrays(), **_objects(), **_references(), **_combinations(),
}  # fmt: skip
ALL_SCHEMAS: dict[str, Schema] = {**SCHEMAS, **FAMILIES, **_generated()}
