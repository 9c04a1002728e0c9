"""Body and answer of POST /v1/responses (OpenAI's Responses API), text only."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from octavo.server.openai.schema import ChatBody, Label, Message, Metadata, Salt, TextPart

Status = Literal["in_progress", "completed", "incomplete", "failed"]
_Nothing = Annotated[list[Any], Meta(max_length=0)]


class InputPart(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One part of a message. annotations and logprobs are what clients send back of an answer, which has none."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: _Nothing | None = None
    logprobs: _Nothing | None = None


class InputMessage(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One item of the input. id and status are what clients send back of an answer's item."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputPart], Meta(min_length=1)]
    type: Literal["message"] = "message"
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: None = None

    def as_message(self) -> Message:
        if isinstance(self.content, str):
            return Message(self.role, self.content)
        return Message(self.role, [TextPart("text", part.text) for part in self.content])


class ResponsesBody(msgspec.Struct, kw_only=True, frozen=True):
    """store: null is true where the server can. The last fields are not OpenAI's: what the other routes take too."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "reasoning": (),
        "service_tier": ("auto", "default"),
        "stream_options": ({"include_obfuscation": False},),
        "text": ({"format": {"type": "text"}},),
        "tool_choice": ("auto", "none"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: str
    input: str | Annotated[list[InputMessage], Meta(min_length=1)]
    instructions: str | None = None
    previous_response_id: Label | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    store: bool | None = None
    stream: bool | None = None
    parallel_tool_calls: bool | None = None  # says how to call tools, and there are none
    metadata: Metadata | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: Salt | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# Fields that a chat has too, under the same name.
SHARED = tuple(name for name in ResponsesBody.__struct_fields__ if name in ChatBody.__struct_fields__)


class ResponseRequest(ChatBody, kw_only=True, frozen=True):
    """A ResponsesBody as the chat it is, with its own `source`. conversation: what is stored, without the answer."""

    source: ResponsesBody
    response_id: str
    conversation: list[Message]
    stores: bool


class OutputText(msgspec.Struct, frozen=True, tag="output_text", tag_field="type"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(msgspec.Struct, frozen=True, tag="message", tag_field="type"):
    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, frozen=True):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class TextFormat(msgspec.Struct, frozen=True):
    type: Literal["text"] = "text"


class TextConfig(msgspec.Struct, frozen=True):
    format: TextFormat = TextFormat()


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, and what events carry of it on the way. Times are Unix seconds."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    output: list[OutputMessage] = []
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    store: bool
    metadata: dict[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    parallel_tool_calls: bool
    usage: ResponseUsage | None = None
    background: bool = False
    service_tier: str = "default"
    text: TextConfig = TextConfig()
    tool_choice: str = "auto"
    tools: list[Any] = []
    top_logprobs: int = 0
    truncation: str = "disabled"
