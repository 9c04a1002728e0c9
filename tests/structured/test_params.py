"""StructuredOutputsParams validate themselves, and fit into SamplingParams under both names."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from octavo import SamplingParams, StructuredOutputsParams
from octavo.protocol.structured import KINDS, MAX_TEXT_BYTES
from octavo.sampling_params import GuidedDecodingParams

S = StructuredOutputsParams
GOOD: dict[str, Any] = {
    "json": {"type": "object"},
    "regex": "a",
    "choice": ["a"],
    "grammar": "start: /a/",
    "json_object": True,
    "structural_tag": "{}",
}


def test_each_kind_alone_is_accepted_and_crosses_processes() -> None:
    assert set(GOOD) == set(KINDS)
    for kind, value in GOOD.items():
        params = SamplingParams(structured_outputs=S(**{kind: value}))
        assert params.structured_outputs is not None
        assert params.structured_outputs.kind == kind
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
        assert params.completions(lambda: 1)[0].structured_outputs == params.structured_outputs


def test_a_number_of_any_size_crosses_processes() -> None:
    """MessagePack has 64 bits for an integer: a schema with larger ones becomes its text."""
    assert S(json={"maximum": 2**64 - 1, "minimum": -(2**63)}).json == {"maximum": 2**64 - 1, "minimum": -(2**63)}
    for number in (2**64, -(2**63) - 1, 10**23):
        params = S(json={"properties": {"a": {"maximum": number}}})
        assert params.json == f'{{"properties":{{"a":{{"maximum":{number}}}}}}}'
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=S) == params


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "no constraint; allowed: exactly one of json, regex, choice, grammar, json_object, structural_tag"),
        ({"json": {}, "regex": "a"}, "structured_outputs has json and regex; allowed: exactly one"),
        ({"regex": "a", "choice": ["a"], "grammar": "x"}, "has regex, choice and grammar"),
        ({"regex": ""}, r"structured_outputs\.regex='' is not allowed"),
        ({"regex": 5}, r"structured_outputs\.regex=5"),
        ({"json": 5}, r"structured_outputs\.json=5"),
        ({"json": ""}, r"structured_outputs\.json=''"),
        ({"grammar": ""}, r"structured_outputs\.grammar=''"),
        ({"structural_tag": {}}, r"structured_outputs\.structural_tag=\{\}"),
        ({"choice": []}, r"structured_outputs\.choice=\[\]"),
        ({"choice": ["a", 5]}, r"structured_outputs\.choice="),
        ({"choice": "ab"}, r"structured_outputs\.choice='ab'"),
        ({"json_object": False}, "json_object=False is not allowed; allowed: True"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace=True needs json or json_object"),
        ({"json_object": True, "disable_any_whitespace": 1}, "disable_any_whitespace=1 is not allowed"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "whitespace_pattern needs json or json_object; given: choice"),
        ({"json_object": True, "whitespace_pattern": ""}, "whitespace_pattern=''"),
        ({"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True}, "allowed: one"),
        ({"json": {"enum": [object()]}}, r"structured_outputs\.json cannot be written as JSON"),
        ({"choice": ["\ud800"]}, r"structured_outputs\.choice cannot be written as JSON"),
        ({"regex": "a" * MAX_TEXT_BYTES}, r"structured_outputs\.regex has \d+ bytes; at most 262144 are allowed"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        S(**fields)


def test_the_old_name_becomes_the_new_one() -> None:
    old = GuidedDecodingParams(regex="a", backend="guidance")
    params = SamplingParams(guided_decoding=old)
    assert params == SamplingParams(structured_outputs=S(regex="a"))
    assert type(params.structured_outputs) is S
    assert SamplingParams(guided_decoding=S(regex="a")) == params  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed: one of them"):
        SamplingParams(guided_decoding=old, structured_outputs=S(regex="a"))
    with pytest.raises(ValueError, match="backend='outlines' is not available; allowed: auto, guidance, llguidance"):
        GuidedDecodingParams(regex="a", backend="outlines")


@pytest.mark.parametrize("name", ["structured_outputs", "guided_decoding"])
def test_other_types_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}={{'regex': 'a'}} is not allowed"):
        SamplingParams(**{name: {"regex": "a"}})
