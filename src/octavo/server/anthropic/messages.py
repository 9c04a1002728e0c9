"""POST /v1/messages and /v1/messages/count_tokens: a chat in the shape of Anthropic's Messages API."""

from __future__ import annotations

import re
from typing import Any, ClassVar, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.server.adapters import ServedModel
from octavo.server.anthropic.errors import MessagesError, as_messages_error
from octavo.server.anthropic.schema import (
    SHARED,
    AnswerBlock,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    CountBody,
    MessageAnswer,
    MessagesBody,
    MessageUsage,
    TokenCount,
)
from octavo.server.anthropic.translation import as_chat
from octavo.server.openai.blocks import Block, Blocks, Change
from octavo.server.openai.conversation import ConversationEndpoint
from octavo.server.openai.decode import Ignored, decode
from octavo.server.openai.errors import APIError
from octavo.server.openai.json_endpoint import JsonEndpoint
from octavo.server.openai.runner import Choice, Run
from octavo.server.openai.schema import ChatBody
from octavo.server.openai.sse import Frames
from octavo.text.generation import Delta

B = TypeVar("B", bound=CountBody)

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}
# Anthropic's clients say with it that they may use what is beta there; it changes nothing here.
QUERY_NAMES = ("beta",)
_BUILT_IN = re.compile(r"tools\[\d+\]\.type")


class Messages(ConversationEndpoint[ChatBody]):
    """The endpoint. Raises MessagesError inside."""

    body_type = ChatBody
    query_names = QUERY_NAMES
    names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"messages.*", "messages"),
        (r"stop", "stop_sequences"),
        (r"response_format(\.json_schema)?", "output_config.format"),
        (r"(tools\[\d+\])\.function", r"\1"),
        (r"tool_choice\.function", "tool_choice"),
        (r"thinking_token_budget", "thinking.budget_tokens"),
    )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with as_messages_error():
            await super().__call__(scope, receive, send)

    def read(self, raw: bytes, ignored: Ignored) -> ChatBody:
        body = decode_body(raw, MessagesBody, ignored, self.context.vocab_size)
        shared = {name: getattr(body, name) for name in SHARED}
        return self.as_chat(body, **shared, stop=body.stop_sequences)

    def as_chat(self, body: CountBody, **fields: Any) -> ChatBody:
        """Raises APIError 400."""
        return as_chat(body, self.context.options.reasoning_parser is not None, **fields)

    def answer(self, body: ChatBody, run: Run, request_id: str) -> MessageAnswer:
        blocks = self.blocks(body, run)
        blocks.read(run.choices[0].generation.text)
        return self.message(run, request_id, blocks)

    def frames(self, body: ChatBody, run: Run, request_id: str) -> MessageFrames:
        return MessageFrames(self, self.blocks(body, run), run, request_id)

    def blocks(self, body: ChatBody, run: Run) -> Blocks:
        """What the run's output is to be read into."""
        return Blocks(self.chat.tool_calling.format(body).parser(run.choices[0].prompt), body)

    def message(self, run: Run, request_id: str, blocks: Blocks) -> MessageAnswer:
        """The message as it now stands."""
        reason, sequence = stop_of(run.choices[0], blocks)
        content = [answer_block(block) for block in blocks.row]
        return MessageAnswer(f"msg_{request_id}", run.model.name, content, reason, sequence, usage_of(run))


class CountTokens(JsonEndpoint[CountBody]):
    """The endpoint. Raises MessagesError inside."""

    body_type = CountBody
    query_names = QUERY_NAMES

    def __init__(self, messages: Messages) -> None:
        super().__init__(messages.state)
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with as_messages_error():
            await super().__call__(scope, receive, send)

    async def answer(self, body: CountBody, model: ServedModel) -> TokenCount:  # noqa: ARG002 (all count alike)
        return TokenCount(await self._messages.num_prompt_tokens(self._messages.as_chat(body)))


def decode_body(raw: bytes, kind: type[B], ignored: Ignored, vocab_size: int) -> B:
    """See `decode`."""
    try:
        return decode(raw, kind, ignored, vocab_size)
    except APIError as error:
        if error.param is not None and _BUILT_IN.fullmatch(error.param):
            error.message += " (the server has no tools of its own)"
        raise


def answer_block(block: Block) -> AnswerBlock:
    """The block as a whole answer has it."""
    if block.kind == "call":
        return AnswerToolUse(block.call_id, block.name, msgspec.Raw(block.text.encode()))
    return AnswerThinking(block.text) if block.kind == "reasoning" else AnswerText(block.text)


def stop_of(choice: Choice, blocks: Blocks) -> tuple[str | None, str | None]:
    """stop_reason and stop_sequence; of a choice that is not finished, neither."""
    generation = choice.generation
    if generation.finish_reason is None:
        return None, None
    if isinstance(generation.stop_reason, str):
        return "stop_sequence", generation.stop_reason
    if blocks.calls and generation.finish_reason == "stop":
        return "tool_use", None
    return _STOP_REASONS[generation.finish_reason], None


def usage_of(run: Run) -> MessageUsage:
    """Tokens so far."""
    usage = run.usage()
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(usage.prompt_tokens - cached, cached, usage.completion_tokens)


class MessageFrames(Frames):
    """The events of one streamed message. Its stream ends with its last event."""

    done = b""

    def __init__(self, endpoint: Messages, blocks: Blocks, run: Run, request_id: str) -> None:
        self._endpoint = endpoint
        self._blocks = blocks
        self._run = run
        self._request_id = request_id
        self._opened = False

    def frame(self, choice: Choice, delta: Delta) -> bytes:  # noqa: ARG002 (there is one choice)
        """See Frames.frame."""
        events = b""
        if not self._opened:
            self._opened = True
            events = self._opening()
        return events + b"".join([_changed(change) for change in self._blocks.push(delta)])

    def last(self) -> bytes:
        """See Frames.last."""
        reason, sequence = stop_of(self._run.choices[0], self._blocks)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return _event("message_delta", delta=delta, usage=usage_of(self._run)) + _event("message_stop")

    def failed(self, error: APIError) -> bytes:
        """See Frames.failed."""
        return b"event: error\ndata: " + MessagesError(error).body() + b"\n\n"

    def _opening(self) -> bytes:
        """The message as it begins: nothing of it is there yet, though its first tokens may have come already."""
        message = self._endpoint.message(self._run, self._request_id, self._blocks)
        message = msgspec.structs.replace(message, content=[], stop_reason=None, stop_sequence=None)
        return _event("message_start", message=message)


_EMPTY_INPUT = msgspec.Raw(b"{}")
# The delta of each kind of block: its type, and the name of its text.
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def _changed(change: Change) -> bytes:
    block = change.block
    if change.what == "grew":
        kind, name = _DELTAS[block.kind]
        return _event("content_block_delta", index=block.index, delta={"type": kind, name: change.text})
    if change.what == "closed":
        return _event("content_block_stop", index=block.index)
    empty: AnswerBlock = AnswerThinking("") if block.kind == "reasoning" else AnswerText("")
    if block.kind == "call":
        empty = AnswerToolUse(block.call_id, block.name, _EMPTY_INPUT)
    return _event("content_block_start", index=block.index, content_block=empty)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))
