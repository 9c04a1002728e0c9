"""Structured output over HTTP: the fields that ask for it, what reaches the engine, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import instructor
import msgspec
import pytest
from pydantic import BaseModel
from server_rig import READY, FakeEngine, Script, running

from octavo.protocol.structured import StructuredOutputsParams

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": "fake", "messages": [{"role": "user", "content": "hi"}]},
    PLAIN: {"model": "fake", "prompt": "hi"},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}
LEGACY = {"structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a"]}
S = StructuredOutputsParams


class Product(BaseModel):
    name: str
    price: float
    in_stock: bool
    tags: list[str]


async def test_parse_of_the_openai_client() -> None:
    value = Product(name="Nike", price=150.0, in_stock=True, tags=["shoes"])
    engine = FakeEngine(lambda _: Script(value.model_dump_json().encode()))
    async with running(engine) as rig:
        answer = await rig.openai.beta.chat.completions.parse(
            model="fake", messages=[{"role": "user", "content": "Extract"}], response_format=Product
        )
        assert answer.choices[0].message.parsed == value
        request = engine.requests[0]
        assert request.sampling.structured_outputs is not None
        assert request.sampling.structured_outputs.kind == "json"
        assert '"in_stock"' in (request.grammar or "")


async def test_instructor_in_its_json_mode() -> None:
    """Which asks for any object and shows the schema in the prompt alone: a matter of the model, so it is scripted."""
    value = Product(name="Nike", price=150.0, in_stock=True, tags=["shoes"])
    engine = FakeEngine(
        lambda _: Script(value.model_dump_json().encode()), ready=msgspec.structs.replace(READY, max_model_len=4096)
    )
    async with running(engine, max_model_len=4096) as rig:
        wrapped = instructor.from_openai(rig.openai, mode=instructor.Mode.JSON)
        messages: Any = [{"role": "user", "content": "Extract"}]
        answer = await wrapped.chat.completions.create(model="fake", messages=messages, response_model=Product)
        assert answer.model_dump() == value.model_dump()  # of a class that instructor derives
        assert engine.requests[0].sampling.structured_outputs == S(json_object=True)


async def test_every_way_to_ask_reaches_the_engine() -> None:
    cases: list[tuple[dict[str, Any], StructuredOutputsParams | None]] = [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "guided_json": None, "guided_json_object": False}, None),
        ({"response_format": {"type": "json_object"}}, S(json_object=True)),
        ({"response_format": FORMAT}, S(json=SCHEMA)),
        ({"response_format": {"type": "structural_tag", **LEGACY}},
         S(structural_tag=json.dumps({"type": "structural_tag", **LEGACY}, separators=(",", ":")))),
        ({"response_format": {"type": "structural_tag", "format": TAG}},
         S(structural_tag=json.dumps({"type": "structural_tag", "format": TAG}, separators=(",", ":")))),
        ({"structured_outputs": {"json": SCHEMA}}, S(json=SCHEMA)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, S(json=json.dumps(SCHEMA))),
        ({"structured_outputs": {"regex": "a+"}}, S(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, S(choice=["a", "b"])),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, S(grammar='root ::= "a"')),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
         S(json_object=True, disable_any_whitespace=True)),
        ({"structured_outputs": {"structural_tag": json.dumps({"format": TAG})}},
         S(structural_tag=json.dumps({"format": TAG}))),
        ({"response_format": FORMAT, "structured_outputs": {"disable_additional_properties": True}},
         S(json=SCHEMA, disable_additional_properties=True)),
        ({"guided_json": SCHEMA}, S(json=SCHEMA)),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?", "guided_decoding_backend": "auto"},
         S(json=SCHEMA, whitespace_pattern=" ?")),
        ({"guided_regex": "a+"}, S(regex="a+")),
        ({"guided_choice": ["a", "b"]}, S(choice=["a", "b"])),
        ({"guided_grammar": 'root ::= "a"'}, S(grammar='root ::= "a"')),
        ({"guided_json_object": True}, S(json_object=True)),
    ]  # fmt: skip
    async with running() as rig:
        for fields, expected in cases:
            for path, base in BASE.items():
                answer = await rig.http.post(path, json={**base, **fields})
                assert answer.status_code == 200, (fields, answer.text)
                request = rig.engine.requests[-1]
                assert request.sampling.structured_outputs == expected, fields
                assert (request.grammar is None) == (expected is None)


async def test_all_completions_and_streams_carry_the_grammar() -> None:
    async with running() as rig:
        body = {"model": "fake", "prompt": ["a", "b"], "n": 2, "guided_regex": "x", "stream": True}
        assert (await rig.http.post(PLAIN, json=body)).status_code == 200
        assert len({request.grammar for request in rig.engine.requests}) == 1
        assert len(rig.engine.requests) == 4
        assert rig.engine.requests[0].grammar is not None


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
    ({"response_format": {}}, "response_format.type", "type"),
    ({"response_format": 5}, "response_format", "int"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
     "response_format.json_schema.schema", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
     "response_format.json_schema.schema", "empty"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "array", "uniqueItems": True}}}},
     "response_format.json_schema.schema", "uniqueItems"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "foo": 1}}},
     "response_format.json_schema.foo", "foo"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "schema"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "structures"),
    ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "response_format.json_schema.schema and"),
    ({"structured_outputs": {}}, "structured_outputs", "no constraint"),
    ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.regex", "exclude each other"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "regexp"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "non-empty"),
    ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "non-empty"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice", "non-empty"),
    ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice", "array"),
    ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar", "non-empty"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "GBNF"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs.json", "empty"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", "True"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "cannot be read"),
    ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, "structured_outputs.regex", "json"),
    ({"structured_outputs": {"_backend": "xgrammar", "regex": "a"}}, "structured_outputs._backend", "_backend"),
    ({"guided_json": {}}, "guided_json", "empty"),
    ({"guided_json": "[]"}, "guided_json", "list"),
    ({"guided_choice": []}, "guided_choice", "non-empty"),
    ({"guided_regex": "("}, "guided_regex", "unclosed"),
    ({"guided_grammar": "x" * 300_000}, "guided_grammar", "bytes"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "guided_json"),
    ({"guided_regex": "a", "guided_decoding_backend": "outlines"}, "guided_decoding_backend", "outlines"),
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex", "guided_json and guided_regex"),
]  # fmt: skip


async def test_refusals_name_the_field_and_the_reason() -> None:
    async with running() as rig:
        for fields, param, words in REFUSED:
            for path, base in BASE.items():
                answer = await rig.http.post(path, json={**base, **fields})
                assert answer.status_code == 400, (fields, answer.text)
                error = answer.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert error["param"] == param, (fields, error)
                assert words in error["message"], (fields, error)
        assert rig.engine.requests == []
        await rig.healthy()


async def test_without_a_tokenizer_it_is_refused() -> None:
    async with running(tokenizer=None, chat_template=None) as rig:
        answer = await rig.http.post(PLAIN, json={"model": "fake", "prompt": [1], "guided_regex": "a"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "guided_regex"
        assert "tokenizer" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, PLAIN])
async def test_a_stream_that_is_refused_is_a_plain_400(path: str) -> None:
    async with running() as rig:
        for name, value in (
            ("guided_regex", "("),
            ("guided_grammar", 'start: "a" start'),
            ("guided_grammar", "start: start"),
            ("guided_json", {"$ref": "#"}),
        ):
            answer = await rig.http.post(path, json={**BASE[path], "stream": True, name: value})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == name
        assert rig.engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_grammar_that_comes_to_a_dead_end_is_the_request_s_fault(stream: bool) -> None:
    async with running(FakeEngine(lambda _: Script(fault="refuse"))) as rig:
        body = {"response_format": FORMAT, "stream": stream}
        answer = await rig.http.post(CHAT, json={**BASE[CHAT], **body})
        error = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
        assert answer.status_code == (200 if stream else 400)
        assert error["error"]["type"] == "invalid_request_error"
        assert error["error"]["param"] == "response_format.json_schema.schema"
        assert error["error"]["message"] == "the row failed"
