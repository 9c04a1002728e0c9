"""Structured output through the official client, on the real small model."""

from __future__ import annotations

import json
from collections.abc import Iterator

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
