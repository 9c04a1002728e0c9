"""What an output may be in which calls are optional, and correct where they are made."""

from __future__ import annotations

import json
from typing import Any

import pytest
from parser_rig import events_of
from structured_rig import accepts

from octavo.protocol.structured import StructuredOutputsParams
from octavo.structured.events import collect
from octavo.structured.tools.registry import STRICT_PARSERS
from octavo.structured.tools.strict import strict_calls_tag

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"type": "string"}},
    "required": ["n"],
    "additionalProperties": False,
}
FUNCTIONS = {"f": SCHEMA, "g": {"type": "object", "properties": {"m": {"type": "null"}}}, "bare": None}
ONE, BAD, OTHER = '{"n": 1}', '{"n": "1"}', '{"z": [1]}'
DEEP = "<｜tool▁call▁begin｜>"
# Of each format: how it writes a call.
CALLS = {
    "hermes": '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>',
    "llama3_json": '{{"name": "{}", "parameters": {}}}',
    "mistral": "[TOOL_CALLS]{}[ARGS]{}",
    "deepseek_v3": DEEP + "{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
}
OTHER_CALLS = {
    "mistral": '[TOOL_CALLS][{{"name": "{}", "arguments": {}}}]',
    "deepseek_v3": DEEP + "function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>",
}


def strict(parser: str, functions: Any = FUNCTIONS, names: tuple[str, ...] = ("f", "bare")) -> StructuredOutputsParams:
    return StructuredOutputsParams(structural_tag=strict_calls_tag(parser, functions, names))


def calls_of(parser: str, text: str, functions: Any = FUNCTIONS) -> list[tuple[str, Any]]:
    whole = collect(events_of(STRICT_PARSERS[parser](functions), [text]))
    return [(call.name, json.loads(call.arguments)) for call in whole.calls]


@pytest.mark.parametrize(("parser", "call"), [*CALLS.items(), *OTHER_CALLS.items()])
def test_calls_follow_their_schemas(parser: str, call: str) -> None:
    wish = strict(parser)
    for text, calls in (
        ("No call: {1}.", []),
        (call.format("f", ONE), [("f", {"n": 1})]),
        (f"First:\n{call.format('f', ONE)}\n{call.format('g', OTHER)}", [("f", {"n": 1}), ("g", {"z": [1]})]),
        (call.format("bare", OTHER), [("bare", {"z": [1]})]),
    ):
        assert accepts(wish, text), text
        assert calls_of(parser, text) == calls
    for text in (call.format("f", BAD), f"{call.format('g', '{}')} {call.format('f', '{}')}", call.format("g", "[]")):
        assert not accepts(wish, text), text
    if parser != "llama3_json":
        assert not accepts(wish, call.format("unknown", ONE))


@pytest.mark.parametrize(
    "text",
    ['{"name": "Bob", "parameters": {}}', '{"name":"f", "parameters": {"n": "1"}}', '{"type": "f", "name": "f"}'],
)
def test_json_that_is_no_strict_call_of_llama3_is_content(text: str) -> None:
    assert accepts(strict("llama3_json"), text)
    assert calls_of("llama3_json", text) == []


def test_arrays_of_mistral_are_held_to_schemas_throughout() -> None:
    first, second = f'[TOOL_CALLS][{{"name": "f", "arguments": {ONE}}}, ', '{{"name": "f", "arguments": {}}}]'
    assert accepts(strict("mistral"), first + second.format(ONE))
    assert not accepts(strict("mistral"), first + second.format(BAD))


def coder(**values: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"


RICH = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "any"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "color": {"enum": ["red", "green"]},
        "point": {"$ref": "#/$defs/Point"},
        "many": {"type": "array", "items": {"type": "integer"}},
        "texts": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["text", "color"],
    "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}


def test_parameters_of_qwen3_coder_follow_the_schema() -> None:
    wish = strict("qwen3_coder", {"f": RICH}, ("f",))
    good: list[tuple[dict[str, str], Any]] = [
        ({"text": "a\n<b>\n", "color": "red"}, {"text": "a\n<b>\n", "color": "red"}),
        ({"text": "", "maybe": "null", "color": "green"}, {"text": "", "maybe": None, "color": "green"}),
        (
            {"text": "x", "maybe": "y", "color": "red", "point": '{"x": 1.5}', "many": "[1, 2]"},
            {"text": "x", "maybe": "y", "color": "red", "point": {"x": 1.5}, "many": [1, 2]},
        ),
        (
            {"text": "x", "color": "red", "texts": '["</parameter>"]'},
            {"text": "x", "color": "red", "texts": ["</parameter>"]},
        ),
    ]
    for values, arguments in good:
        assert accepts(wish, coder(**values)), values
        assert calls_of("qwen3_coder", coder(**values), {"f": RICH}) == [("f", arguments)]
    for values in (
        {"text": "x"},
        {"color": "red", "text": "x"},
        {"text": "x", "color": "blue"},
        {"text": "x", "color": "red", "point": "{}"},
        {"text": "x", "color": "red", "many": '["a"]'},
        {"text": "x", "color": "red", "other": "1"},
        {"text": "x\n<parameter=other>\ny", "color": "red"},
        {"text": "x</parameter>", "color": "red"},
    ):
        assert not accepts(wish, coder(**values)), values
    assert accepts(strict("qwen3_coder", {"f": {"type": "object"}}, ("f",)), coder())


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "minProperties": 1}, "'minProperties'"),
        ({"anyOf": [{"type": "object"}]}, "'anyOf'"),
        ({"type": "array"}, "no object"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}}, "parameter 'a'"),
        ({"type": "object", "properties": {"a": {"type": ["string", "integer"]}}}, "parameter 'a'"),
        ({"type": "object", "properties": {"a": {"enum": ["x", 5]}}}, "parameter 'a'"),
        ({"type": "object", "properties": {"a": {"enum": ["</parameter>"]}}}, "parameter 'a'"),
        ({"type": "object", "properties": {"a": True}}, "parameter 'a'"),
        ({"type": "object", "properties": {"a<": {"type": "null"}}}, "parameter 'a<'"),
        ({"type": "object", "properties": {"a": {"anyOf": 5}}}, "parameter 'a'"),
        ({"type": "object", "properties": {"a": {"anyOf": [5]}}, "required": 5}, "parameter 'a'"),
        ({"type": "object", "properties": {"a": {"type": ["string", {}]}}}, "parameter 'a'"),
        ({"type": "object", "properties": []}, "no object"),
    ],
)
def test_schemas_that_texts_cannot_be_held_to_are_refused(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        strict("qwen3_coder", {"f": schema}, ("f",))


@pytest.mark.parametrize("parser", ["pythonic", "openai"])
def test_formats_that_cannot_be_held_to_a_schema_are_refused(parser: str) -> None:
    with pytest.raises(
        ValueError, match=f"format '{parser}' cannot be held to a schema; allowed formats: deepseek_v3,"
    ):
        strict(parser)
