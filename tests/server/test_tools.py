"""Tools and reasoning of chats, as the official client sees them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from server_rig import READY, FakeEngine, Rig, Script, running

from octavo.config import ServerOptions
from octavo.protocol.reasoning import ReasoningMarks
from octavo.server.openai.tools import ToolCalling
from octavo.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "f", "description": "What f does", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "g"}}]
# It shows tools, calls, and all of a message that it is given.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.reasoning_content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "{{ m.tool_call_id }}\n{% endfor %}{% if think %}<think>\n{% endif %}"
)
HERMES = (
    b'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": "\xc3\xa9", "b": [1, 2]}}\n</tool_call>'
    b'\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)
ARGUMENTS = '{"a": "é", "b": [1, 2]}'


def saying(text: bytes, step: int = 1, options: ServerOptions | None = None, template: str = TEMPLATE) -> Any:
    options = options or ServerOptions(max_waiting_requests=8, drain_timeout=5.0)
    return running(FakeEngine(lambda _: Script(text, step)), options=options, chat_template=ChatTemplate(template))


def options(**changes: Any) -> ServerOptions:
    return ServerOptions(max_waiting_requests=8, drain_timeout=5.0, **changes)


async def streamed(rig: Rig, **body: Any) -> dict[str, Any]:
    """A streamed chat's first choice, put together as clients do it."""
    stream = await rig.openai.chat.completions.create(**{"model": "fake", "messages": USER, "stream": True} | body)
    whole: dict[str, Any] = {"content": "", "reasoning": "", "old": "", "calls": {}, "reasons": []}
    async for chunk in stream:
        (choice,) = chunk.choices
        whole["content"] += choice.delta.content or ""
        whole["reasoning"] += (choice.delta.model_extra or {}).get("reasoning") or ""
        whole["old"] += (choice.delta.model_extra or {}).get("reasoning_content") or ""
        for call in choice.delta.tool_calls or ():
            if call.index not in whole["calls"]:
                assert (call.type, bool(call.id), bool(call.function.name)) == ("function", True, True)
                whole["calls"][call.index] = [call.function.name, ""]
            else:
                assert (call.type, call.id, call.function.name) == (None, None, None)
            whole["calls"][call.index][1] += call.function.arguments
        whole["reasons"].append(choice.finish_reason)
    assert set(whole["reasons"][:-1]) <= {None}
    return whole


