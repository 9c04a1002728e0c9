"""The main flows as the official client sees them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import openai
import pytest
from server_rig import EOS, FakeEngine, Script, running, until

USER = [{"role": "user", "content": "hi"}]


async def test_chat() -> None:
    async with running() as rig:
        answer = await rig.openai.chat.completions.create(model="fake", messages=USER)
        choice = answer.choices[0]
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hello", "stop")
        assert answer.id.startswith("chatcmpl-")
        assert (answer.object, answer.model, answer.system_fingerprint) == ("chat.completion", "fake", "octavo-1.2.3")
        prompt = b"<user>hi\n<assistant>"
        assert rig.engine.requests[0].prompt_token_ids == list(prompt)
        assert rig.engine.requests[0].max_tokens == 512 - len(prompt)
        assert rig.engine.requests[0].eos_token_ids == (EOS,)
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 6, len(prompt) + 6)
        assert usage.prompt_tokens_details.cached_tokens == 4
        assert rig.engine.aborted == []


async def test_chat_stream() -> None:
    async with running() as rig:
        stream = await rig.openai.chat.completions.create(
            model="org/alias", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "hello"
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 6 + ["stop"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 6
        assert len({chunk.id for chunk in chunks}) == 1
        assert {chunk.model for chunk in chunks} == {"fake"}


async def test_stream_is_sent_token_by_token() -> None:
    async with running(FakeEngine(lambda _: Script(b"ab", delay=0.05))) as rig:
        stream = await rig.openai.completions.create(model="fake", prompt="x", stream=True)
        times = [time.monotonic() async for chunk in stream if chunk.choices[0].text]
        assert len(times) == 2
        assert times[1] - times[0] > 0.03


async def test_raw_stream_ends_with_done_and_carries_usage_continuously() -> None:
    async with running() as rig:
        body = {"model": "fake", "prompt": "abc", "stream": True, "stream_options": {"continuous_usage_stats": True}}
        answer = await rig.http.post("/v1/completions", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        frames = answer.text.split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        assert '"completion_tokens":1,' in frames[0]
        assert '"completion_tokens":6,' in frames[-3]


@pytest.mark.parametrize("stream", [False, True])
async def test_n_completions_have_seeds_of_their_own(stream: bool) -> None:
    def script(request: object) -> Script:
        return Script(b"%d" % int(request.request_id[-1]), delay=0.01 * int(request.request_id[-1]))

    async with running(FakeEngine(script)) as rig:
        answer = await rig.openai.chat.completions.create(model="fake", messages=USER, n=3, seed=5, stream=stream)
        if stream:
            texts = ["", "", ""]
            async for chunk in answer:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        else:
            texts = [choice.message.content for choice in answer.choices]
            assert answer.usage.completion_tokens == 6
            assert answer.usage.prompt_tokens == len(rig.engine.requests[0].prompt_token_ids)
        assert texts == ["0", "1", "2"]
        assert [r.sampling.seed for r in rig.engine.requests] == [5, 6, 7]
        await rig.openai.chat.completions.create(model="fake", messages=USER, n=2)
        drawn = [r.sampling.seed for r in rig.engine.requests[3:]]
        assert len(set(drawn)) == 2
        assert all(seed >= 0 for seed in drawn)


async def test_several_prompts() -> None:
    async with running(FakeEngine(lambda r: Script(bytes(r.prompt_token_ids)))) as rig:
        answer = await rig.openai.completions.create(model="fake", prompt=["ab", "cd"], n=2)
        assert [choice.text for choice in answer.choices] == ["ab", "ab", "cd", "cd"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == 4
        assert answer.usage.prompt_tokens_details.cached_tokens == 8
        answer = await rig.openai.completions.create(model="fake", prompt=[[104, 105], [106]])
        assert [choice.text for choice in answer.choices] == ["hi", "j"]
        assert {r.max_tokens for r in rig.engine.requests} == {16}


async def test_stop_string_aborts_the_engine() -> None:
    async with running(FakeEngine(lambda _: Script(b"hello world" * 3))) as rig:
        answer = await rig.openai.completions.create(model="fake", prompt="x", stop=["lo wo"], max_tokens=30)
        assert answer.choices[0].text == "hel"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].model_extra["stop_reason"] == "lo wo"
        assert rig.engine.aborted == [rig.engine.requests[0].request_id]


async def test_max_tokens_ends_with_length() -> None:
    async with running() as rig:
        chat = rig.openai.chat.completions.create
        answer = await chat(model="fake", messages=USER, max_completion_tokens=2)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("he", "length")


async def test_chat_logprobs() -> None:
    async with running(FakeEngine(lambda _: Script(b"\xc3\xa9"))) as rig:
        chat = rig.openai.chat.completions.create
        answer = await chat(model="fake", messages=USER, logprobs=True, top_logprobs=2)
        content = answer.choices[0].logprobs.content
        assert answer.choices[0].message.content == "é"
        assert [(e.token, e.bytes, e.logprob) for e in content[:2]] == [("�", [0xC3], -1.0), ("�", [0xA9], -1.0)]
        assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("A", -2.0), ("B", -9999.0)]
        stream = await chat(model="fake", messages=USER, logprobs=True, top_logprobs=2, stream=True)
        streamed = [e async for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        assert streamed == content


async def test_completion_logprobs() -> None:
    async with running(FakeEngine(lambda _: Script(b"ab"))) as rig:
        create = rig.openai.completions.create
        logprobs = (await create(model="fake", prompt="xyz", logprobs=1)).choices[0].logprobs
        assert logprobs.tokens == ["a", "b", "<eos>"]
        assert logprobs.text_offset == [0, 1, 2]
        assert logprobs.token_logprobs == [-1.0] * 3
        assert logprobs.top_logprobs[0] == {"A": -9999.0, "a": -1.0}
        stream = await create(model="fake", prompt="xyz", logprobs=1, stream=True)
        offsets = [o async for c in stream if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset]
        assert offsets == [0, 1, 2]


async def test_echo() -> None:
    async with running(FakeEngine(lambda _: Script(b"ab"))) as rig:
        create = rig.openai.completions.create
        answer = await create(model="fake", prompt="xyz", echo=True, logprobs=0)
        logprobs = answer.choices[0].logprobs
        assert answer.choices[0].text == "xyzab"
        assert logprobs.tokens == ["x", "y", "z", "a", "b", "<eos>"]
        assert logprobs.token_logprobs == [None] + [-1.0] * 5
        scored = await create(model="fake", prompt=[120, 121], echo=True, logprobs=0, max_tokens=0)
        assert scored.choices[0].text == "xy"
        assert scored.choices[0].logprobs.token_logprobs == [None, -1.0]
        assert scored.usage.completion_tokens == 0
        stream = await create(model="fake", prompt=["x", "y"], echo=True, stream=True)
        texts = ["", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == ["xab", "yab"]


async def test_prompt_logprobs_and_token_ids() -> None:
    async with running(FakeEngine(lambda _: Script(b"a"))) as rig:
        extra = {"prompt_logprobs": 1, "return_token_ids": True}
        answer = await rig.openai.completions.create(model="fake", prompt="xy", extra_body=extra)
        choice = answer.choices[0].model_extra
        assert choice["token_ids"] == [97, EOS]
        assert choice["prompt_token_ids"] == [120, 121]
        assert choice["prompt_logprobs"] == [
            None,
            {
                "121": {"logprob": -1.0, "rank": 1, "decoded_token": "y"},
                "65": {"logprob": -9999.0, "rank": 1, "decoded_token": "A"},
            },
        ]
        chat = await rig.openai.chat.completions.create(model="fake", messages=USER, extra_body=extra)
        assert chat.choices[0].model_extra["token_ids"] == [97, EOS]
        assert len(chat.model_extra["prompt_logprobs"]) == chat.usage.prompt_tokens


async def test_a_streams_first_chunk_has_the_prompts_token_ids_and_every_chunk_its_usage() -> None:
    async with running(FakeEngine(lambda _: Script(b"ab"))) as rig:
        options: Any = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        extra = {"return_token_ids": True}
        stream = await rig.openai.completions.create(model="fake", prompt=["x", "yz"], **options, extra_body=extra)
        chunks = [chunk async for chunk in stream]
        shown: list[list[Any]] = [[], []]
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            shown[choice.index].append((choice.model_extra or {}).get("prompt_token_ids"))
        assert shown == [[[120], None, None], [[121, 122], None, None]]
        whole = await rig.openai.chat.completions.create(model="fake", messages=USER, n=2, extra_body=extra)
        prompt = whole.model_extra["prompt_token_ids"]
        stream = await rig.openai.chat.completions.create(model="fake", messages=USER, n=2, **options, extra_body=extra)
        chat = [chunk async for chunk in stream]
        assert [chunk.model_extra.get("prompt_token_ids") for chunk in chat] == [prompt] + [None] * (len(chat) - 1)
        assert [chunk.usage.prompt_tokens for chunk in chat] == [len(prompt)] * len(chat)
        assert all(chunk.usage for chunk in chunks)


async def test_fields_reach_the_engine() -> None:
    async with running(scheduling_policy="priority", generation_defaults={"temperature": 0.6, "top_k": 40}) as rig:
        extra = {"min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "stop_token_ids": [7], "ignore_eos": True}
        extra |= {"skip_special_tokens": False, "include_stop_str_in_output": True, "priority": -3, "cache_salt": "s"}
        await rig.openai.completions.create(
            model="fake", prompt="x", temperature=0.5, top_p=0.9, presence_penalty=1, frequency_penalty=-1, seed=3,
            logit_bias={"65": 5}, user="someone", extra_body=extra,
        )  # fmt: skip
        request = rig.engine.requests[0]
        assert (request.priority, request.cache_salt) == (-3, "s")
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.9, 40, 3)
        assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (1, -1, {65: 5})
        assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (0.1, 1.1, 2)
        assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.skip_special_tokens) == ([7], True, False)
        await rig.openai.completions.create(model="fake", prompt="x")
        assert rig.engine.requests[1].sampling.temperature == 0.6


async def test_chat_template_arguments() -> None:
    async with running() as rig:
        chat = rig.openai.chat.completions.create
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": parts}, {"role": "assistant", "content": "so"}]
        extra = {"continue_final_message": True}
        await chat(model="fake", messages=messages, extra_body=extra)
        await chat(model="fake", messages=USER, extra_body={"chat_template_kwargs": {"suffix": "!"}})
        prompts = [bytes(r.prompt_token_ids) for r in rig.engine.requests]
        assert prompts == [b"<developer>a\nb\n<assistant>so", b"<user>hi\n<assistant>!"]


async def test_models_version_and_request_id() -> None:
    async with running() as rig:
        assert [model.id async for model in rig.openai.models.list()] == ["fake", "org/alias"]
        assert (await rig.openai.models.retrieve("org/alias")).model_extra["max_model_len"] == 512
        with pytest.raises(openai.NotFoundError) as missing:
            await rig.openai.models.retrieve("other")
        assert missing.value.code == "model_not_found"
        assert (await rig.http.get("/version")).json() == {"version": "1.2.3"}
        for path in ("/health", "/ping"):
            answer = await rig.http.get(path)
            assert (answer.status_code, answer.content) == (200, b"")
        body = {"model": "fake", "prompt": "x"}
        both = await asyncio.gather(
            *(rig.http.post("/v1/completions", json=body, headers={"X-Request-Id": "my.id-1"}) for _ in range(2))
        )
        for answer in both:
            assert answer.headers["x-request-id"] == "my.id-1"
            assert answer.json()["id"] == "cmpl-my.id-1"
        bad = await rig.http.get("/version", headers={"X-Request-Id": "a b"})
        assert len(bad.headers["x-request-id"]) == 32


async def test_without_a_tokenizer() -> None:
    async with running(tokenizer=None, chat_template=None) as rig:
        extra = {"return_token_ids": True}
        answer = await rig.openai.completions.create(model="fake", prompt=[1, 2], max_tokens=2, extra_body=extra)
        assert answer.choices[0].text == ""
        assert answer.choices[0].model_extra["token_ids"] == list(b"he")
        for call, param in (
            (rig.openai.completions.create(model="fake", prompt="x"), "prompt"),
            (rig.openai.completions.create(model="fake", prompt=[1], stop="x"), "stop"),
            (rig.openai.chat.completions.create(model="fake", messages=USER), "messages"),
        ):
            with pytest.raises(openai.BadRequestError) as error:
                await call
            assert error.value.param == param


async def test_queued_stream_aborts_when_the_client_leaves() -> None:
    gate = asyncio.Event()
    async with running(FakeEngine(lambda _: Script(gate=gate))) as rig:
        task = asyncio.create_task(rig.openai.completions.create(model="fake", prompt="x", stream=True))
        await until(lambda: len(rig.engine.running) == 1)
        task.cancel()
        await until(lambda: len(rig.engine.aborted) == 1, 1.0)
