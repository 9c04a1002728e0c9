"""/v1/responses as the official client sees it: whole, streamed, continued, refused."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from server_rig import FakeEngine, Rig, Script, running, until

from octavo.config import ServerOptions
from octavo.server.front_ends import FrontEndGroup
from octavo.server.openai import response_store
from octavo.server.openai.response_store import ResponseStore, StoredResponse
from octavo.server.openai.schema import Message

PATH = "/v1/responses"


def prompt(rig: Rig, index: int = -1) -> str:
    return bytes(rig.engine.requests[index].prompt_token_ids).decode()


async def test_create() -> None:
    async with running(generation_defaults={"temperature": 0.6}) as rig:
        answer = await rig.openai.responses.create(model="org/alias", input="hi", instructions="be kind", user="me")
        assert prompt(rig) == "<system>be kind\n<user>hi\n<assistant>"
        assert (answer.output_text, answer.status, answer.object, answer.model) == (
            "hello",
            "completed",
            "response",
            "fake",
        )
        assert (answer.instructions, answer.user, answer.temperature, answer.error) == ("be kind", "me", 0.6, None)
        message = answer.output[0]
        assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
        assert answer.id.startswith("resp_")
        assert message.id.startswith("msg_")
        usage = answer.usage
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens) == (len(prompt(rig)), 6)
        assert usage.total_tokens == usage.input_tokens + 6
        assert usage.input_tokens_details.cached_tokens == 4
        assert rig.engine.requests[0].max_tokens == 512 - len(prompt(rig))


async def test_an_answer_that_is_cut_is_incomplete() -> None:
    async with running() as rig:
        answer = await rig.openai.responses.create(model="fake", input="hi", max_output_tokens=2)
        assert (answer.output_text, answer.status, answer.output[0].status) == ("he", "incomplete", "incomplete")
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        stream = await rig.openai.responses.create(model="fake", input="hi", max_output_tokens=2, stream=True)
        last = [event async for event in stream][-1]
        assert (last.type, last.response.output_text) == ("response.incomplete", "he")


async def test_stream() -> None:
    async with running(FakeEngine(lambda _: Script("hé%".encode()))) as rig:
        events = [event async for event in await rig.openai.responses.create(model="fake", input="hi", stream=True)]
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds == [
            *("created", "in_progress", "output_item.added", "content_part.added"),
            *["output_text.delta"] * 3,
            *("output_text.done", "content_part.done", "output_item.done", "completed"),
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "hé%"
        assert events[0].response.status == "in_progress"
        assert events[-4].text == "hé%"
        done = events[-1].response
        assert (done.id, done.output_text, done.status) == (events[0].response.id, "hé%", "completed")
        assert done.usage.output_tokens == 5
        assert {event.item_id for event in events[3:-2]} == {done.output[0].id}
        # The client's own accumulation agrees.
        async with rig.openai.responses.stream(model="fake", input="hi") as stream:
            assert (await stream.get_final_response()).output_text == "hé%"


async def test_raw_events_carry_their_names_and_no_done() -> None:
    async with running() as rig:
        answer = await rig.http.post(PATH, json={"model": "fake", "input": "hi", "stream": True})
        frames = answer.text.strip().split("\n\n")
        for frame in frames:
            event, data = frame.split("\n")
            assert event == f"event: {json.loads(data.removeprefix('data: '))['type']}"
        assert frames[-1].startswith("event: response.completed\n")


async def test_previous_response() -> None:
    async with running() as rig:
        create = rig.openai.responses.create
        first = await create(model="fake", input="one", instructions="be kind")
        stream = await create(model="fake", input="two", previous_response_id=first.id, stream=True)
        second = [event async for event in stream][-1].response
        assert prompt(rig) == "<user>one\n<assistant>hello\n<user>two\n<assistant>"
        assert second.previous_response_id == first.id
        await create(model="fake", input="three", previous_response_id=second.id, instructions="be brief")
        so_far = "<user>one\n<assistant>hello\n<user>two\n<assistant>hello\n"
        assert prompt(rig) == f"<system>be brief\n{so_far}<user>three\n<assistant>"
        # Both branches of one response stay as they were.
        await create(model="fake", input="other", previous_response_id=first.id)
        assert prompt(rig) == "<user>one\n<assistant>hello\n<user>other\n<assistant>"
        forgotten = await create(model="fake", input="x", store=False)
        assert forgotten.model_extra is not None
        assert forgotten.model_extra["store"] is False
        with pytest.raises(openai.BadRequestError) as error:
            await create(model="fake", input="y", previous_response_id=forgotten.id)
        assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")


async def test_items_and_a_conversation_kept_by_the_client() -> None:
    async with running() as rig:
        first = await rig.openai.responses.create(model="fake", input="one")
        items: list[Any] = [
            {"role": "developer", "content": "be kind"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
            *[item.model_dump() for item in first.output],
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        ]
        await rig.openai.responses.create(model="fake", input=items)
        assert prompt(rig) == "<developer>be kind\n<user>one\n<assistant>hello\n<user>a\nb\n<assistant>"


async def test_fields_reach_the_engine() -> None:
    async with running(scheduling_policy="priority") as rig:
        extra = {"top_k": 4, "min_p": 0.1, "seed": 3, "stop": ["lo"], "priority": 2, "cache_salt": "s"}
        extra |= {"repetition_penalty": 1.1, "presence_penalty": 1, "frequency_penalty": -1, "ignore_eos": True}
        extra |= {"chat_template_kwargs": {"suffix": "!"}}
        answer = await rig.openai.responses.create(
            model="fake", input="x", temperature=0.5, top_p=0.9, metadata={"a": "b"}, extra_body=extra
        )
        assert (answer.output_text, answer.metadata, answer.top_p) == ("hel", {"a": "b"}, 0.9)
        request = rig.engine.requests[0]
        sampling = request.sampling
        assert (request.priority, request.cache_salt, prompt(rig)) == (2, "s", "<user>x\n<assistant>!")
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 4, 0.1)
        assert (sampling.seed, sampling.repetition_penalty, sampling.ignore_eos) == (3, 1.1, True)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)


FUNCTION: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
BAD = [
    ({"input": None}, "input", "invalid_type"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
    ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output", "missing_required_parameter"),
    ({"input": [{"type": "message", "role": "user", "content": "x", "output": "y"}]}, "input[0].output", None),
    ({"input": [{**CALL, "arguments": "[1]"}]}, "input[0].arguments", "invalid_value"),
    ({"input": [{**CALL, "encrypted_content": "x"}]}, "input[0].encrypted_content", None),
    ({"input": [{"type": "reasoning", "content": "x"}]}, "input[0].content", "invalid_type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "invalid_value"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, None, None),
    ({"input": [{"role": "user", "content": []}]}, "input[0].content", None),
    ({"input": "x" * 600}, "input", "context_length_exceeded"),
    ({"max_output_tokens": 600}, "max_output_tokens", "context_length_exceeded"),
    ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"temperature": 3}, "temperature", "invalid_value"),
    ({"priority": 1}, "priority", "invalid_value"),
    ({"previous_response_id": "resp_x"}, "previous_response_id", "previous_response_not_found"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
    ({"tools": [FUNCTION, FUNCTION]}, "tools[1].name", "invalid_value"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "h"}}, "tool_choice.name", "invalid_value"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "file_search"}}, "tool_choice.type", "unsupported_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    (
        {"tools": [FUNCTION], "tool_choice": "required", "text": {"format": {"type": "json_object"}}},
        "text.format",
        None,
    ),
    ({"max_tool_calls": 2}, "max_tool_calls", "unsupported_parameter"),
    ({"background": True}, "background", "unsupported_parameter"),
    ({"reasoning": {"effort": "low"}}, "reasoning", "unsupported_parameter"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format.schema", None),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "invalid_value"),
    ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
    ({"include": ["reasoning.encrypted_content"]}, "include", "unsupported_parameter"),
    ({"max_tokens": 5}, "max_tokens", "unknown_parameter"),
    ({"n": 2}, "n", "unknown_parameter"),
]


async def test_refusals_name_the_field() -> None:
    async with running() as rig:
        for fields, param, code in BAD:
            for stream in (False, True):
                answer = await rig.http.post(PATH, json={"model": "fake", "input": "hi", "stream": stream, **fields})
                assert answer.status_code == 400, (fields, answer.text)
                error = answer.json()["error"]
                assert param is None or error["param"] == param, (fields, error)
                assert code is None or error["code"] == code, (fields, error)
        assert rig.engine.requests == []
        harmless = {"background": False, "tools": [], "text": {"format": {"type": "text"}}, "truncation": "disabled"}
        assert (await rig.http.post(PATH, json={"model": "fake", "input": "hi", **harmless})).status_code == 200
        assert (await rig.http.post(PATH, json={"model": "gpt", "input": "hi"})).status_code == 404


async def test_an_error_in_the_middle_is_an_event() -> None:
    async with running(FakeEngine(lambda _: Script(fault="error"))) as rig:
        events = [event async for event in await rig.openai.responses.create(model="fake", input="hi", stream=True)]
        assert events[-1].type == "response.failed"
        assert events[-1].response.status == "failed"
        assert events[-1].response.error.message == "the row failed"
        with pytest.raises(openai.InternalServerError, match="the row failed"):
            await rig.openai.responses.create(model="fake", input="hi")


async def test_a_client_that_leaves_and_a_key_that_is_missing() -> None:
    gate = asyncio.Event()
    async with running(FakeEngine(lambda _: Script(gate=gate)), options=ServerOptions(api_key=("k",))) as rig:
        assert (await rig.http.post(PATH, json={"model": "fake", "input": "hi"})).status_code == 401
        task = asyncio.create_task(rig.openai.responses.create(model="fake", input="hi"))
        await until(lambda: len(rig.engine.running) == 1)
        task.cancel()
        await until(lambda: len(rig.engine.aborted) == 1, 1.0)


async def test_several_processes_have_no_store() -> None:
    async with running(group=FrontEndGroup(index=0, count=2)) as rig:
        answer = (await rig.http.post(PATH, json={"model": "fake", "input": "hi"})).json()
        assert answer["store"] is False
        for fields in ({"store": True}, {"previous_response_id": answer["id"]}):
            refused = await rig.http.post(PATH, json={"model": "fake", "input": "hi", **fields})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(fields)))


def stored(name: str, size: int = 1) -> StoredResponse:
    response: Any = SimpleNamespace(id=name)
    return StoredResponse(response, [Message("user", "x" * size)], [])


def test_the_store_is_bounded_in_responses_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "_size", lambda entry: 100 + len(str(entry.conversation[0].content)))
    store = ResponseStore(max_responses=3, max_bytes=1000)
    for name in "abc":
        store.put(stored(name))
    assert store.get("a") is not None
    store.put(stored("d"))
    assert [name for name in "abcd" if store.get(name) is None] == ["b"]
    store.put(stored("e", 800))
    assert store.num_bytes <= 1000
    assert store.get("e") is not None
    assert store.get("a") is None
    store.put(stored("f", 2000))
    assert store.get("f") is None
    assert store.get("e") is not None
    assert (store.delete("e"), store.delete("e"), store.num_bytes) == (True, False, 0)
