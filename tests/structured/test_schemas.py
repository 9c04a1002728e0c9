"""Whatever walk through a schema's masks ends is valid by the schema, as `jsonschema` reads it."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from json_schemas import SCHEMAS
from structured_rig import EOS, OTHER_EOS, TOKENS, accepts, allowed, matcher, took

from octavo.protocol.structured import StructuredOutputsParams

CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER
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


def valid(schema: dict[str, object], text: str) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=CHECKER).validate(json.loads(text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_walks_are_valid(name: str) -> None:
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    for seed in range(5):
        valid(schema, walk(schema, random.Random(seed)))


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
        valid(SCHEMAS[name], json.dumps(value))
    assert not accepts(StructuredOutputsParams(json=SCHEMAS[name]), json.dumps(value))