async def test_calls() -> None:
    async with saying(HERMES) as rig:
        answer = await rig.openai.chat.completions.create(model="fake", messages=USER, tools=TOOLS)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Sure."
        assert [(c.type, c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [
            ("function", "f", ARGUMENTS),
            ("function", "g", "{}"),
        ]
        assert len({call.id for call in choice.message.tool_calls}) == 2
        assert rig.engine.requests[0].sampling.skip_special_tokens is False
        prompt = bytes(rig.engine.requests[0].prompt_token_ids).decode()
        assert json.loads(prompt.splitlines()[0]) == TOOLS


@pytest.mark.parametrize("step", [1, 2, 7, 200])
async def test_streamed_calls(step: int) -> None:
    async with saying(HERMES, step) as rig:
        whole = await streamed(rig, tools=TOOLS, tool_choice="auto")
        assert (whole["content"], whole["calls"]) == ("Sure.", {0: ["f", ARGUMENTS], 1: ["g", "{}"]})
        assert whole["reasons"][-1] == "tool_calls"
        if step == 1:
            assert len(whole["reasons"]) > 20  # arguments came while they were written


@pytest.mark.parametrize("parallel", [True, False])
async def test_parallel_tool_calls(parallel: bool) -> None:
    async with saying(HERMES) as rig:
        body = {"tools": TOOLS, "parallel_tool_calls": parallel}
        answer = await rig.openai.chat.completions.create(model="fake", messages=USER, **body)
        number = 2 if parallel else 1
        assert len(answer.choices[0].message.tool_calls) == number
        assert len((await streamed(rig, **body))["calls"]) == number


async def test_no_content_beside_a_call_is_null() -> None:
    async with saying(b'<tool_call>{"name": "f", "arguments": {}}</tool_call>') as rig:
        answer = await rig.http.post("/v1/chat/completions", json={"model": "fake", "messages": USER, "tools": TOOLS})
        assert answer.json()["choices"][0]["message"]["content"] is None
        assert "reasoning" not in answer.json()["choices"][0]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_without_calls_is_plain(stream: bool) -> None:
    async with saying(b"No <tool_call> needed. \n") as rig:
        if stream:
            whole = await streamed(rig, tools=TOOLS)
            assert (whole["content"], whole["calls"], whole["reasons"][-1]) == ("No <tool_call> needed. \n", {}, "stop")
        else:
            answer = await rig.openai.chat.completions.create(model="fake", messages=USER, tools=TOOLS)
            assert answer.choices[0].message.content == "No <tool_call> needed. \n"
            assert (answer.choices[0].message.tool_calls, answer.choices[0].finish_reason) == (None, "stop")


async def test_a_call_that_is_cut_off_is_content() -> None:
    async with saying(HERMES) as rig:
        body: dict[str, Any] = {"tools": TOOLS, "max_tokens": 50}
        answer = await rig.openai.chat.completions.create(model="fake", messages=USER, **body)
        assert answer.choices[0].message.content == HERMES[:50].decode()
        assert (answer.choices[0].message.tool_calls, answer.choices[0].finish_reason) == (None, "length")
        whole = await streamed(rig, **body)
        assert (whole["content"], whole["reasons"][-1]) == (HERMES[:50].decode(), "length")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("choice", ["required", "named"])
async def test_calls_that_are_required(choice: str, strict: bool) -> None:
    """After its reasoning, the output is held to the schema of the calls and is nothing else."""
    text = b"hm</think>" + (b'{"a": 1}' if choice == "named" else b'[{"name": "f", "parameters": {"a": 1}}]')
    tools = [{"type": "function", "function": {**FUNCTION, "strict": strict}}, TOOLS[1]]
    asked = {"tools": tools, "tool_choice": NAMED if choice == "named" else "required"}
    async with saying(text, options=options(reasoning_parser="deepseek_r1")) as rig:
        answer = await rig.openai.chat.completions.create(model="fake", messages=USER, **asked)
        [call] = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("f", {"a": 1})
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (None, "tool_calls")
        assert answer.choices[0].message.model_extra["reasoning"] == "hm"
        request = rig.engine.requests[0]
        assert request.grammar
        assert request.reasoning == marks(is_open=True)
        assert request.sampling.structured_outputs.kind == "json"
        whole = await streamed(rig, **asked)
        assert (whole["content"], whole["reasoning"]) == ("", "hm")
        assert [(name, json.loads(text)) for name, text in whole["calls"].values()] == [("f", {"a": 1})]


async def test_tool_choice_none_leaves_the_output_alone() -> None:
    for exclude in (False, True):
        async with saying(HERMES, options=options(exclude_tools_when_tool_choice_none=exclude)) as rig:
            answer = await rig.openai.chat.completions.create(
                model="fake", messages=USER, tools=TOOLS, tool_choice="none"
            )
            assert answer.choices[0].message.content == HERMES.decode()
            assert answer.choices[0].finish_reason == "stop"
            assert (b"What f does" in bytes(rig.engine.requests[0].prompt_token_ids)) is not exclude


async def test_a_conversation_goes_on_with_the_answer_as_it_came() -> None:
    async with saying(HERMES) as rig:
        create = rig.openai.chat.completions.create
        message = (await create(model="fake", messages=USER, tools=TOOLS)).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "5"} for call in message.tool_calls]
        await create(model="fake", messages=[*USER, message.model_dump(), *results], tools=TOOLS)
        prompt = bytes(rig.engine.requests[-1].prompt_token_ids).decode()
        assert f"<assistant>Sure.<tool_call>{ARGUMENTS}</tool_call><tool_call>{{}}</tool_call>\n" in prompt
        assert [f"<tool>5{call.id}" in prompt for call in message.tool_calls] == [True, True]


