"""What the server makes of requests by its options: strict, max_request_cost; and what it says of old names."""

from __future__ import annotations

import logging

import pytest
from request_bodies import BASE, ROUTES, USER
from server_rig import running

from octavo.config import ServerOptions
from octavo.server.openai import decode
from octavo.server.openapi import OPERATIONS


async def test_strict_servers_refuse_unknown_fields() -> None:
    async with running(options=ServerOptions(strict=True)) as rig:
        for struct, base in BASE.items():
            answer = await rig.http.post(ROUTES[struct].path, json={**base, "modle": 1})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "modle"
            assert "did you mean 'model'?" in answer.json()["error"]["message"]


COSTS = [
    ("CompletionBody", {"max_tokens": 101}, "max_tokens"),
    ("CompletionBody", {"n": 11, "max_tokens": 10}, "n"),
    ("CompletionBody", {"best_of": 11, "max_tokens": 10}, "best_of"),
    ("CompletionBody", {"logprobs": 20, "max_tokens": 5}, "logprobs"),
    ("CompletionBody", {"prompt": ["a"] * 6, "max_tokens": 20}, "max_tokens"),
    ("CompletionBody", {"prompt": "a" * 101, "max_tokens": 1}, "prompt"),
    ("CompletionBody", {"prompt": "a" * 10, "prompt_logprobs": 10, "max_tokens": 1}, "prompt_logprobs"),
    ("CompletionBody", {"use_beam_search": True, "n": 10, "max_tokens": 11}, "max_tokens"),
    ("ChatBody", {"max_completion_tokens": 101}, "max_completion_tokens"),
    ("ChatBody", {"logprobs": True, "top_logprobs": 20, "max_tokens": 6}, "top_logprobs"),
    ("ResponsesBody", {"max_output_tokens": 101}, "max_output_tokens"),
    ("MessagesBody", {"max_tokens": 101}, "max_tokens"),
]


async def test_a_request_above_the_cost_cap_is_refused_by_its_largest_factor() -> None:
    async with running(options=ServerOptions(max_request_cost=100, max_waiting_requests=100)) as rig:
        for struct, fields, param in COSTS:
            answer = await rig.http.post(ROUTES[struct].path, json={**BASE[struct], **fields})
            assert answer.status_code == 400, (fields, answer.text)
            assert answer.json()["error"]["param"] == param, (fields, answer.text)
            assert "1..100" in answer.json()["error"]["message"]
        assert rig.engine.requests == []
        fits = {**BASE["CompletionBody"], "n": 10, "max_tokens": 10}
        assert (await rig.http.post("/v1/completions", json=fits)).status_code == 200


async def test_old_names_work_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    decode.warn_of_old_name.cache_clear()
    messages = [*USER, {"role": "assistant", "content": "a", "reasoning_content": "b"}, *USER]
    async with running() as rig:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                body = {"model": "fake", "messages": messages, "guided_regex": "a+", "max_tokens": 5}
                assert (await rig.http.post("/v1/chat/completions", json=body)).status_code == 200
    said = [record.getMessage().split(",")[0] for record in caplog.records if "is now called" in record.getMessage()]
    assert sorted(said) == [
        "requests use guided_regex",
        "requests use max_tokens",
        "requests use messages[].reasoning_content",
    ]


async def test_other_methods_and_odd_queries_and_headers_are_answered_in_shape() -> None:
    async with running(options=ServerOptions(drain_timeout=5.0)) as rig:
        methods = {operation.path: set[str]() for operation in OPERATIONS}
        for operation in OPERATIONS:
            methods[operation.path].add(operation.method.upper())
        for path, taken in methods.items():
            for method in {"TRACE", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECTED"} - taken:
                answer = await rig.http.request(method, path.replace("{model}", "fake"))
                assert answer.status_code == 405, (method, path)
                assert taken & {*answer.headers["Allow"].split(", ")}
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        for query in (b"?a=%ff", b"?%", b"?&&=&", b"?" + b"a" * 4000):
            request = b"GET /v1/models%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % query
            assert (await rig.raw(request)).startswith(b"HTTP/1.1 200")
        for header in (b"X: a\x00b", b"X y: 1", b": 1", b"Content-Length: -1", b"Transfer-Encoding: x"):
            answered = await rig.raw(b"POST /tokenize HTTP/1.1\r\nHost: x\r\n%b\r\nConnection: close\r\n\r\n" % header)
            head, _, body = answered.partition(b"\r\n\r\n")
            assert head.split()[1] in (b"400", b"415", b"501"), (header, answered)
            assert b'"error":{' in body
        await rig.healthy()


async def test_parameters_of_the_query_are_refused_where_strict() -> None:
    async with running() as rig:
        for struct, body in BASE.items():
            answer = await rig.http.post(f"{ROUTES[struct].path}?api-version=2", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "api-version"), answer.text
        for path in ("/v1/models", "/v1/models/fake"):
            answer = await rig.http.get(f"{path}?limit=3")
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_parameter")
        messages = ROUTES["MessagesBody"].path
        assert (await rig.http.post(f"{messages}?beta=true", json=BASE["MessagesBody"])).status_code == 200
