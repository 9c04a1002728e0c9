"""The messages of chat answers, whole and in deltas, made from what the parsers say."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from octavo.protocol.outputs import FinishReason
from octavo.server.openai.schema import ChatBody, FunctionCall, ToolCall
from octavo.structured.events import (
    ArgumentsText,
    ContentText,
    Event,
    OutputParser,
    ReasoningText,
    ToolCallBegun,
    ToolCallBroken,
    collect,
)
from octavo.text.generation import Delta

ChatFinishReason = FinishReason | Literal["tool_calls"]


class AssistantMessage(msgspec.Struct, frozen=True):
    """reasoning_content: the same as reasoning, under its older name."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """id, type and the function's name come with the first delta of a call."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)


def parsed_message(
    parser: OutputParser, text: str, finish_reason: FinishReason | None, body: ChatBody
) -> tuple[AssistantMessage, ChatFinishReason | None]:
    """The message of a whole output, and why it ended."""
    whole = collect(parser.feed(text) + parser.finish())
    calls = whole.calls[:1] if body.parallel_tool_calls is False else whole.calls
    reasoning = whole.reasoning if whole.reasoning and body.include_reasoning is not False else UNSET
    message = AssistantMessage(
        content=None if calls and not whole.content else whole.content,
        reasoning=reasoning,
        reasoning_content=reasoning,
        tool_calls=[ToolCall(c.id, FunctionCall(c.name, c.arguments)) for c in calls] if calls else UNSET,
    )
    return message, "tool_calls" if calls and finish_reason == "stop" else finish_reason


class ParsedStream:
    """One choice's deltas. `push` takes each of the engine's, the last one included, once."""

    def __init__(self, parser: OutputParser, body: ChatBody) -> None:
        self._parser = parser
        self._one_call = body.parallel_tool_calls is False
        self._shows_reasoning = body.include_reasoning is not False
        self._calls: set[int] = set()  # begun and, so far, not broken

    def push(self, delta: Delta) -> tuple[ChatDelta, ChatFinishReason | None]:
        events = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.finish()
        message = self._message(events)
        ends_in_calls = bool(self._calls) and delta.finish_reason == "stop"
        return message, "tool_calls" if ends_in_calls else delta.finish_reason

    def _message(self, events: list[Event]) -> ChatDelta:
        content: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, ToolCallDelta] = {}
        for event in events:
            match event:
                case ContentText(text):
                    content.append(text)
                case ReasoningText(text):
                    reasoning.append(text)
                case ToolCallBegun(index, call_id, name):
                    if not (self._one_call and self._calls):
                        self._calls.add(index)
                        calls[index] = ToolCallDelta(index, FunctionDelta("", name), call_id, "function")
                case ArgumentsText(index, text):
                    if index in self._calls:
                        call = calls.setdefault(index, ToolCallDelta(index, FunctionDelta("")))
                        call.function.arguments += text
                case ToolCallBroken(index, text):
                    self._calls.discard(index)
                    content.append(text)
        thoughts = "".join(reasoning) if self._shows_reasoning else ""
        return ChatDelta(
            content="".join(content) or None,
            reasoning=thoughts or None,
            reasoning_content=thoughts or None,
            tool_calls=list(calls.values()) or None,
        )
