"""Bodies and answers of POST /v1/messages and /v1/messages/count_tokens (Anthropic's Messages API), text only."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from octavo.server.openai.schema import ChatBody, Label, Message, Salt, TextPart


class CacheControl(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Asks that what stands before it may be cached. The prefix cache does so for every prompt, asked or not."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None  # as clients send an answer's block back


Content = str | Annotated[list[TextBlock], Meta(min_length=1)]


class Turn(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One message. Neighbours of one role are one turn."""

    role: Literal["user", "assistant", "system"]
    content: Content


class RequestMetadata(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """user_id: a label for the operator's own use, as `user` is on the other routes."""

    user_id: Label | None = None


class CountBody(msgspec.Struct, kw_only=True, frozen=True):
    """POST /v1/messages/count_tokens."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "container": (),
        "context_management": (),
        "diagnostics": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "output_config": (),
        "output_format": (),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "thinking": ({"type": "disabled"},),
        "tool_choice": ({"type": "auto"}, {"type": "none"}),
        "tools": ([],),
    }

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: Content | None = None
    cache_control: CacheControl | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesBody(CountBody, kw_only=True, frozen=True):
    """POST /v1/messages. The last fields are not Anthropic's: what the other routes take too."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: RequestMetadata | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: Salt | None = None


# Fields that a chat has too, under the same name and with the same meaning.
SHARED = tuple(
    name
    for name in MessagesBody.__struct_fields__
    if name in ChatBody.__struct_fields__ and name not in ("messages", "metadata", "chat_template_kwargs")
)


def as_chat(body: CountBody, **fields: Any) -> ChatBody:
    """The body as a chat. A last turn of the assistant's is continued."""
    messages = [] if body.system is None else [Message("system", _content(body.system))]
    for role, turns in groupby(body.messages, key=lambda turn: turn.role):
        several = list(turns)
        if len(several) == 1:
            messages.append(Message(role, _content(several[0].content)))
        else:
            messages.append(Message(role, [part for turn in several for part in _parts(turn.content)]))
    continues = body.messages[-1].role == "assistant"
    return ChatBody(
        model=body.model,
        messages=messages,
        continue_final_message=continues,
        add_generation_prompt=not continues,
        chat_template_kwargs=body.chat_template_kwargs,
        **fields,
    )


def _content(content: Content) -> str | list[TextPart]:
    return content if isinstance(content, str) else _parts(content)


def _parts(content: Content) -> list[TextPart]:
    if isinstance(content, str):
        return [TextPart("text", content)]
    return [TextPart("text", block.text) for block in content]


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


class AnswerBlock(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    text: str
    citations: None = None


class MessageUsage(msgspec.Struct, frozen=True):
    """Tokens. The prompt is what was computed and what came from the prefix cache, together."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0


class MessageAnswer(msgspec.Struct, frozen=True, tag="message", tag_field="type"):
    id: str
    model: str
    content: list[AnswerBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    role: Literal["assistant"] = "assistant"
