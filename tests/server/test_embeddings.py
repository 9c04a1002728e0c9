"""/v1/embeddings, /v1/score and /v1/rerank: what clients get, every field, and what is refused."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest
from server_rig import EOS, MAX_MODEL_LEN, FakeEngine, Script, running, until

from octavo.config import OutputFacts, ServerOptions
from octavo.protocol.pooling import PoolingParams

SCORED = PoolingParams("score", normalize=False)
MESSAGES = {"messages": [{"role": "user", "content": "x"}]}
GENERATION: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/chat/completions", MESSAGES),
    ("/v1/chat/completions", {**MESSAGES, "stream": True}),
    ("/v1/responses", {"input": "x"}),
    ("/v1/messages", {**MESSAGES, "max_tokens": 5}),
]
EMBEDDINGS, SCORE, RERANK = "/v1/embeddings", "/v1/score", "/v1/rerank"


def at(character: str) -> list[float]:
    """The rig's embedding of a text that ends so."""
    return [math.cos(math.radians(ord(character))), math.sin(math.radians(ord(character)))]


async def test_the_client_reads_both_encodings() -> None:
    async with running() as rig:
        for extra in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = await rig.openai.embeddings.create(model="org/alias", input=["ab", "xyz"], **extra)
            assert [each.index for each in answer.data] == [0, 1]
            assert (answer.object, answer.model, answer.data[0].object) == ("list", "fake", "embedding")
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)
            if extra.get("encoding_format") != "base64":  # asked for by name, the client leaves it as it is
                assert answer.data[0].embedding == pytest.approx(at("b"), abs=1e-6)
                assert answer.data[1].embedding == pytest.approx(at("z"), abs=1e-6)
        assert {r.max_tokens for r in rig.engine.requests} == {1}


async def test_inputs_and_fields() -> None:
    async with running(scheduling_policy="priority") as rig:
        for given, prompts in (
            ("ab", [b"ab"]),
            ([97, 98], [b"ab"]),
            ([[97], [98, 99]], [b"a", b"bc"]),
        ):
            rig.engine.requests.clear()
            await rig.openai.embeddings.create(model="fake", input=given, user="me")
            assert [bytes(r.prompt_token_ids) for r in rig.engine.requests] == prompts
            assert {r.pooling for r in rig.engine.requests} == {PoolingParams("last")}
        extra = {"pooling": "mean", "priority": 3, "cache_salt": "s"}
        answer = await rig.openai.embeddings.create(model="fake", input="ab", extra_body=extra)
        request = rig.engine.requests[-1]
        assert (request.pooling, request.priority, request.cache_salt) == (PoolingParams("mean"), 3, "s")
        assert answer.data[0].embedding == pytest.approx(at("a"), abs=1e-6)
        metrics = await rig.metrics()
        assert metrics['vllm:request_success_total{finished_reason="length"}'] == 5


async def test_score() -> None:
    async with running() as rig:

        async def scores(**body: Any) -> list[float]:
            answer = await rig.http.post(SCORE, json={"model": "fake", **body})
            assert answer.status_code == 200, answer.text
            assert [each["index"] for each in answer.json()["data"]] == list(range(len(answer.json()["data"])))
            return [each["score"] for each in answer.json()["data"]]

        def near(a: str, b: str) -> Any:
            return pytest.approx(math.cos(math.radians(ord(a) - ord(b))), abs=1e-6)

        assert await scores(text_1="a", text_2="z") == [near("a", "z")]
        assert await scores(queries="a", documents=["a", "c"]) == [near("a", "a"), near("a", "c")]
        assert await scores(data_1=["a", "b"], data_2=["c", "b"]) == [near("a", "c"), near("b", "b")]


async def test_rerank() -> None:
    async with running() as rig:
        body = {"model": "fake", "query": "d", "documents": ["z", "e", {"text": "d"}]}
        for path in (RERANK, "/v2/rerank", "/rerank"):
            answer = (await rig.http.post(path, json=body)).json()
            assert [each["index"] for each in answer["results"]] == [2, 1, 0]
            assert answer["results"][0]["document"] == {"text": "d"}
            assert answer["results"][0]["relevance_score"] == pytest.approx(1)
            assert answer["usage"]["total_tokens"] == 4
        best = (await rig.http.post(RERANK, json={**body, "top_n": 1, "return_documents": False})).json()["results"]
        assert [set(each) for each in best] == [{"index", "relevance_score"}]


