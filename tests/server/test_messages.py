"""/v1/messages as the `anthropic` client sees it: whole, streamed, refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from server_rig import FakeEngine, Rig, Script, running, until

from octavo.config import ServerOptions

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER: list[Any] = [{"role": "user", "content": "hi"}]


@contextlib.asynccontextmanager
async def connected(rig: Rig, **auth: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    # verify=False: as in the rig, to save the time that reading certificates takes.
    inner = anthropic.DefaultAsyncHttpxClient(verify=False)
    base = f"http://127.0.0.1:{rig.port}"
    auth = auth or {"api_key": "none"}
    async with anthropic.AsyncAnthropic(base_url=base, max_retries=0, timeout=10, http_client=inner, **auth) as client:
        yield client


def prompt(rig: Rig, index: int = -1) -> str:
    return bytes(rig.engine.requests[index].prompt_token_ids).decode()


async def test_create() -> None:
    async with running() as rig, connected(rig) as client:
        answer = await client.messages.create(model="org/alias", max_tokens=50, system="be kind", messages=USER)
        assert prompt(rig) == "<system>be kind\n<user>hi\n<assistant>"
        assert (answer.type, answer.role, answer.model) == ("message", "assistant", "fake")
        assert [(block.type, block.text) for block in answer.content] == [("text", "hello")]
        assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
        assert answer.id.startswith("msg_")
        usage = answer.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (len(prompt(rig)) - 4, 4, 6)
        assert rig.engine.requests[0].max_tokens == 50


async def test_stream() -> None:
    async with running(FakeEngine(lambda _: Script("hé!".encode()))) as rig, connected(rig) as client:
        stream = await client.messages.create(model="fake", max_tokens=50, messages=USER, stream=True)
        events = [event async for event in stream]
        assert [event.type for event in events] == [
            *("message_start", "content_block_start"),
            *["content_block_delta"] * 3,
            *("content_block_stop", "message_delta", "message_stop"),
        ]
        start = events[0].message
        assert (start.content, start.stop_reason) == ([], None)
        assert start.usage.input_tokens == len(prompt(rig)) - 4
        assert "".join(event.delta.text for event in events[2:5]) == "hé!"
        assert events[-2].delta.stop_reason == "end_turn"
        assert events[-2].usage.output_tokens == 5
        # The client's own accumulation agrees.
        async with client.messages.stream(model="fake", max_tokens=3, messages=USER) as accumulated:
            final = await accumulated.get_final_message()
        assert (final.content[0].text, final.stop_reason, final.usage.output_tokens) == ("hé", "max_tokens", 3)


async def test_raw_events_carry_their_names_and_no_done() -> None:
    async with running() as rig:
        answer = await rig.http.post(PATH, json={"model": "fake", "max_tokens": 9, "messages": USER, "stream": True})
        frames = answer.text.strip().split("\n\n")
        for frame in frames:
            event, data = frame.split("\n")
            assert event == f"event: {json.loads(data.removeprefix('data: '))['type']}"
        assert frames[-1] == 'event: message_stop\ndata: {"type":"message_stop"}'


async def test_stop_sequences_and_sampling() -> None:
    async with running(scheduling_policy="priority") as rig, connected(rig) as client:
        extra = {
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "seed": 3,
            "ignore_eos": True,
            "priority": 1,
            "cache_salt": "s",
        }
        answer = await client.messages.create(
            model="fake", max_tokens=20, messages=USER, stop_sequences=["x", "lo"], metadata={"user_id": "me"},
            extra_body={**extra, "temperature": 0.5, "top_p": 0.9, "top_k": 4},
        )  # fmt: skip
        assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("hel", "stop_sequence", "lo")
        request = rig.engine.requests[0]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 4, 0.1)
        assert (sampling.seed, sampling.repetition_penalty, sampling.ignore_eos) == (3, 1.1, True)
        assert (request.priority, request.cache_salt) == (1, "s")


async def test_turns() -> None:
    async with running() as rig, connected(rig) as client:
        cached = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
        first = await client.messages.create(model="fake", max_tokens=9, messages=USER)
        messages: list[Any] = [
            *({"role": "user", "content": "a"}, {"role": "user", "content": [cached]}),
            {"role": "assistant", "content": [block.model_dump() for block in first.content]},
            {"role": "user", "content": "c"},
        ]
        system: Any = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
        await client.messages.create(model="fake", max_tokens=9, system=system, messages=messages)
        so_far = "<system>x\ny\n<user>a\nb\n<assistant>hello\n<user>c\n<assistant>"
        assert prompt(rig) == so_far
        count = await client.messages.count_tokens(model="fake", system=system, messages=messages)
        assert count.input_tokens == len(so_far)
        # The assistant's own turn at the end is continued.
        messages.append({"role": "assistant", "content": "so"})
        await client.messages.create(model="fake", max_tokens=9, system=system, messages=messages)
        assert prompt(rig) == f"{so_far.removesuffix('<assistant>')}<assistant>so"


BAD = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 600}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, None),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"temperature": 3}, "temperature"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
    ({"n": 2}, "n"),
    ({"stop": ["x"]}, "stop"),
]


async def test_refusals_have_anthropics_shape_and_name_the_field() -> None:
    async with running() as rig, connected(rig) as client:
        for fields, param in BAD:
            answer = await rig.http.post(PATH, json={"model": "fake", "max_tokens": 9, "messages": USER, **fields})
            assert answer.status_code == 400, (fields, answer.text)
            body = answer.json()
            assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
            assert param is None or body["error"]["param"] == param, (fields, body)
        assert rig.engine.requests == []
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(model="other", max_tokens=9, messages=USER)
        assert missing.value.body == {
            "type": "error",
            "error": {"type": "not_found_error", "message": "The model 'other' does not exist", "param": "model"},
        }
        answer = await rig.http.post(COUNT, json={"model": "fake", "messages": USER, "max_tokens": 9})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
        rig.engine.running = {str(n) for n in range(16)}
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(model="fake", max_tokens=9, messages=USER)


async def test_errors_of_the_engine() -> None:
    async with running(FakeEngine(lambda _: Script(fault="error"))) as rig, connected(rig) as client:
        with pytest.raises(anthropic.InternalServerError, match="the row failed"):
            await client.messages.create(model="fake", max_tokens=9, messages=USER)
        stream = await client.messages.create(model="fake", max_tokens=9, messages=USER, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="the row failed") as error:
            _ = [event async for event in stream]
        assert error.value.body["error"]["type"] == "api_error"


async def test_both_ways_to_send_a_key_and_none() -> None:
    async with running(options=ServerOptions(api_key=("k",))) as rig:
        for auth in ({"api_key": "k"}, {"auth_token": "k"}):
            async with connected(rig, **auth) as client:
                await client.messages.create(model="fake", max_tokens=9, messages=USER)
                assert (await client.messages.count_tokens(model="fake", messages=USER)).input_tokens == 20
        async with connected(rig, api_key="other") as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.messages.create(model="fake", max_tokens=9, messages=USER)
        body = {"model": "fake", "max_tokens": 9, "messages": USER}
        for headers, status in (
            ([("x-api-key", "k")], 200),
            ([("x-api-key", "k"), ("x-api-key", "k")], 401),
            ([("x-api-key", "k"), ("Authorization", "Bearer other")], 401),
            ([], 401),
        ):
            assert (await rig.http.post(PATH, json=body, headers=headers)).status_code == status, headers


async def test_a_client_that_leaves_aborts() -> None:
    gate = asyncio.Event()
    async with running(FakeEngine(lambda _: Script(gate=gate))) as rig, connected(rig) as client:
        task = asyncio.create_task(client.messages.create(model="fake", max_tokens=9, messages=USER))
        await until(lambda: len(rig.engine.running) == 1)
        task.cancel()
        await until(lambda: len(rig.engine.aborted) == 1, 1.0)