async def test_reasoning() -> None:
    text = b"<think>\nWhy not?\n</think>\n\n" + HERMES
    async with saying(text, options=options(reasoning_parser="qwen3")) as rig:
        create = rig.openai.chat.completions.create
        message = (await create(model="fake", messages=USER, tools=TOOLS)).choices[0].message
        assert message.model_extra == {"reasoning": "Why not?", "reasoning_content": "Why not?"}
        assert (message.content, len(message.tool_calls)) == ("Sure.", 2)
        whole = await streamed(rig, tools=TOOLS)
        assert (whole["reasoning"], whole["old"], whole["content"]) == ("Why not?", "Why not?", "Sure.")
        assert whole["calls"] == {0: ["f", ARGUMENTS], 1: ["g", "{}"]}
        for shown in (await streamed(rig), (await create(model="fake", messages=USER)).choices[0].message.model_dump()):
            assert (shown["reasoning"], shown["content"]) == ("Why not?", HERMES.decode())
        await create(model="fake", messages=[*USER, message.model_dump(), *USER], max_tokens=1)
        assert "<assistant>Sure.Why not?" in bytes(rig.engine.requests[-1].prompt_token_ids).decode()


async def test_reasoning_may_be_left_out() -> None:
    async with saying(b"<think>hm</think>yes", options=options(reasoning_parser="deepseek_r1")) as rig:
        body = {"extra_body": {"include_reasoning": False}}
        message = (await rig.openai.chat.completions.create(model="fake", messages=USER, **body)).choices[0].message
        assert (message.model_extra, message.content) == ({}, "yes")
        whole = await streamed(rig, **body)
        assert (whole["reasoning"], whole["old"], whole["content"]) == ("", "", "yes")


async def test_a_prompt_may_open_the_reasoning() -> None:
    async with saying(b"hm</think>yes", options=options(reasoning_parser="qwen3")) as rig:
        whole = await streamed(rig, extra_body={"chat_template_kwargs": {"think": True}})
        assert (whole["reasoning"], whole["content"]) == ("hm", "yes")
        assert (await streamed(rig))["content"] == "hm</think>yes"


async def test_a_message_that_is_continued_reasons_on_only_where_it_does() -> None:
    fields = {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}}
    async with saying(b"hm</think>yes", options=options(reasoning_parser="deepseek_r1")) as rig:
        for begun, expected in (("<think>Well, ", ("hm", "yes")), ("Sure, ", ("", "hm</think>yes"))):
            messages = [*USER, {"role": "assistant", "content": begun}]
            whole = await streamed(rig, messages=messages, **fields)
            assert (whole["reasoning"], whole["content"]) == expected


def marks(is_open: bool) -> ReasoningMarks:
    return ReasoningMarks(("<think>",), ("</think>",), is_open)


async def test_only_outputs_that_marks_decide_on_are_watched_for_them() -> None:
    watched = [
        (
            {"response_format": {"type": "json_object"}},
            False,
            ReasoningMarks(("<think>",), ("</think>",), is_open=False),
        ),
        ({"thinking_token_budget": 5, "n": 2}, True, marks(is_open=True)),
        ({"thinking_token_budget": -1}, True, None),
        ({"temperature": 0.5}, True, None),
    ]
    async with saying(b"hm</think>yes", options=options(reasoning_parser="qwen3")) as rig:
        for fields, opens, expected in watched:
            body = {"model": "fake", "messages": USER, "chat_template_kwargs": {"think": opens}, **fields}
            answer = await rig.http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert rig.engine.requests[-1].reasoning == expected, fields
            budget = fields.get("thinking_token_budget")
            assert rig.engine.requests[-1].sampling.thinking_token_budget == (None if budget == -1 else budget)


