"""/v1/responses with functions, reasoning and formats, as the official client sees it; and what is stored of it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from server_rig import FakeEngine, Rig, Script, running
from test_tools import ARGUMENTS, HERMES, TEMPLATE, options

from octavo.server.front_ends import FrontEndGroup
from octavo.text.chat_template import ChatTemplate

TOOLS: Any = [
    {"type": "function", "name": "f", "description": "What f does", "parameters": {"type": "object"}, "strict": False},
    {"type": "function", "name": "g", "parameters": None, "strict": None},
]
THOUGHTS = b"<think>\nWhy not?\n</think>\n\n" + HERMES


def saying(text: bytes, step: int = 1, **changes: Any) -> Any:
    return running(
        FakeEngine(lambda _: Script(text, step)), options=options(**changes), chat_template=ChatTemplate(TEMPLATE)
    )


def prompt(rig: Rig, index: int = -1) -> str:
    return bytes(rig.engine.requests[index].prompt_token_ids).decode()


def calls_of(response: Any) -> list[tuple[str, str]]:
    return [(item.name, item.arguments) for item in response.output if item.type == "function_call"]


async def test_calls_whole_and_streamed() -> None:
    async with saying(HERMES, 3) as rig:
        whole = await rig.openai.responses.create(model="fake", input="hi", tools=TOOLS)
        assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
        assert (whole.output_text, calls_of(whole)) == ("Sure.", [("f", ARGUMENTS), ("g", "{}")])
        assert whole.output[1].call_id != whole.output[2].call_id
        assert {item.status for item in whole.output} == {"completed"}
        assert [tool.name for tool in whole.tools] == ["f", "g"]
        shown = json.loads(prompt(rig).splitlines()[0])
        assert [tool["function"]["name"] for tool in shown] == ["f", "g"]
        async with rig.openai.responses.stream(model="fake", input="hi", tools=TOOLS) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert (final.output_text, calls_of(final)) == ("Sure.", calls_of(whole))
        arguments = [e for e in events if e.type == "response.function_call_arguments.delta" and e.output_index == 1]
        assert "".join(event.delta for event in arguments) == ARGUMENTS
        assert len(arguments) > 3  # they came while they were written
        done = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert [(event.arguments, event.output_index) for event in done] == [(ARGUMENTS, 1), ("{}", 2)]
        kinds = [e.type.removeprefix("response.") for e in events if not e.type.endswith(".delta")]
        call = ["output_item.added", "function_call_arguments.done", "output_item.done"]
        text = ["output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"]
        assert kinds == ["created", "in_progress", *text, *call, *call, "completed"]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        ids = {event.item_id for event in events if hasattr(event, "item_id")}
        assert ids == {item.id for item in final.output}


async def test_choices_of_a_call() -> None:
    async with saying(b'[{"name": "f", "parameters": {"a": 1}}]') as rig:
        answer = await rig.openai.responses.create(model="fake", input="x", tools=TOOLS, tool_choice="required")
        assert [(name, json.loads(text)) for name, text in calls_of(answer)] == [("f", {"a": 1})]
        assert answer.tool_choice == "required"
    async with saying(b'{"a": 1}') as rig:
        named: Any = {"type": "function", "name": "f"}
        answer = await rig.openai.responses.create(model="fake", input="x", tools=TOOLS, tool_choice=named)
        assert (calls_of(answer), answer.tool_choice.name) == ([("f", '{"a": 1}')], "f")
    async with saying(HERMES) as rig:
        answer = await rig.openai.responses.create(model="fake", input="x", tools=TOOLS, tool_choice="none")
        assert (answer.output_text, calls_of(answer)) == (HERMES.decode(), [])
        for stream in (False, True):
            one: Any = await rig.openai.responses.create(
                model="fake", input="x", tools=TOOLS, parallel_tool_calls=False, stream=stream
            )
            last = [event async for event in one][-1].response if stream else one
            assert (len(calls_of(last)), last.parallel_tool_calls) == (1, False)


async def test_a_conversation_with_calls_by_the_server_and_by_the_client() -> None:
    async with saying(HERMES) as rig:
        create = rig.openai.responses.create
        first = await create(model="fake", input="one", tools=TOOLS)
        outputs = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "5"}
            for item in first.output
            if item.type == "function_call"
        ]
        outputs[1]["output"] = [{"type": "input_text", "text": "6"}]
        await create(model="fake", input=outputs, previous_response_id=first.id, tools=TOOLS)
        by_server = prompt(rig)
        calls = f"<assistant>Sure.<tool_call>{ARGUMENTS}</tool_call><tool_call>{{}}</tool_call>\n"
        assert by_server.partition("\n")[2] == (
            f"<user>one\n{calls}<tool>5{outputs[0]['call_id']}\n<tool>6{outputs[1]['call_id']}\n"
        )
        for items in (first.output, [item.model_dump() for item in first.output]):
            given: Any = [{"role": "user", "content": "one"}, *items, *outputs]
            await create(model="fake", input=given, tools=TOOLS)
            assert prompt(rig) == by_server


async def test_reasoning_is_an_item_and_comes_back_as_one() -> None:
    async with saying(THOUGHTS, reasoning_parser="qwen3") as rig:
        first = await rig.openai.responses.create(model="fake", input="one", tools=TOOLS)
        kinds = ["reasoning", "message", "function_call", "function_call"]
        assert [item.type for item in first.output] == kinds
        assert [part.text for part in first.output[0].content] == ["Why not?"]
        assert first.usage is not None
        assert first.usage.output_tokens_details.reasoning_tokens == len("Why not?")
        async with rig.openai.responses.stream(model="fake", input="one", tools=TOOLS) as stream:
            events = [event async for event in stream]
            assert [item.type for item in (await stream.get_final_response()).output] == kinds
        thoughts = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
        assert "".join(thoughts) == "Why not?"
        assert [event.text for event in events if event.type == "response.reasoning_text.done"] == ["Why not?"]
        given: Any = [{"role": "user", "content": "one"}, *first.output, {"role": "user", "content": "two"}]
        await rig.openai.responses.create(model="fake", input=given)
        by_client = prompt(rig)
        assert "<assistant>Sure.Why not?<tool_call>" in by_client
        await rig.openai.responses.create(model="fake", input="two", previous_response_id=first.id)
        assert prompt(rig) == by_client
        cut = await rig.openai.responses.create(model="fake", input="one", max_output_tokens=12)
        assert [(item.type, item.status) for item in cut.output] == [("reasoning", "incomplete")]
        given = [{"role": "user", "content": "one"}, *cut.output, {"role": "user", "content": "two"}]
        await rig.openai.responses.create(model="fake", input=given)
        assert prompt(rig) == "<user>one\n<assistant>Why\n<user>two\n"


async def test_a_call_that_breaks_off_is_text() -> None:
    broken = HERMES[: HERMES.index(b', "b"')]
    async with saying(broken) as rig:
        whole = await rig.openai.responses.create(model="fake", input="one", tools=TOOLS)
        assert (whole.output_text, calls_of(whole)) == (broken.decode(), [])
        stream = await rig.openai.responses.create(model="fake", input="one", tools=TOOLS, stream=True)
        last = [event async for event in stream][-1].response
        assert last.output_text == broken.decode()
        assert [(item.type, item.status) for item in last.output] == [
            ("message", "completed"),
            ("function_call", "incomplete"),
            ("message", "completed"),
        ]
        await rig.openai.responses.create(model="fake", input="x", previous_response_id=last.id)
        assert prompt(rig) == f"<user>one\n<assistant>{broken.decode()}\n<user>x\n"


class Shoe(BaseModel):
    price: int


async def test_formats_of_the_text() -> None:
    async with saying(b'{"price": 5}') as rig:
        parsed = await rig.openai.responses.parse(model="fake", input="x", text_format=Shoe)
        assert parsed.output_parsed == Shoe(price=5)
        assert parsed.text is not None
        assert parsed.text.format.type == "json_schema"
        assert rig.engine.requests[0].sampling.structured_outputs.json["title"] == "Shoe"
        await rig.openai.responses.create(model="fake", input="x", text={"format": {"type": "json_object"}})
        assert rig.engine.requests[1].sampling.structured_outputs.kind == "json_object"
        await rig.openai.responses.create(model="fake", input="x", text={"format": {"type": "text"}})
        assert rig.engine.requests[2].sampling.structured_outputs is None


async def test_stored_responses() -> None:
    async with saying(HERMES) as rig:
        responses = rig.openai.responses
        given: Any = [{"role": "user", "content": f"m{n}"} for n in range(3)]
        given += [{"type": "function_call_output", "call_id": "1", "output": "5"}]
        made = await responses.create(model="fake", input=given, tools=TOOLS)
        assert await responses.retrieve(made.id) == made
        page = await responses.input_items.list(made.id, limit=3)
        assert [item.type for item in page.data] == ["function_call_output", "message", "message"]
        assert page.has_more
        everything = [item async for item in responses.input_items.list(made.id, order="asc", limit=2)]
        assert [item.content[0].text for item in everything[:3]] == ["m0", "m1", "m2"]
        assert everything[3].output == "5"
        assert len({item.id for item in everything}) == 4
        more = await responses.create(model="fake", input="x", previous_response_id=made.id)
        await responses.delete(made.id)
        for call in (responses.retrieve, responses.delete, responses.input_items.list):
            with pytest.raises(openai.NotFoundError) as error:
                await call(made.id)
            assert error.value.code == "response_not_found"
        await responses.create(model="fake", input="y", previous_response_id=more.id)
        assert "<user>m0\n" in prompt(rig)
        unknown = [
            ("", "stream=true", "stream"),
            ("/input_items", "limit=0", "limit"),
            ("/input_items", "limit=²", "limit"),
            ("/input_items", "order=up", "order"),
            ("/input_items", "after=x", "after"),
            ("/input_items", "include=x", "include"),
        ]
        for path, query, param in unknown:
            answer = await rig.http.get(f"/v1/responses/{more.id}{path}?{query}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert (await rig.http.put(f"/v1/responses/{more.id}")).status_code == 405


async def test_several_processes_store_none() -> None:
    async with running(group=FrontEndGroup(index=0, count=2)) as rig:
        answer = await rig.http.get("/v1/responses/resp_1")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "response_not_found")
