"""Body and answers of /v1/responses (OpenAI's Responses API): text and tools."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from octavo.server.openai.response_input import InputItem
from octavo.server.openai.schema import ChatBody, FunctionName, Label, Message, Metadata, Salt

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """A function that the model may call. parameters: a JSON schema. strict: true holds calls to it; null is false."""

    type: Literal["function"]
    name: FunctionName
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """tool_choice for one function alone."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True, frozen=True):
    """No constraint."""


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True, frozen=True):
    """Any JSON object."""


class JsonSchemaFormat(
    msgspec.Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True, frozen=True, omit_defaults=True
):
    """The schema binds whatever `strict` says. name, description: labels, which change nothing."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the text must be. verbosity: medium, or null, asks for nothing."""

    format: TextFormat | JsonObjectFormat | JsonSchemaFormat = TextFormat()
    verbosity: Literal["medium"] | None = None


class ResponsesBody(msgspec.Struct, kw_only=True, frozen=True):
    """store: null is true where the server can. tools: at most 128 functions; tool_choice: null is "auto".
    parallel_tool_calls: false keeps the first call of an answer only. text: see TextConfig; null is plain text.
    The last fields are not OpenAI's: what the other routes take too.
    """

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
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: str
    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    previous_response_id: Label | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    store: bool | None = None
    stream: bool | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
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
    thinking_token_budget: int | None = None


# Fields that a chat has too, under the same name and with the same meaning.
SHARED = tuple(
    name
    for name in ResponsesBody.__struct_fields__
    if name in ChatBody.__struct_fields__ and name not in ("tools", "tool_choice")
)


class ResponseRequest(ChatBody, kw_only=True, frozen=True):
    """A ResponsesBody as the chat it is, with its own `source`. conversation: what is stored, without the answer;
    items: what the source's input adds to it."""

    source: ResponsesBody
    response_id: str
    conversation: list[Message]
    items: list[InputItem]
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


class FunctionCallItem(msgspec.Struct, frozen=True, tag="function_call", tag_field="type"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class ReasoningPart(msgspec.Struct, frozen=True, tag="reasoning_text", tag_field="type"):
    text: str


class ReasoningItem(msgspec.Struct, frozen=True, tag="reasoning", tag_field="type"):
    id: str
    content: list[ReasoningPart]
    status: Status
    summary: list[Any] = []


OutputItem = OutputMessage | FunctionCallItem | ReasoningItem


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """reasoning_tokens: of the text of the reasoning, without its marks."""

    reasoning_tokens: int


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


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, and what events carry of it on the way. Times are Unix seconds."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    output: list[OutputItem] = []
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
    text: TextConfig
    tool_choice: str | NamedFunction
    tools: list[FunctionTool]
    top_logprobs: int = 0
    truncation: str = "disabled"


class InputItemList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of a response's input. The ids are null where there is nothing."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(msgspec.Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
