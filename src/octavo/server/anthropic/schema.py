"""Bodies and answers of POST /v1/messages and /v1/messages/count_tokens (Anthropic's Messages API): text and tools."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from octavo.server.openai.schema import ChatBody, FunctionName, Label, Salt


class CacheControl(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Asks that what stands before it may be cached. The prefix cache does so for every prompt, asked or not."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="text", tag_field="type"):
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None  # as clients send an answer's block back


class ToolUse(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="tool_use", tag_field="type"):
    """A call that the assistant made. The null-only fields are what clients send of an answer's block."""

    id: Label
    name: FunctionName
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: None = None
    toolset_name: None = None


class ToolResult(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="tool_result", tag_field="type"):
    """What the call with the id `tool_use_id` gave; null is an empty text. is_error: the model reads it behind
    "Error: "."""

    tool_use_id: Label
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: None = None


class Thinking(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="thinking", tag_field="type"):
    """The assistant's reasoning. signature: as this server's answers have it, which is empty."""

    thinking: str
    signature: Literal[""] = ""


SystemContent = str | Annotated[list[TextBlock], Meta(min_length=1)]
Block = TextBlock | ToolUse | ToolResult | Thinking
Content = str | Annotated[list[Block], Meta(min_length=1)]


Role = Literal["user", "assistant", "system"]


class Turn(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One message. Neighbours of one role are one turn."""

    role: Role
    content: Content


class RequestMetadata(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """user_id: a label for the operator's own use, as `user` is on the other routes."""

    user_id: Label | None = None


class MessageTool(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A function that the model may call. input_schema: the JSON schema of its input. strict: true holds calls to it.
    eager_input_streaming: null or true; inputs always come as they are written."""

    name: FunctionName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: Literal[True] | None = None


class AutoChoice(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="auto", tag_field="type"):
    disable_parallel_tool_use: bool = False


class AnyChoice(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="any", tag_field="type"):
    """At least one call, of any tool."""

    disable_parallel_tool_use: bool = False


class ToolChoice(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="tool", tag_field="type"):
    """One call of the tool of that name."""

    name: FunctionName
    disable_parallel_tool_use: bool = False


class NoChoice(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="none", tag_field="type"):
    """No call; the tools are shown nevertheless."""


class ThinkingOff(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="disabled", tag_field="type"):
    """Leaves reasoning out of the answer, on a server that can tell it from the text."""


class ThinkingAdaptive(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="adaptive", tag_field="type"):
    """The model thinks as it likes, and the answer has its thoughts, on a server that can tell them from the text."""

    display: Literal["summarized"] | None = None


class ThinkingOn(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag="enabled", tag_field="type"):
    """The same as adaptive, and after so many tokens of thoughts their end is forced."""

    budget_tokens: Annotated[int, Meta(ge=0)]
    display: Literal["summarized"] | None = None


class OutputFormat(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The text is JSON that follows `schema`."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """effort: null only."""

    format: OutputFormat | None = None
    effort: None = None


class CountBody(msgspec.Struct, kw_only=True, frozen=True):
    """POST /v1/messages/count_tokens. tools: at most 128; tool_choice: null is "auto". thinking: null shows what the
    server tells from the text."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "container": (),
        "context_management": (),
        "diagnostics": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "output_format": (),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "user_profile_id": (),
        "workspace_id": (),
    }

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: SystemContent | None = None
    tools: Annotated[list[MessageTool], Meta(max_length=128)] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolChoice | NoChoice | None = None
    thinking: ThinkingOff | ThinkingOn | ThinkingAdaptive | None = None
    output_config: OutputConfig | None = None
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
    if name in ChatBody.__struct_fields__
    and name not in ("model", "messages", "metadata", "tools", "tool_choice", "chat_template_kwargs")
)


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


class AnswerText(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    text: str
    citations: None = None


class AnswerToolUse(msgspec.Struct, frozen=True, tag="tool_use", tag_field="type"):
    """input: a JSON object."""

    id: str
    name: str
    input: msgspec.Raw


class AnswerThinking(msgspec.Struct, frozen=True, tag="thinking", tag_field="type"):
    thinking: str
    signature: str = ""


AnswerBlock = AnswerText | AnswerToolUse | AnswerThinking


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
