"""POST /v1/messages and /v1/messages/count_tokens: a chat in the shape of Anthropic's Messages API."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.server.anthropic.errors import MessagesError, as_messages_error
from octavo.server.anthropic.schema import (
    SHARED,
    AnswerBlock,
    CountBody,
    MessageAnswer,
    MessagesBody,
    MessageUsage,
    TokenCount,
    as_chat,
)
from octavo.server.context import ServerState
from octavo.server.openai.conversation import ConversationEndpoint
from octavo.server.openai.decode import Ignored, decode
from octavo.server.openai.errors import APIError
from octavo.server.openai.json_endpoint import JsonEndpoint
from octavo.server.openai.runner import Choice, Run
from octavo.server.openai.schema import ChatBody
from octavo.server.openai.sse import Frames
from octavo.text.generation import Delta

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class Messages(ConversationEndpoint[ChatBody]):
    """The endpoint. Raises MessagesError inside."""

    body_type = ChatBody
    names: ClassVar[dict[str, str]] = {"prompt": "messages", "stop": "stop_sequences"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with as_messages_error():
            await super().__call__(scope, receive, send)

    def read(self, raw: bytes, ignored: Ignored) -> ChatBody:
        body = decode(raw, MessagesBody, ignored)
        shared = {name: getattr(body, name) for name in SHARED if name != "model"}
        return as_chat(body, **shared, stop=body.stop_sequences)

    def answer(self, body: ChatBody, run: Run, request_id: str) -> MessageAnswer:  # noqa: ARG002
        return self.message(run, request_id, [AnswerBlock(run.choices[0].generation.text)])

    def frames(self, body: ChatBody, run: Run, request_id: str) -> MessageFrames:  # noqa: ARG002
        return MessageFrames(self, run, request_id)

    def message(self, run: Run, request_id: str, content: list[AnswerBlock]) -> MessageAnswer:
        """The message as it now stands."""
        reason, sequence = stop_of(run.choices[0])
        name = self.context.served_model_names[0]
        return MessageAnswer(f"msg_{request_id}", name, content, reason, sequence, usage_of(run))


class CountTokens(JsonEndpoint[CountBody]):
    """The endpoint. Raises MessagesError inside."""

    body_type = CountBody

    def __init__(self, state: ServerState) -> None:
        super().__init__(state)
        self._messages = Messages(state)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with as_messages_error():
            await super().__call__(scope, receive, send)

    async def answer(self, body: CountBody) -> TokenCount:
        _, ids = await self._messages.prompt_of(as_chat(body))
        return TokenCount(len(ids))


def stop_of(choice: Choice) -> tuple[str | None, str | None]:
    """stop_reason and stop_sequence; of a choice that is not finished, neither."""
    generation = choice.generation
    if generation.finish_reason is None:
        return None, None
    if isinstance(generation.stop_reason, str):
        return "stop_sequence", generation.stop_reason
    return _STOP_REASONS[generation.finish_reason], None


def usage_of(run: Run) -> MessageUsage:
    """Tokens so far."""
    usage = run.usage()
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(usage.prompt_tokens - cached, cached, usage.completion_tokens)


class MessageFrames(Frames):
    """The events of one streamed message. Its stream ends with its last event."""

    done = b""

    def __init__(self, endpoint: Messages, run: Run, request_id: str) -> None:
        self._endpoint = endpoint
        self._run = run
        self._request_id = request_id
        self._opened = False

    def frame(self, choice: Choice, delta: Delta) -> bytes:  # noqa: ARG002 (there is one choice)
        """See Frames.frame."""
        events = b""
        if not self._opened:
            self._opened = True
            events = self._opening()
        if delta.text:
            text = {"type": "text_delta", "text": delta.text}
            events += _event("content_block_delta", index=0, delta=text)
        if delta.finish_reason is not None:
            events += _event("content_block_stop", index=0)
        return events

    def last(self) -> bytes:
        """See Frames.last."""
        reason, sequence = stop_of(self._run.choices[0])
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return _event("message_delta", delta=delta, usage=usage_of(self._run)) + _event("message_stop")

    def failed(self, error: APIError) -> bytes:
        """See Frames.failed."""
        return b"event: error\ndata: " + MessagesError(error).body() + b"\n\n"

    def _opening(self) -> bytes:
        """The message as it begins: nothing of it is there yet, though its first tokens may have come already."""
        message = msgspec.structs.replace(
            self._endpoint.message(self._run, self._request_id, []), stop_reason=None, stop_sequence=None
        )
        return _event("message_start", message=message) + _event(
            "content_block_start", index=0, content_block=AnswerBlock("")
        )


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))