@pytest.mark.parametrize("parser", [None, "openai_gptoss"])
async def test_a_budget_needs_marks_that_can_be_forced(parser: str | None) -> None:
    async with saying(b"x", options=options(reasoning_parser=parser)) as rig:
        for path, prompt in (("/v1/chat/completions", {"messages": USER}), ("/v1/responses", {"input": "hi"})):
            for budget in (0, 5):
                body = {"model": "fake", **prompt, "thinking_token_budget": budget}
                answer = await rig.http.post(path, json=body)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "thinking_token_budget")
                assert ("openai_gptoss" if parser else "--reasoning-parser") in answer.json()["error"]["message"]
            assert (await rig.http.post(path, json={**body, "thinking_token_budget": -1})).status_code == 200
        plain = {"model": "fake", "prompt": "x", "thinking_token_budget": 5}
        answer = await rig.http.post("/v1/completions", json=plain)
        assert answer.json()["error"]["code"] == "unsupported_parameter"


async def test_chunks_keep_logprobs_and_ids_of_tokens_whose_text_waits() -> None:
    async with saying(HERMES) as rig:
        stream = await rig.openai.chat.completions.create(
            model="fake", messages=USER, tools=TOOLS, stream=True, logprobs=True, extra_body={"return_token_ids": True}
        )
        choices = [chunk.choices[0] async for chunk in stream]
        ids = [token for choice in choices for token in (choice.model_extra or {}).get("token_ids") or ()]
        assert bytes(ids[:-1]) == HERMES
        assert sum(len(choice.logprobs.content) for choice in choices if choice.logprobs) == len(ids)


NAMED = {"type": "function", "function": {"name": "f"}}
BAD_FUNCTION = {"name": "f", "parameters": {"type": "object", "not": {}}}
BAD_SCHEMA = [{"type": "function", "function": BAD_FUNCTION}]
STRICT = [{"type": "function", "function": {**FUNCTION, "strict": True}}, TOOLS[1]]
REFUSED = [
    ({"tools": []}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
    ({"tools": STRICT, "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function", "function": {**BAD_FUNCTION, "strict": True}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "extra": 1}}]}, "tools[0].function.extra"),
    ({"tools": TOOLS, "tool_choice": NAMED, "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": BAD_SCHEMA, "tool_choice": "required"}, "tools"),
    ({"tools": TOOLS, "tool_choice": {**NAMED, "function": {"name": "h"}}}, "tool_choice.function.name"),
    ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"include_reasoning": False}, "include_reasoning"),
    ({"messages": [{"role": "user", "content": "x", "reasoning": "y"}]}, "messages[0].reasoning"),
]


async def test_what_is_refused() -> None:
    async with saying(b"x") as rig:
        for body, param in REFUSED:
            answer = await rig.http.post("/v1/chat/completions", json={"model": "fake", "messages": USER, **body})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
        assert rig.engine.requests == []
        body = {"model": "fake", "messages": USER, "tool_choice": "none", "include_reasoning": True}
        assert (await rig.http.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("template", "changes", "param", "words"),
    [
        (TEMPLATE.replace("<tool_call>", ""), {}, "tools", "--tool-call-parser"),
        (TEMPLATE, {"enable_auto_tool_choice": False}, "tool_choice", "allowed: none"),
    ],
)
async def test_tools_that_the_server_cannot_use(template: str, changes: Any, param: str, words: str) -> None:
    async with saying(b"x", options=options(**changes), template=template) as rig:
        body = {"model": "fake", "messages": USER, "tools": TOOLS}
        answer = await rig.http.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert words in answer.json()["error"]["message"]


async def test_the_option_decides_over_the_template() -> None:
    text = b'[TOOL_CALLS]f[ARGS]{"a": 1}'
    async with saying(text, options=options(tool_call_parser="mistral", enable_auto_tool_choice=True)) as rig:
        assert (await streamed(rig, tools=TOOLS))["calls"] == {0: ["f", '{"a": 1}']}


