"""A streamed message and a whole one say the same."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parser_rig import cut_at

from octavo.server.openai.blocks import Blocks
from octavo.server.openai.chat_messages import ParsedStream, parsed_message
from octavo.server.openai.schema import ChatBody, Message
from octavo.structured.chat_output import output_parser
from octavo.structured.events import OutputParser
from octavo.text.generation import Delta

JSON_CALL = '<tool_call>{"name": "f", "arguments": {"a": "b"}}</tool_call>'
TAGS_CALL = "<tool_call>\n<function=f>\n<parameter=a>\nb\n</parameter>\n</function>\n</tool_call>"
MESSAGE_CALL = '<|start|>assistant<|channel|>commentary to=functions.f<|message|>{"a": "b"}<|call|>'
THOUGHT, ANSWER = (
    "<|channel|>analysis<|message|>hm<|end|>",
    "<|start|>assistant<|channel|>final<|message|>yes<|return|>",
)
# tool parser, reasoning parser, pieces of what they read
FORMATS = [
    ("hermes", "qwen3", ["<think>", "</think>", JSON_CALL, JSON_CALL[:35], JSON_CALL[-20:]]),
    ("qwen3_coder", "qwen3", ["<think>", "</think>", TAGS_CALL, TAGS_CALL[:44], TAGS_CALL[:60], TAGS_CALL[-26:]]),
    ("openai", "openai_gptoss", [THOUGHT, ANSWER, MESSAGE_CALL, MESSAGE_CALL[:70], MESSAGE_CALL[-14:], ANSWER[:40]]),
]
formats = pytest.mark.parametrize(("tools", "reasoning", "marked"), FORMATS)
outputs = given(data=st.data(), parallel=st.booleans(), shown=st.booleans())
often = settings(max_examples=200, deadline=None, derandomize=True)


def _parser(tools: str, reasoning: str) -> OutputParser:
    parser = output_parser(tools, reasoning, {"f": None}, "")
    assert parser is not None
    return parser


def _body(parallel: bool, shown: bool) -> ChatBody:
    messages = [Message("user", "hi")]
    return ChatBody(model="m", messages=messages, parallel_tool_calls=parallel, include_reasoning=shown)


def _deltas(data: st.DataObject, marked: list[str]) -> list[Delta]:
    """An output of these pieces, cut anywhere."""
    text = "".join(data.draw(st.lists(st.sampled_from([*marked, "text ", "\n"]), min_size=1, max_size=8)))
    *pieces, last = cut_at(text, data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [*(Delta(piece, []) for piece in pieces), Delta(last, [], finish_reason="stop")]


def _is_whole(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


@formats
@outputs
@often
def test_a_stream_amounts_to_the_whole(
    tools: str, reasoning: str, marked: list[str], data: st.DataObject, parallel: bool, shown: bool
) -> None:
    body, deltas = _body(parallel, shown), _deltas(data, marked)
    text = "".join(delta.text for delta in deltas)
    whole, reason = parsed_message(_parser(tools, reasoning), text, "stop", body)
    stream = ParsedStream(_parser(tools, reasoning), body)
    content, thoughts, streamed_reason = "", "", None
    calls: dict[int, list[str]] = {}
    for each in deltas:
        delta, streamed_reason = stream.push(each)
        content += delta.content or ""
        thoughts += delta.reasoning or ""
        assert delta.reasoning == delta.reasoning_content
        for call in delta.tool_calls or ():
            entry = calls.setdefault(call.index, [call.function.name or "", ""])
            entry[1] += call.function.arguments
    assert (content, streamed_reason) == (whole.content or "", reason)
    assert thoughts == (whole.reasoning or "")
    kept = [(call.function.name, call.function.arguments) for call in whole.tool_calls or ()]
    complete = [(name, arguments) for name, arguments in calls.values() if _is_whole(arguments)]
    assert complete == kept  # the others broke off, and are content
    assert reason == ("tool_calls" if kept else "stop")


@formats
@outputs
@often
def test_streamed_blocks_amount_to_the_whole_ones(
    tools: str, reasoning: str, marked: list[str], data: st.DataObject, parallel: bool, shown: bool
) -> None:
    body, deltas = _body(parallel, shown), _deltas(data, marked)
    streamed, whole = (Blocks(_parser(tools, reasoning), body) for _ in range(2))
    grown: dict[int, str] = {}
    for each in deltas:
        for change in streamed.push(each):
            grown[change.block.index] = grown.get(change.block.index, "") + change.text
    whole.read("".join(delta.text for delta in deltas))
    for kind in ("text", "reasoning"):
        assert streamed.joined(kind) == whole.joined(kind)
    assert [(call.name, call.text) for call in streamed.calls] == [(call.name, call.text) for call in whole.calls]
    assert [grown[block.index] for block in streamed.row] == [block.text for block in streamed.row]