BAD = [
    (EMBEDDINGS, {"input": []}, "input"),
    (EMBEDDINGS, {"input": ""}, "input"),
    (EMBEDDINGS, {"input": ["a", ""]}, "input"),
    (EMBEDDINGS, {"input": ["a", 1]}, "input"),
    (EMBEDDINGS, {"input": [EOS + 1]}, "input"),
    (EMBEDDINGS, {"input": ["a"] * 2049}, "input"),
    (EMBEDDINGS, {"input": ["a"] * 17}, "input"),  # more than the server ever takes at once
    (EMBEDDINGS, {"input": "x" * MAX_MODEL_LEN}, "input"),
    (EMBEDDINGS, {"input": "x", "dimensions": 8}, "dimensions"),
    (EMBEDDINGS, {"input": "x", "encoding_format": "bytes"}, "encoding_format"),
    (EMBEDDINGS, {"input": "x", "pooling": "cls"}, "pooling"),
    (EMBEDDINGS, {"input": "x", "normalize": "no"}, "normalize"),
    (EMBEDDINGS, {"input": "x", "priority": 1}, "priority"),
    (EMBEDDINGS, {"input": "x", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    (EMBEDDINGS, {"input": "x", "temperature": 1}, "temperature"),
    (SCORE, {"text_1": "a"}, "data_2"),
    (SCORE, {"text_1": "a", "queries": "b", "text_2": "c"}, "queries"),
    (SCORE, {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
    (SCORE, {"text_1": "a", "documents": [""]}, "documents"),
    (SCORE, {"text_1": "a", "text_2": "b", "use_activation": True}, "use_activation"),
    (SCORE, {"text_1": "a", "text_2": "b", "softmax": True}, "softmax"),
    (RERANK, {"query": "", "documents": ["a"]}, "query"),
    (RERANK, {"query": "x" * MAX_MODEL_LEN, "documents": ["a"]}, "query"),
    (RERANK, {"query": "a", "documents": ["b", "x" * MAX_MODEL_LEN]}, "documents"),
    (RERANK, {"query": "a", "documents": []}, "documents"),
    (RERANK, {"query": "a", "documents": [{"image": "x"}]}, None),
    (RERANK, {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
    (RERANK, {"query": "a", "documents": ["b"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
]


async def test_refusals_name_the_field() -> None:
    async with running() as rig:
        for path, fields, param in BAD:
            answer = await rig.http.post(path, json={"model": "fake", **fields})
            assert answer.status_code == 400, (fields, answer.text)
            assert param is None or answer.json()["error"]["param"] == param, (fields, answer.text)
        assert rig.engine.requests == []
        for path, body in ((EMBEDDINGS, {"input": "x"}), (SCORE, {}), (RERANK, {"query": "x", "documents": ["y"]})):
            assert (await rig.http.post(path, json=body)).json()["error"]["param"] == "model"
        assert (await rig.http.post(EMBEDDINGS, json={"model": "gpt", "input": "x"})).status_code == 404
        assert (await rig.http.post(EMBEDDINGS, json={"model": "fake", "input": "x", "normalize": True})).is_success


async def test_a_model_says_how_its_embeddings_are_made() -> None:
    facts = OutputFacts(
        head="embeddings", pooling="mean", normalize=False, prefix="q: ", dimensions=(1, 2), hidden_size=2
    )
    async with running(outputs=facts) as rig:
        await rig.openai.embeddings.create(model="fake", input="ab")
        assert bytes(rig.engine.requests[-1].prompt_token_ids) == b"q: ab"
        assert rig.engine.requests[-1].pooling == PoolingParams("mean", normalize=False)
        await rig.openai.embeddings.create(
            model="fake", input=[97], dimensions=1, extra_body={"normalize": True, "pooling": "last"}
        )
        assert rig.engine.requests[-1].prompt_token_ids == [97]
        assert rig.engine.requests[-1].pooling == PoolingParams("last", dimensions=1)
        answer = await rig.http.post(EMBEDDINGS, json={"model": "fake", "input": "x", "dimensions": 3})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "dimensions")
        assert "allowed: 1, 2" in answer.json()["error"]["message"]
        await rig.http.post(SCORE, json={"model": "fake", "text_1": "a", "text_2": "b"})
        assert rig.engine.requests[-1].pooling == PoolingParams("mean")  # cosines are of vectors of length 1
        rig.engine.requests.clear()
        for path, prompt in GENERATION:
            answer = await rig.http.post(path, json={"model": "fake", **prompt})
            assert answer.status_code == 400, (path, answer.text)
            assert "has no language head" in answer.text
        assert rig.engine.requests == []


async def test_a_model_that_scores_reads_both_texts_at_once() -> None:
    async with running(outputs=OutputFacts(head="scores")) as rig:
        body = {"model": "fake", "query": "ab", "documents": ["x", "xyz"]}
        answer = (await rig.http.post(RERANK, json=body)).json()
        assert [bytes(request.prompt_token_ids) for request in rig.engine.requests] == [b"abx", b"abxyz"]
        assert {request.pooling for request in rig.engine.requests} == {SCORED}
        assert [each["index"] for each in answer["results"]] == [1, 0]
        scores = [each["relevance_score"] for each in answer["results"]]
        assert scores == pytest.approx([1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-0.3))])
        assert answer["usage"]["total_tokens"] == 8
        pairs = {"model": "fake", "text_1": ["ab", "c"], "text_2": ["x", "xyz"], "use_activation": False}
        answer = (await rig.http.post(SCORE, json=pairs)).json()
        assert [each["score"] for each in answer["data"]] == pytest.approx([0.3, 0.4])
        for path, fields, param in (
            (EMBEDDINGS, {"input": "x"}, "model"),
            (SCORE, {"text_1": "a", "text_2": "b", "pooling": "last"}, "pooling"),
            (RERANK, {"query": "a", "documents": ["x" * MAX_MODEL_LEN]}, "documents"),
            (SCORE, {"text_1": "", "text_2": ""}, "text_2"),
        ):
            answer = await rig.http.post(path, json={"model": "fake", **fields})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_a_chat_template_given_to_the_server_joins_query_and_document() -> None:
    options = ServerOptions(chat_template="given.jinja", max_waiting_requests=8)
    async with running(outputs=OutputFacts(head="scores"), options=options) as rig:
        await rig.http.post(SCORE, json={"model": "fake", "text_1": "a", "text_2": "b"})
        assert bytes(rig.engine.requests[-1].prompt_token_ids) == b"<query>a\n<document>b\n<assistant>"


async def test_one_that_fails_ends_all() -> None:
    gate = asyncio.Event()

    def script(request: Any) -> Script:
        return Script(fault="error") if request.prompt_token_ids == [98] else Script(gate=gate)

    async with running(FakeEngine(script)) as rig:
        with pytest.raises(openai.InternalServerError, match="the row failed"):
            await rig.openai.embeddings.create(model="fake", input=["a", "b", "c"])
        assert len(rig.engine.aborted) == 2
        assert not rig.engine.running
    async with running(FakeEngine(lambda _: Script(fault="die"))) as rig:
        for _ in range(2):
            answer = await rig.http.post(EMBEDDINGS, json={"model": "fake", "input": ["a", "b"]})
            assert answer.status_code == 503


async def test_a_client_that_leaves_a_full_server_and_a_key() -> None:
    gate = asyncio.Event()
    options = ServerOptions(api_key=("k",), max_waiting_requests=8)
    async with running(FakeEngine(lambda _: Script(gate=gate)), options=options) as rig:
        assert (await rig.http.post(EMBEDDINGS, json={"model": "fake", "input": "x"})).status_code == 401
        task = asyncio.create_task(rig.openai.embeddings.create(model="fake", input=["a"] * 10))
        await until(lambda: len(rig.engine.running) == 10)
        with pytest.raises(openai.RateLimitError):
            await rig.openai.embeddings.create(model="fake", input=["a"] * 7)
        task.cancel()
        await until(lambda: len(rig.engine.aborted) == 10, 1.0)