@pytest.mark.parametrize(
    ("template", "changes", "words"),
    [
        ("{{ tools }}", {"enable_auto_tool_choice": True}, "enable_auto_tool_choice=True needs a tool_call_parser"),
        (None, {"enable_auto_tool_choice": True}, "enable_auto_tool_choice=True needs a chat_template"),
        ("{{ messages }}", {"tool_call_parser": "mistral"}, "tool_call_parser='mistral' needs .* allowed: hermes"),
    ],
)
def test_a_server_that_cannot_read_calls_does_not_start(template: str | None, changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        ToolCalling(options(**changes), None if template is None else ChatTemplate(template))


async def test_strict_calls_are_held_to_their_schemas_and_others_to_objects() -> None:
    async with saying(HERMES) as rig:
        for stream in (False, True):
            answer = await rig.openai.chat.completions.create(model="fake", messages=USER, tools=STRICT, stream=stream)
            if not stream:
                assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["f", "g"]
        wish = rig.engine.requests[0].sampling.structured_outputs
        tags = json.loads(wish.structural_tag)["format"]["tags"]
        assert [tag["content"]["json_schema"] for tag in tags] == [FUNCTION["parameters"], {"type": "object"}]
        body = {"model": "fake", "messages": USER, "tools": STRICT, "tool_choice": "none"}
        await rig.http.post("/v1/chat/completions", json=body)
        assert rig.engine.requests[-1].sampling.structured_outputs is None


async def test_strict_is_refused_where_a_format_cannot_be_held_to_a_schema() -> None:
    for parser in ("pythonic", "openai"):
        async with saying(HERMES, options=options(tool_call_parser=parser)) as rig:
            body = {"model": "fake", "messages": USER, "tools": STRICT}
            answer = await rig.http.post("/v1/chat/completions", json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "tools[0].function.strict")
            assert f"format '{parser}' cannot be held" in error["message"]


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


async def test_a_template_without_tools_has_them_described_on_every_route() -> None:
    engine = FakeEngine(lambda _: Script(HERMES, 7), ready=msgspec.structs.replace(READY, max_model_len=2048))
    async with running(engine, chat_template=ChatTemplate(PLAIN), max_model_len=2048) as rig:
        chat = {"model": "fake", "messages": USER, "tools": TOOLS}
        functions = [tool["function"] for tool in TOOLS]
        response = {"model": "fake", "input": "hi", "tools": [{"type": "function", **each} for each in functions]}
        message: dict[str, Any] = {"model": "fake", "messages": USER, "max_tokens": 200}
        message["tools"] = [
            {"name": "f", "description": "What f does", "input_schema": FUNCTION["parameters"]},
            {"name": "g", "input_schema": {"type": "object"}},
        ]
        answers = [
            (await rig.http.post(path, json=body)).json()
            for path, body in (("chat/completions", chat), ("responses", response), ("messages", message))
            for path in [f"/v1/{path}"]
        ]
        prompts = [bytes(request.prompt_token_ids).decode() for request in engine.requests]
        assert prompts[0] == prompts[1]
        assert all(p.startswith("<system>Functions") and p.endswith("\n<user>hi\n") for p in prompts)
        assert [json.loads(line) for line in prompts[0].splitlines()[2:4]] == functions
        calls = [call["function"]["name"] for call in answers[0]["choices"][0]["message"]["tool_calls"]]
        assert calls == [item["name"] for item in answers[1]["output"][1:]] == ["f", "g"]
        assert [block["name"] for block in answers[2]["content"][1:]] == ["f", "g"]
        tokens = await rig.http.post("/tokenize", json={"messages": USER, "tools": TOOLS})
        assert bytes(tokens.json()["tokens"]).decode() == prompts[0]
        del message["max_tokens"]
        count = await rig.http.post("/v1/messages/count_tokens", json=message)
        assert count.json()["input_tokens"] == len(prompts[2].encode())
        # What came back is shown as text, in a turn of the user's.
        made = answers[0]["choices"][0]["message"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in made["tool_calls"]]
        await rig.http.post("/v1/chat/completions", json={**chat, "messages": [*USER, made, *results]})
        written = bytes(engine.requests[-1].prompt_token_ids).decode()
        assert written.removeprefix(prompts[0]) == (
            f'<assistant>Sure.\n<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
            "<user><tool_response>\n5\n</tool_response>\n<tool_response>\n5\n</tool_response>\n"
        )
