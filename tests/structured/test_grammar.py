"""From each kind of constraint to the texts that it lets through."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structured_rig import BEGIN, VOCABULARY, accepts, ids, tag

from octavo.protocol.structured import StructuredOutputsParams
from octavo.structured.compilation import compiled_matcher, ll_tokenizer
from octavo.structured.grammar import grammar_of

S = StructuredOutputsParams
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
CLOSED = {**POINT, "additionalProperties": False}


@pytest.mark.parametrize(
    ("wish", "good", "bad"),
    [
        (S(json=POINT), ['{"x":1}', '{"x": -12, "y": [null]}', '{\n  "x" : 3\n}'], ['{"x":1.5}', "{}", '{"x":"1"}']),
        (S(json=json.dumps(POINT)), ['{"x":1}'], ["1"]),
        (S(json_object=True), ["{}", '{"a": {"b": [1, true]}}'], ["[]", "1", "{} {}"]),
        (S(json=POINT, disable_any_whitespace=True), ['{"x":1}'], ['{"x": 1}', '{ "x":1}']),
        (S(json=POINT, whitespace_pattern=" "), ['{"x": 1}'], ['{"x":  1}', '{"x":\n1}']),
        (S(json=POINT), ['{"x":' + " " * 32 + "1}"], ['{"x":' + " " * 33 + "1}"]),
        (S(json=POINT, disable_additional_properties=True), ['{"x":1}'], ['{"x":1,"y":2}']),
        (S(regex=r"\d{3}-[a-z]+"), ["123-a"], ["12-a", "123-", "123-A"]),
        (S(regex="a/b|\\."), ["a/b", "."], ["x"]),
        (S(choice=["yes", "no", 'say "é"\n\\']), ["yes", "no", 'say "é"\n\\'], ["ye", "yesno", ""]),
        (S(choice=["a", "a", "<eos>"]), ["a", "<eos>"], ["b"]),
        (S(choice=["a", "ab", "abcd"]), ["a", "ab", "abcd"], ["abc", "b"]),
        (S(choice=[str(number) for number in range(3000)]), ["0", "299", "2999"], ["3000", "01"]),
        (S(grammar='start: "x" NUM+\nNUM: /[0-9]/'), ["x1", "x123"], ["x", "1"]),
        (S(grammar='root ::= item ("," item)*\nitem ::= [a-c]+ | "(" root ")"'), ["a,bc", "(a,(b))"], ["", "a,", "(a"]),
        (tag(structures=[{"begin": "<f=a>", "schema": CLOSED, "end": "</f>"}], triggers=["<f"]),
         ["free < text", '<f=a>{"x":1}</f>', 'hm <f=a>{"x":1}</f> and <f=a>{"x":2}</f>!'],
         ["<f=b>", '<f=a>{"y":1}</f>', '<f=a>{"x":1}']),
        (tag(format={"type": "sequence", "elements": [
            {"type": "const_string", "value": "Q:"}, {"type": "regex", "pattern": "[0-9/]+"}]}),
         ["Q:1/2"], ["Q:", "1"]),
        (tag(format={"type": "or", "elements": [
            {"type": "const_string", "value": "none"}, {"type": "json_schema", "json_schema": CLOSED}]}),
         ["none", '{"x":1}'], ["", "x"]),
        (tag(format={"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"}),
         ["<t>a < b</t>", "<t></t>"], ["<t>", "<t></t>x", "x"]),
        (tag(format={"type": "triggered_tags", "triggers": ["<f"], "at_least_one": True, "stop_after_first": True,
                     "tags": [{"begin": "<f=a>", "content": {"type": "regex", "pattern": "[0-9]"}, "end": "</f>"},
                              {"begin": "<f=b>", "content": {"type": "any_text"}, "end": "!"}]}),
         ["go <f=a>1</f>", "<f=b>what?!"], ["go", "<f=a>1</f> more", "<f=c>"]),
        (tag(format={"type": "tags_with_separator", "separator": ",", "at_least_one": True,
                     "tags": [{"begin": "[", "content": {"type": "regex", "pattern": "[0-9]"}, "end": "]"}]}),
         ["[1]", "[1],[2]"], ["", "[1],", "[1][2]"]),
    ],
)  # fmt: skip
def test_texts_that_are_let_through_and_not(wish: StructuredOutputsParams, good: list[str], bad: list[str]) -> None:
    for text in good:
        assert accepts(wish, text), text
    for text in bad:
        assert not accepts(wish, text), text


def test_special_tokens_in_a_structural_tag_are_those_tokens() -> None:
    wish = tag(
        format={
            "type": "triggered_tags",
            "triggers": ["<|call|>"],
            "tags": [{"begin": "<|call|>f:", "content": {"type": "regex", "pattern": "[0-9]"}, "end": ";"}],
        }
    )
    assert accepts(wish, [*ids("hi "), BEGIN, *ids("f:1;")])
    assert accepts(wish, [*ids("spelled <|call|> is free text")])
    assert not accepts(wish, [BEGIN, *ids("g")])


def test_text_may_exclude_something() -> None:
    text = {"type": "any_text", "excludes": ["</a>", "x"]}
    wish = tag(format={"type": "tag", "begin": "<a>", "content": text, "end": "\n</a>;"})
    assert accepts(wish, "<a>any < word\n</a>;")
    assert not accepts(wish, "<a>any</a>\n</a>;")
    assert not accepts(wish, "<a>x\n</a>;")


def _refused(wish: StructuredOutputsParams) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        compiled_matcher(ll_tokenizer(VOCABULARY), grammar_of(wish, VOCABULARY))
    return str(caught.value)


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "not"),
        ({"type": "array", "contains": {"type": "integer"}}, "contains"),
        ({"if": {"type": "integer"}, "then": {}}, "if"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
        ({"type": "array", "minContains": 1}, "minContains"),
        ({"type": "array", "maxContains": 1}, "maxContains"),
        ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
        ({"then": {}}, "then"),
        ({"else": {}}, "else"),
        ({"$dynamicRef": "#a"}, "$dynamicRef"),
        ({"$dynamicAnchor": "a", "type": "null"}, "$dynamicAnchor"),
        ({"$recursiveRef": "#"}, "$recursiveRef"),
        ({"$ref": "#/$defs/none"}, "/$defs/none"),
        ({"$ref": "#", "type": "null"}, "circular references"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "minimum"),
        ({"type": "array", "minItems": 2, "maxItems": 1, "items": {"type": "null"}}, "minItems"),
        ({"type": "object", "patternProperties": {"^a": {"type": "null"}, "b$": {"type": "null"}}}, "not disjoint"),
        ({"type": "object", "properties": {"a": {"type": "null"}}, "minProperties": 1}, "min/maxProperties"),
        *[
            ({"type": "string", "format": name}, name)
            for name in ("uri-reference", "iri", "idn-email", "uri-template", "json-pointer", "regex")
        ],
        ({"type": "string", "format": "zip-code"}, "zip-code"),
        ({"type": "text"}, "text"),
        ({"$ref": "https://example.org/schema"}, "https://example.org/schema"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance"),
        ({}, "empty"),
        ("[1]", "list"),
        ("{", "not valid JSON"),
    ],
)
def test_schemas_that_cannot_be_kept_are_refused_by_name(schema: Any, name: str) -> None:
    assert name in _refused(S(json=schema))


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        (S(regex="("), "unclosed group"),
        (S(regex="a(?=b)"), "look-around"),
        (S(grammar="start: nothing"), "nothing"),
        (S(grammar="hello"), "GBNF"),
        (S(grammar='root ::= other'), "other"),
        (S(grammar="start: <|unknown|>"), "<|unknown|>"),
        (S(structural_tag="[]"), "cannot be read"),
        (tag(format={"type": "grammar", "grammar": "x"}), "grammar"),
        (tag(format={"type": "any_text", "excludes": [""]}), "excludes"),
        (tag(structures=[{"begin": "<a>", "schema": {}, "end": ""}], triggers=["<b"]), "<a>"),
        (tag(structures=[], triggers=["<b"]), "at least one tag"),
        (tag(format={"type": "sequence", "elements": []}), "without elements"),
    ],
)  # fmt: skip
def test_others_are_refused_by_what_is_wrong(wish: StructuredOutputsParams, name: str) -> None:
    assert name in _refused(wish)


@pytest.mark.parametrize(
    ("bounds", "good", "bad"),
    [
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, ["0.1", "0.49", "0.00001"], ["0", "0.0", "0.5", "-0"]),
        ({"exclusiveMinimum": 2, "maximum": 2.25}, ["2.1", "2.25"], ["2", "2.26"]),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, ["-1.5", "-1.01"], ["-1", "-1.0", "-1.6"]),
        ({"exclusiveMinimum": 0, "maximum": 1}, ["0.1", "1"], ["0", "0.0"]),
        ({"exclusiveMinimum": 0}, ["0.1", "1", "1000000"], ["0", "-1"]),
    ],
)
def test_open_intervals_leave_out_their_ends(bounds: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert accepts(S(json={"type": "number", **bounds}), text), text
    for text in bad:
        assert not accepts(S(json={"type": "number", **bounds}), text), text
        assert not accepts(tag(format={"type": "json_schema", "json_schema": {"type": "number", **bounds}}), text)


def test_properties_that_are_named_like_keywords_are_properties() -> None:
    inner = {"type": "object", "properties": {"enum": POINT, "properties": {"type": "null"}}}
    wish = S(json=inner, disable_additional_properties=True)
    assert accepts(wish, '{"enum":{"x":1},"properties":null}')
    assert not accepts(wish, '{"enum":{"x":1,"y":2}}')
    assert not accepts(wish, '{"additionalProperties":false}')


def test_closing_leaves_constants_and_what_the_schema_says() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"const": {"properties": {}}},
            "b": {"type": "object", "properties": {"c": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
            "d": {"type": "array", "items": POINT},
        },
    }
    wish = S(json=schema, disable_additional_properties=True)
    assert accepts(wish, '{"a":{"properties":{}},"b":{"c":null,"z":1},"d":[{"x":1}]}')
    assert not accepts(wish, '{"d":[{"x":1,"y":2}]}')
    assert not accepts(wish, '{"z":1}')
