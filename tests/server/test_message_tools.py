"""/v1/messages with tools, thinking and formats, as the `anthropic` client sees it."""

from __future__ import annotations

import json
from typing import Any

from server_rig import FakeEngine, Script, running
from test_messages import COUNT, PATH, USER, connected, prompt
from test_tools import ARGUMENTS, HERMES, TEMPLATE, options

from octavo.text.chat_template import ChatTemplate

TOOLS: list[Any] = [
    {"name": "f", "description": "What f does", "input_schema": {"type": "object"}, "type": "custom"},
    {"name": "g", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}},
]
INPUTS = [("f", json.loads(ARGUMENTS)), ("g", {})]


def saying(text: bytes, step: int = 1, **changes: Any) -> Any:
    return running(
        FakeEngine(lambda _: Script(text, step)), options=options(**changes), chat_template=ChatTemplate(TEMPLATE)
    )


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(block.name, block.input) for block in message.content if block.type == "tool_use"]


async def test_calls_whole_and_streamed() -> None:
    async with saying(HERMES, 3) as rig, connected(rig) as client:
        fields: dict[str, Any] = {"model": "fake", "max_tokens": 200, "messages": USER, "tools": TOOLS}
        whole = await client.messages.create(**fields)
        assert [block.type for block in whole.content] == ["text", "tool_use", "tool_use"]
        assert (whole.content[0].text, calls_of(whole), whole.stop_reason) == ("Sure.", INPUTS, "tool_use")
        assert len({block.id for block in whole.content[1:]}) == 2
        assert json.loads(prompt(rig).splitlines()[0])[0]["function"]["parameters"] == {"type": "object"}
        async with client.messages.stream(**fields) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_message()
        assert (final.content[0].text, calls_of(final), final.stop_reason) == ("Sure.", INPUTS, "tool_use")
        starts = [event for event in events if event.type == "content_block_start"]
        assert [event.index for event in starts] == [0, 1, 2]
        pieces = [
            event.delta.partial_json
            for event in events
            if event.type == "content_block_delta" and event.index == 1 and event.delta.type == "input_json_delta"
        ]
        assert len(pieces) > 3
        assert "".join(pieces) == ARGUMENTS
        assert [event.index for event in events if event.type == "content_block_stop"] == [0, 1, 2]


