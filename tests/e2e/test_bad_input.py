"""What a client gets wrong, over a real socket, against the real engine: one 4xx each, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_process import ServerProcess

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OVER_LONG = [5] * 600  # the server's context is 512


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "prompt": "1, 2, 3,", "max_tokens": 4, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **fields}


CASES: list[tuple[str, Any, int, str | None]] = [
    # path, body (bytes go as they are), status, param
    (COMPLETIONS, b"", 400, None),
    (COMPLETIONS, b"[]", 400, None),
    (COMPLETIONS, b'"x"', 400, None),
    (COMPLETIONS, b"null", 400, None),
    (COMPLETIONS, b'{"model": "smollm2", "prompt": ', 400, None),
    (COMPLETIONS, b'{"model": "smollm2", "prompt": "a", "temperature": NaN}', 400, None),
    (COMPLETIONS, b'{"model": "smollm2", "prompt": "a", "temperature": 1e400}', 400, "temperature"),
    (COMPLETIONS, b"[" * 100_000, 400, None),
    (COMPLETIONS, b'{"model": "smollm2", "prompt": "\\ud800"}', 400, None),
    (COMPLETIONS, completion(model="gpt-4"), 404, "model"),
    (CHAT, chat(model="gpt-4"), 404, "model"),
    (COMPLETIONS, completion(model=5), 400, "model"),
    (COMPLETIONS, completion(prompt=""), 400, "prompt"),
    (COMPLETIONS, completion(prompt=[]), 400, "prompt"),
    (COMPLETIONS, completion(prompt=[[]]), 400, "prompt"),
    (COMPLETIONS, completion(prompt=[49152]), 400, "prompt"),
    (COMPLETIONS, completion(prompt=[-1]), 400, "prompt"),
    (COMPLETIONS, completion(prompt=OVER_LONG), 400, "prompt"),
    (COMPLETIONS, completion(prompt="a" * 3_000_000), 400, "prompt"),
    (COMPLETIONS, completion(max_tokens=0), 400, "max_tokens"),
    (COMPLETIONS, completion(max_tokens=-1), 400, "max_tokens"),
    (COMPLETIONS, completion(max_tokens=511), 400, "max_tokens"),
    (COMPLETIONS, completion(max_tokens="4"), 400, "max_tokens"),
    (COMPLETIONS, completion(max_tokens=1.5), 400, "max_tokens"),
    (COMPLETIONS, completion(n=0), 400, "n"),
    (COMPLETIONS, completion(n=129), 400, "n"),
    (COMPLETIONS, completion(n=True), 400, "n"),
    (COMPLETIONS, completion(temperature=2.01), 400, "temperature"),
    (COMPLETIONS, completion(temperature=-0.1), 400, "temperature"),
    (COMPLETIONS, completion(top_p=0), 400, "top_p"),
    (COMPLETIONS, completion(top_k=-2), 400, "top_k"),
    (COMPLETIONS, completion(min_p=1.1), 400, "min_p"),
    (COMPLETIONS, completion(presence_penalty=2.01), 400, "presence_penalty"),
    (COMPLETIONS, completion(repetition_penalty=0), 400, "repetition_penalty"),
    (COMPLETIONS, completion(stop=""), 400, "stop"),
    (COMPLETIONS, completion(stop=[5]), 400, "stop"),
    (COMPLETIONS, completion(stop_token_ids=[49152], min_tokens=1), 400, "stop_token_ids"),
    (COMPLETIONS, completion(stop_token_ids=[-1]), 400, "stop_token_ids"),
    (COMPLETIONS, completion(logit_bias={"49152": 1}), 400, "logit_bias"),
    (COMPLETIONS, completion(logit_bias={"abc": 1}), 400, "logit_bias"),
    (COMPLETIONS, completion(logit_bias={"5": 101}), 400, "logit_bias"),
    (COMPLETIONS, completion(logprobs=21), 400, "logprobs"),
    (COMPLETIONS, completion(min_tokens=5), 400, "min_tokens"),
    (COMPLETIONS, completion(allowed_token_ids=[3], stop_token_ids=[3], min_tokens=1), 400, None),
    (COMPLETIONS, completion(stream=True, prompt_logprobs=1), 400, "prompt_logprobs"),
    (COMPLETIONS, completion(suffix="x"), 400, "suffix"),
    (COMPLETIONS, completion(stream_options={"include_usage": True}), 400, "stream_options"),
    (CHAT, chat(messages=[]), 400, "messages"),
    (CHAT, chat(messages=[{"role": "user", "content": None}]), 400, "messages[0].content"),
    (CHAT, chat(messages=[{"role": "wizard", "content": "x"}]), 400, "messages[0].role"),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (CHAT, chat(tools=[]), 400, "tools"),
    (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="some"), 400, "tool_choice"),
    (CHAT, chat(response_format={"type": "json_schema"}), 400, "response_format.json_schema"),
    (CHAT, chat(guided_regex="("), 400, "guided_regex"),
    (CHAT, chat(guided_grammar='start: "a" start', stream=True), 400, "guided_grammar"),
    (CHAT, chat(guided_json={"type": "string", "maxLength": 10**23}), 400, "guided_json"),
]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, timeout=60, headers={"Content-Type": "application/json"}) as client:
        yield client


@pytest.mark.parametrize(("path", "body", "status", "param"), CASES)
def test_one_4xx_in_the_error_shape(
    client: httpx.Client, server: ServerProcess, path: str, body: Any, status: int, param: str | None
) -> None:
    before = server.metric("vllm:kv_cache_usage_perc")
    response = client.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"].startswith(param), error
    assert server.metric("vllm:kv_cache_usage_perc") == before
    assert server.metric("vllm:num_requests_running") == 0


def test_the_server_still_answers(client: httpx.Client) -> None:
    response = client.post(COMPLETIONS, json=completion(temperature=0))
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == " 4, "
