"""Structured output through the official client, on the real small model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from server_process import ServerProcess


class Shoe(BaseModel):
    price: int
    in_stock: bool


QUESTION = [{"role": "user", "content": "Extract: 'The shoe costs $150 and is in stock.'"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_parse_gives_an_instance(client: openai.OpenAI) -> None:
    answer = client.beta.chat.completions.parse(
        model="smollm2", messages=QUESTION, response_format=Shoe, temperature=0, max_tokens=40
    )
    assert isinstance(answer.choices[0].message.parsed, Shoe)
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_is_json_in_the_end(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    stream = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        stream=True,
        seed=3,
        max_tokens=40,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert set(json.loads(text)) == {"a"}


def test_choices_regexes_and_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="Is it? ", n=3, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert {choice.text for choice in answer.choices} <= {"yes", "no"}
    answer = client.completions.create(
        model="smollm2", prompt="Call ", extra_body={"guided_regex": "[0-9]{3}-[0-9]{4}"}
    )
    assert answer.choices[0].text[3] == "-"
    assert len(answer.choices[0].text) == 8


SUM = 'start: NUMBER (SIGN NUMBER){1,2}\nSIGN: "+" | "-"\nNUMBER: /[1-9][0-9]?/\n'
EBNF = 'root ::= "[" item ("," item)* "]"\nitem ::= "yes" | "no"\n'
WEATHER = {
    "type": "object",
    "properties": {"degrees": {"type": "integer", "minimum": -9, "maximum": 40}},
    "required": ["degrees"],
    "additionalProperties": False,
}
STRUCTURES = {"structures": [{"begin": "<now>", "schema": WEATHER, "end": "</now>"}], "triggers": ["<"]}
TAG = {"type": "tag", "begin": "<now>", "content": {"type": "json_schema", "json_schema": WEATHER}, "end": "</now>"}
LESS, COMMA = "44", "28"  # ids


def asked(client: openai.OpenAI, **fields: Any) -> str:
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=30, seed=1, temperature=0.5, extra_body=fields
    )
    [choice] = answer.choices
    assert choice.finish_reason == "stop", choice
    return choice.message.content or ""


def test_grammars_in_lark_and_in_ebnf(client: openai.OpenAI) -> None:
    assert re.fullmatch(r"[1-9]\d?([+-][1-9]\d?){1,2}", asked(client, structured_outputs={"grammar": SUM}))
    # A list may go on, so it is asked to end.
    text = asked(client, guided_grammar=EBNF, logit_bias={COMMA: -100})
    assert re.fullmatch(r"\[(yes|no)(,(yes|no))*\]", text)


@pytest.mark.parametrize("form", ["structures", "format", "text"])
def test_structural_tags(client: openai.OpenAI, form: str) -> None:
    fields: dict[str, Any] = {"response_format": {"type": "structural_tag", "format": TAG}}
    if form == "structures":  # free text up to the trigger, which is made likely
        fields = {"response_format": {"type": "structural_tag", **STRUCTURES}, "logit_bias": {LESS: 100}}
    elif form == "text":
        fields = {"structured_outputs": {"structural_tag": json.dumps({"format": TAG})}}
    text = asked(client, **fields, stop=["</now>"], include_stop_str_in_output=True)
    assert text.startswith("<now>")
    assert text.endswith("</now>")
    value = json.loads(text.removeprefix("<now>").removesuffix("</now>"))
    assert -9 <= value.pop("degrees") <= 40
    assert not value


LACKING = "\U0006e51b"  # the model's tokens lack a byte of it


@pytest.mark.parametrize(
    "wish",
    [
        {"regex": f"ab{LACKING}"},
        {"choice": [LACKING]},
        {"grammar": f'start: "{LACKING}"'},
        {"grammar": f'root ::= "a" "{LACKING}"'},
        {"json": {"const": LACKING}},
        {"json": {"type": "object", "properties": {LACKING: {}}, "required": [LACKING], "additionalProperties": False}},
    ],
    ids=str,
)
def test_what_no_tokens_spell_is_the_request_s_fault(client: openai.OpenAI, wish: dict[str, Any]) -> None:
    [kind] = wish
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="smollm2", prompt="Say: ", extra_body={"structured_outputs": wish})
    assert refusal.value.param == f"structured_outputs.{kind}"
