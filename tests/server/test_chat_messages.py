"""A streamed message and a whole one say the same."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.server.openai.chat_messages import ParsedStream, parsed_message
from octavo.server.openai.schema import ChatBody, Message
from octavo.structured.chat_output import output_parser
from octavo.structured.events import OutputParser
from octavo.text.generation import Delta

CALL = '<tool_call>{"name": "f", "arguments": {"a": "b"}}</tool_call>'
PIECES = st.sampled_from(["<think>", "</think>", CALL, CALL[:35], CALL[-20:], "text ", "\n"])


def _parser() -> OutputParser:
    parser = output_parser("hermes", "qwen3", {"f": None}, "")
    assert parser is not None
    return parser


@given(pieces=st.lists(PIECES, min_size=1, max_size=8), parallel=st.booleans(), shown=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_stream_amounts_to_the_whole(pieces: list[str], parallel: bool, shown: bool) -> None:
    messages = [Message("user", "hi")]
    body = ChatBody(model="m", messages=messages, parallel_tool_calls=parallel, include_reasoning=shown)
    whole, reason = parsed_message(_parser(), "".join(pieces), "stop", body)
    stream = ParsedStream(_parser(), body)
    content, reasoning = "", ""
    calls: dict[int, list[str]] = {}
    for index, piece in enumerate(pieces):
        ends = "stop" if index == len(pieces) - 1 else None
        delta, streamed_reason = stream.push(Delta(piece, [], finish_reason=ends))
        content += delta.content or ""
        reasoning += delta.reasoning or ""
        assert delta.reasoning == delta.reasoning_content
        for call in delta.tool_calls or ():
            entry = calls.setdefault(call.index, [call.function.name or "", ""])
            entry[1] += call.function.arguments
    assert (content, streamed_reason) == (whole.content or "", reason)
    assert reasoning == (whole.reasoning or "")
    kept = [(call.function.name, call.function.arguments) for call in whole.tool_calls or ()]
    complete = [(name, arguments) for name, arguments in calls.values() if arguments.endswith("}")]
    assert complete == kept  # the others broke off, and are content
    assert reason == ("tool_calls" if kept else "stop")
