"""Sampling fields over HTTP: what of them reaches the engine, and what comes of best_of and of beams."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest
from server_rig import EOS, MAX_MODEL_LEN, FakeEngine, Script, running, until

from octavo.protocol.plan import TokenLogprobs
from octavo.protocol.repetition import RepetitionDetectionParams
from octavo.protocol.request import Request

PLAIN = "/v1/completions"
CHAT = "/v1/chat/completions"
BEAMS = {"model": "fake", "prompt": "hi", "use_beam_search": True, "n": 3, "max_tokens": 2}


async def test_token_lists_reach_the_engine_as_ids() -> None:
    async with running() as rig:
        body = {"model": "fake", "prompt": "hi", "bad_words": ["no", " x"], "allowed_token_ids": [5, 6]}
        assert (await rig.http.post(PLAIN, json=body)).status_code == 200
        sampling = rig.engine.requests[0].sampling
        assert sampling.bad_words is None
        assert sampling.bad_words_token_ids == [[110, 111], [32, 110, 111], [120], [32, 120]]
        assert sampling.allowed_token_ids == [5, 6]


async def test_truncated_prompts_keep_their_end_and_echo_it() -> None:
    async with running() as rig:
        body = {"model": "fake", "truncate_prompt_tokens": 3, "echo": True}
        for prompt in ("abcdef", list(b"abcdef"), [100] * MAX_MODEL_LEN + list(b"def")):
            answer = (await rig.http.post(PLAIN, json={**body, "prompt": prompt})).json()
            assert answer["choices"][0]["text"] == "defhello"
            assert answer["usage"]["prompt_tokens"] == 3
        assert [request.prompt_token_ids for request in rig.engine.requests] == [list(b"def")] * 3
        whole = {"model": "fake", "prompt": "x" * 600, "truncate_prompt_tokens": -1}
        assert (await rig.http.post(PLAIN, json=whole)).status_code == 200
        assert len(rig.engine.requests[-1].prompt_token_ids) == MAX_MODEL_LEN - 16
        messages = [{"role": "user", "content": "x" * 600}]
        chat = {"model": "fake", "messages": messages, "truncate_prompt_tokens": 20}
        assert (await rig.http.post(CHAT, json=chat)).status_code == 200
        assert bytes(rig.engine.requests[-1].prompt_token_ids).endswith(b"xxx\n<assistant>")
        assert len(rig.engine.requests[-1].prompt_token_ids) == 20


async def test_repetition_detection_reaches_the_engine_and_its_reason_the_client() -> None:
    class Repeats(FakeEngine):
        async def _outputs(self, request: Request, script: Script) -> Any:
            async for output in super()._outputs(request, script):
                yield msgspec.structs.replace(output, finish_reason=output.finish_reason and "repetition")

    wish = {"max_pattern_size": 4, "min_count": 3}
    async with running(Repeats()) as rig:
        for path, prompt in ((PLAIN, {"prompt": "a"}), (CHAT, {"messages": [{"role": "user", "content": "a"}]})):
            body = {"model": "fake", **prompt, "repetition_detection": wish}
            answer = await rig.http.post(path, json=body)
            assert answer.json()["choices"][0]["finish_reason"] == "repetition"
            detection = rig.engine.requests[-1].sampling.repetition_detection
            assert detection == RepetitionDetectionParams(max_pattern_size=4, min_count=3)
        assert (await rig.metrics())['vllm:request_success_total{finished_reason="repetition"}'] == 2
        for bad in (
            {"max_pattern_size": 257, "min_count": 2},
            {"max_pattern_size": 2, "min_count": 1},
            {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2},
            {"max_pattern_size": "2", "min_count": 2},
            {"max_pattern_size": 2, "min_count": 2, "more": 1},
            [],
        ):
            answer = await rig.http.post(PLAIN, json={"model": "fake", "prompt": "a", "repetition_detection": bad})
            assert answer.status_code == 400, bad
            assert answer.json()["error"]["param"].startswith("repetition_detection"), answer.text
        for name in ("extra_args", "vllm_xargs", "logprob_token_ids", "skip_reading_prefix_cache", "output_kind"):
            answer = await rig.http.post(PLAIN, json={"model": "fake", "prompt": "a", name: {"x": 1}})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def texts(request: Request) -> Script:
    """A text of its own for each seed, in one piece."""
    return Script(text=b"abcd"[request.sampling.seed % 4 :][:1], step=8)


def by_seed(scores: dict[int, float]) -> type[FakeEngine]:
    """An engine whose tokens have the log-probability that the request's seed, modulo 4, names."""

    class Scored(FakeEngine):
        async def _outputs(self, request: Request, script: Script) -> Any:
            async for output in super()._outputs(request, script):
                self.score = scores[request.sampling.seed % 4]
                entries = [TokenLogprobs(e.token_ids, [self.score, *e.logprobs[1:]], 1) for e in output.logprobs or ()]
                yield type(output)(output.request_id, output.new_token_ids, entries or None, None, output.finish_reason)

    return Scored