async def test_choices_of_a_call() -> None:
    async with saying(b'[{"name": "f", "parameters": {"a": 1}}]') as rig, connected(rig) as client:
        fields: dict[str, Any] = {"model": "fake", "max_tokens": 99, "messages": USER, "tools": TOOLS}
        answer = await client.messages.create(**fields, tool_choice={"type": "any"})
        assert (calls_of(answer), answer.stop_reason) == ([("f", {"a": 1})], "tool_use")
        assert rig.engine.requests[-1].sampling.structured_outputs.json.get("maxItems") is None
        await client.messages.create(**fields, tool_choice={"type": "any", "disable_parallel_tool_use": True})
        assert rig.engine.requests[-1].sampling.structured_outputs.json["maxItems"] == 1
    async with saying(b'{"a": 1}') as rig, connected(rig) as client:
        answer = await client.messages.create(**fields, tool_choice={"type": "tool", "name": "f"})
        assert calls_of(answer) == [("f", {"a": 1})]
    async with saying(HERMES) as rig, connected(rig) as client:
        fields["max_tokens"] = 200
        answer = await client.messages.create(**fields, tool_choice={"type": "none"})
        assert (answer.content[0].text, answer.stop_reason) == (HERMES.decode(), "end_turn")
        answer = await client.messages.create(**fields, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        assert calls_of(answer) == INPUTS[:1]
        cut = await client.messages.create(**{**fields, "max_tokens": 50})
        assert (cut.content[0].text, cut.stop_reason) == (HERMES[:50].decode(), "max_tokens")


async def test_a_history_with_calls_and_what_it_counts() -> None:
    async with saying(HERMES) as rig, connected(rig) as client:
        first = await client.messages.create(model="fake", max_tokens=200, messages=USER, tools=TOOLS)
        one, two = (block.id for block in first.content[1:])
        results = [
            {"type": "text", "text": "So?"},
            {"type": "tool_result", "tool_use_id": one, "content": [{"type": "text", "text": "5"}]},
            {"type": "tool_result", "tool_use_id": two, "content": "no", "is_error": True},
        ]
        messages = [
            *USER,
            {"role": "assistant", "content": [block.model_dump() for block in first.content]},
            {"role": "user", "content": results},
        ]
        await client.messages.create(model="fake", max_tokens=9, messages=messages, tools=TOOLS)
        tools, _, rest = prompt(rig).partition("\n")
        assert rest == (
            f"<user>hi\n<assistant>Sure.<tool_call>{ARGUMENTS}</tool_call><tool_call>{{}}</tool_call>\n"
            f"<tool>5{one}\n<tool>Error: no{two}\n<user>So?\n"
        )
        count = client.messages.count_tokens
        counted = (await count(model="fake", messages=messages, tools=TOOLS)).input_tokens
        assert counted == len(prompt(rig).encode())
        assert (await count(model="fake", messages=messages)).input_tokens == counted - len(tools) - 1


async def test_thinking() -> None:
    text = b"<think>\nWhy not?\n</think>\n\n" + HERMES
    async with saying(text, reasoning_parser="qwen3") as rig, connected(rig) as client:
        fields: dict[str, Any] = {"model": "fake", "max_tokens": 250, "messages": USER, "tools": TOOLS}
        kinds = ["thinking", "text", "tool_use", "tool_use"]
        whole = await client.messages.create(**fields, thinking={"type": "adaptive"})
        assert [block.type for block in whole.content] == kinds
        assert (whole.content[0].thinking, whole.content[0].signature) == ("Why not?", "")
        async with client.messages.stream(**fields) as stream:
            final = await stream.get_final_message()
        assert [block.type for block in final.content] == kinds
        assert final.content[0].thinking == "Why not?"
        assert rig.engine.requests[-1].reasoning is None
        bounded = await client.messages.create(**fields, thinking={"type": "enabled", "budget_tokens": 1024})
        assert [block.type for block in bounded.content] == kinds
        assert rig.engine.requests[-1].sampling.thinking_token_budget == 1024
        assert rig.engine.requests[-1].reasoning is not None
        hidden = await client.messages.create(**fields, thinking={"type": "disabled"})
        assert [block.type for block in hidden.content] == kinds[1:]
        messages = [*USER, {"role": "assistant", "content": [block.model_dump() for block in whole.content]}, *USER]
        await client.messages.create(model="fake", max_tokens=9, messages=messages)
        assert "<assistant>Sure.Why not?<tool_call>" in prompt(rig)


async def test_a_format_of_the_text() -> None:
    async with saying(b'{"a": 1}') as rig, connected(rig) as client:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        config: Any = {"format": {"type": "json_schema", "schema": schema}}
        answer = await client.messages.create(model="fake", max_tokens=9, messages=USER, output_config=config)
        assert answer.content[0].text == '{"a": 1}'
        assert rig.engine.requests[0].sampling.structured_outputs.json == schema


F = TOOLS[0]
USE = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{**F, "name": "a b"}]}, "tools[0].name"),
    ({"tools": [F, F]}, "tools[1].name"),
    ({"tools": [F], "tool_choice": {"type": "tool", "name": "h"}}, "tool_choice.name"),
    ({"tools": [F], "tool_choice": {"type": "maybe"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [F], "thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
    ({"thinking": {"type": "adaptive"}}, "thinking.type"),
    ({"output_config": {"effort": "low"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format.schema"),
    ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0].type"),
    ({"messages": [*USER, {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]},
     "messages[1].content[0].type"),
    ({"messages": [*USER, {"role": "assistant", "content": [USE]}]}, "messages"),
    ({"messages": [*USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": "x"}]}]},
     "messages[1].content[0].signature"),
]  # fmt: skip


async def test_refusals_name_the_field() -> None:
    async with saying(b"x") as rig:
        for fields, param in BAD:
            body = {"model": "fake", "messages": USER, **fields}
            for path, more in ((PATH, {"max_tokens": 9}), (COUNT, {})):
                if path == COUNT and param.startswith("output_config.format"):
                    continue  # nothing is compiled for a count
                answer = await rig.http.post(path, json={**body, **more})
                assert (answer.status_code, answer.json()["type"]) == (400, "error"), (fields, answer.text)
                assert answer.json()["error"]["param"] == param, answer.text
        assert rig.engine.requests == []
