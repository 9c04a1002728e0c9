"""Whatever walk through a schema's masks ends is valid by the schema, as `jsonschema` reads it."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from json_schemas import SCHEMAS
from json_schemas_more import ALL_SCHEMAS
from schema_formats import validate
from structured_rig import EOS, OTHER_EOS, TOKENS, accepts, allowed, matcher, took

from octavo.protocol.structured import StructuredOutputsParams

MOST_TOKENS = 600


def walk(schema: dict[str, object], rng: random.Random) -> str:
    """A text out of random tokens. Recursion ends soon: once the text may end, it mostly does."""
    state = matcher(StructuredOutputsParams(json=schema, disable_any_whitespace=rng.random() < 0.5))
    text = b""
    for _ in range(MOST_TOKENS):
        found = allowed(state.mask)
        if EOS in found and (found <= {EOS, OTHER_EOS} or rng.random() < 0.7):
            return text.decode()
        token_id = rng.choice(sorted(i for i in found if i < EOS))
        text += TOKENS[token_id]
        assert took(state, [token_id]) is None
    raise AssertionError(f"no end after {MOST_TOKENS} tokens: {text!r}")


@pytest.mark.parametrize("name", ALL_SCHEMAS)
def test_random_walks_are_valid(name: str) -> None:
    schema = ALL_SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    for seed in range(2):
        validate(schema, json.loads(walk(schema, random.Random(seed))))


def test_there_are_more_than_300_different_schemas() -> None:
    assert len({json.dumps(schema) for schema in ALL_SCHEMAS.values()}) == len(ALL_SCHEMAS) > 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("integer", 1000),
        ("integer", 1.5),
        ("enum of strings", "yellow"),
        ("exclusive bounds", 4),
        ("multiple of", 30),
        ("minLength", "ab"),
        ("exactly two items", [True]),
        ("pattern", "AB-12"),
        ("date", "2020-13-01"),
        ("object", {"name": "a"}),
        ("no properties", {"a": 1}),
        ("tuple", [1, "a", 2]),
        ("linked list", {"v": 1, "next": 5}),
        ("oneOf by constant", {"kind": "cat", "name": "tom"}),
        ("allOf", 8),
    ],
)
def test_what_is_not_valid_is_not_let_through(name: str, value: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate(SCHEMAS[name], value)
    assert not accepts(StructuredOutputsParams(json=SCHEMAS[name]), json.dumps(value))
