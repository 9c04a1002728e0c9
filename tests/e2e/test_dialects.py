"""The other routes of a real server, through the clients that people use."""

from __future__ import annotations

import math
from typing import Any

import anthropic
import httpx
import openai
import pytest
from server_process import ServerProcess

from octavo.cli import main

QUESTION = "What is the capital of France? Answer in one word."


def test_one_question_in_three_dialects(server: ServerProcess) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
        chat = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=10)
        text = chat.choices[0].message.content
        assert text
        response = client.responses.create(model="smollm2", input=QUESTION, temperature=0, max_output_tokens=10)
        assert response.output_text == text
        stream = client.responses.create(
            model="smollm2", input=QUESTION, temperature=0, max_output_tokens=10, stream=True
        )
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == text
        more = client.responses.create(
            model="smollm2", input="And of Italy?", previous_response_id=response.id, temperature=0, max_output_tokens=2
        )
        assert more.usage is not None
        assert response.usage is not None
        assert more.usage.input_tokens > response.usage.total_tokens
    with anthropic.Anthropic(base_url=server.base_url, api_key="none") as other:
        fields: dict[str, Any] = {"model": "smollm2", "max_tokens": 10, "messages": messages}
        fields["extra_body"] = {"temperature": 0}  # the client has no name for it
        assert other.messages.create(**fields).content[0].text == text
        with other.messages.stream(**fields) as events:
            assert "".join(events.text_stream) == text
        count = other.messages.count_tokens(model="smollm2", messages=messages).input_tokens
    assert chat.usage is not None
    assert count == chat.usage.prompt_tokens


def test_embeddings_and_what_is_made_of_them(server: ServerProcess) -> None:
    texts = ["A cat is sitting on a mat.", "Interest rates rose by two percent."]
    query = "The cat sat on the mat."
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none") as client:
        found = client.embeddings.create(model="smollm2", input=[query, *texts], extra_body={"pooling": "mean"})
    first, *others = [each.embedding for each in found.data]
    assert math.hypot(*first) == pytest.approx(1, abs=1e-5)
    near = [sum(x * y for x, y in zip(first, other)) for other in others]
    assert near[0] > near[1]
    body = {"model": "smollm2", "query": query, "documents": texts[::-1], "pooling": "mean"}
    ranked = httpx.post(f"{server.base_url}/v1/rerank", json=body, timeout=30).json()["results"]
    assert [each["index"] for each in ranked] == [1, 0]
    assert [each["relevance_score"] for each in ranked] == pytest.approx(near, abs=1e-4)


def test_tokens_and_the_terminal(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = httpx.post(f"{server.base_url}/tokenize", json={"prompt": "héllo <|im_end|>"}).json()["tokens"]
    assert httpx.post(f"{server.base_url}/detokenize", json={"tokens": tokens}).json()["prompt"] == "héllo <|im_end|>"
    words = ["complete", "--url", server.base_url, "--max-tokens", "3", "-q", "1, 2, 3, 4,"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("1, 2, 3, 4,")