@pytest.mark.parametrize("path", [PLAIN, CHAT])
async def test_best_of_answers_with_the_likeliest_best_first(path: str) -> None:
    engine = by_seed({0: -3.0, 1: -0.5, 2: -4.0, 3: -1.0})(script=texts)
    async with running(engine) as rig:
        prompt = {"prompt": "hi"} if path == PLAIN else {"messages": [{"role": "user", "content": "hi"}]}
        answer = await rig.http.post(path, json={"model": "fake", **prompt, "n": 2, "best_of": 4, "seed": 0})
        choices = answer.json()["choices"]
        found = [choice["text"] if path == PLAIN else choice["message"]["content"] for choice in choices]
        assert found == ["b", "d"]
        assert [choice["index"] for choice in choices] == [0, 1]
        assert [choice["logprobs"] for choice in choices] == [None, None]
        assert [request.sampling.seed for request in rig.engine.requests] == [0, 1, 2, 3]
        assert answer.json()["usage"]["completion_tokens"] == 4 * 2  # what was made, an end each
        assert (await rig.metrics())['vllm:request_success_total{finished_reason="stop"}'] == 4


async def test_best_of_several_prompts_is_chosen_for_each() -> None:
    engine = by_seed({0: -3.0, 1: -0.5, 2: -4.0, 3: -1.0})(script=texts)
    async with running(engine) as rig:
        body = {"model": "fake", "prompt": ["x", "y"], "best_of": 3, "seed": 2, "logprobs": 1}
        choices = (await rig.http.post(PLAIN, json=body)).json()["choices"]
        assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "d"), (1, "d")]
        assert choices[0]["logprobs"]["token_logprobs"] == [-1.0, -1.0]


async def test_beams_are_searched_step_by_step() -> None:
    """The scripted engine tells of tokens 65, 66, ... at -2, -3, ... whatever came before, the last one impossible."""
    async with running() as rig:
        answer = await rig.http.post(PLAIN, json=BEAMS)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        assert [choice["text"] for choice in choices] == ["AA", "AB", "BA"]
        assert [(choice["index"], choice["finish_reason"]) for choice in choices] == [(i, "length") for i in range(3)]
        usage = answer.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 6)
        assert usage["prompt_tokens_details"]["cached_tokens"] == 4
        prompts = [bytes(request.prompt_token_ids) for request in rig.engine.requests]
        assert prompts == [b"hi", b"hiA", b"hiB", b"hiC"]
        assert {request.max_tokens for request in rig.engine.requests} == {1}
        assert {request.sampling.logprobs for request in rig.engine.requests} == {4}
        assert rig.engine.running == set()
        metrics = await rig.metrics()
        assert metrics['vllm:request_success_total{finished_reason="length"}'] == 1


async def test_beams_of_a_chat_and_of_several_prompts() -> None:
    async with running(generation_defaults={"temperature": 0.6, "top_p": 0.9}) as rig:
        body = {**BEAMS, "prompt": ["x", "y"], "n": 1, "best_of": 2}
        choices = (await rig.http.post(PLAIN, json=body)).json()["choices"]
        assert [choice["text"] for choice in choices] == ["AA", "AA"]
        chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "use_beam_search": True}
        answer = await rig.http.post(CHAT, json={**chat, "max_tokens": 3, "length_penalty": 0.5, "temperature": 0})
        assert answer.json()["choices"][0]["message"]["content"] == "AAA"


@pytest.mark.parametrize(("fault", "status"), [("error", 500), ("abort", 503), ("die", 503)])
async def test_a_step_that_fails_fails_the_search(fault: str, status: int) -> None:
    async with running(FakeEngine(script=lambda _: Script(text=b"", fault=fault))) as rig:
        answer = await rig.http.post(PLAIN, json=BEAMS)
        assert answer.status_code == status
        assert rig.engine.running == set()


async def test_a_client_that_leaves_ends_the_search() -> None:
    gate = asyncio.Event()
    async with running(FakeEngine(script=lambda _: Script(gate=gate))) as rig:
        with pytest.raises(httpx.ReadTimeout):
            await rig.http.post(PLAIN, json=BEAMS, timeout=0.2)
        await until(lambda: not rig.engine.running)
        assert len(rig.engine.aborted) == 1
        metrics = await rig.metrics()
        assert metrics['vllm:request_success_total{finished_reason="abort"}'] == 1


async def test_an_end_of_sequence_ends_a_beam() -> None:
    class Ending(FakeEngine):
        def _logprobs(self, number: int | None, ids: list[int]) -> list[TokenLogprobs] | None:
            return number and [TokenLogprobs([EOS, EOS, 65, 66], [-0.1, -0.1, -2.0, -3.0], 1) for _ in ids]

    async with running(Ending()) as rig:
        body = {**BEAMS, "n": 1, "early_stopping": True, "max_tokens": 5}
        for kept, text in ((False, ""), (True, "<eos>")):
            wish = {**body, "include_stop_str_in_output": kept, "skip_special_tokens": False}
            [choice] = (await rig.http.post(PLAIN, json=wish)).json()["choices"]
            assert (choice["text"], choice["finish_reason"]) == (text, "stop")
        [choice] = (await rig.http.post(PLAIN, json={**body, "ignore_eos": True})).json()["choices"]
        assert choice["finish_reason"] == "length"
