"""The bodies of requests: every field that is used, with its type. Anything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from octavo.protocol.repetition import RepetitionDetectionParams
from octavo.server.openai.structured import StructuredFields

MAX_PROMPTS = 256

Label = Annotated[str, Meta(max_length=512)]
Salt = Annotated[str, Meta(min_length=1, max_length=512)]
FunctionName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Label], Meta(max_length=16)]

# Fields of OpenAI or vLLM that this server does not implement, and the values (besides null) that ask for
# nothing more than what it does anyway.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "detokenize": (True,),
    "documents": (),
    "extra_args": (),
    "function_call": ("none",),
    "functions": ([],),
    "kv_transfer_params": (),
    "logits_processors": ([],),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "request_id": (),  # the X-Request-Id header does this
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "thinking_token_budget": (),
    "truncation_side": ("left",),
    "verbosity": ("medium",),
    "vllm_xargs": (),
    "web_search_options": (),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(StructuredFields, kw_only=True, frozen=True):
    """What both generation endpoints take. None is "not given". The sampling fields are checked by SamplingParams.

    user, metadata, safety_identifier, prompt_cache_key: labels for the operator's own use; they
    change nothing in the answer, by OpenAI's definition, and are capped in length.
    """

    model: str
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    best_of: int | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    logit_bias: dict[str, float] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    cache_salt: Salt | None = None
    user: Label | None = None
    metadata: Metadata | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class CompletionBody(GenerationBody, kw_only=True, frozen=True):
    """POST /v1/completions. logprobs: how many alternatives a token; prompt: text(s) or token ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """arguments: a JSON object, as a string."""

    name: FunctionName
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    id: Label
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One message. content may be null only beside tool_calls; reasoning (or reasoning_content, its older name) is
    the assistant's. The null-only fields are what clients send when they append an answer's message as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Meta(min_length=1)] | None = None
    name: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")] | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    tool_call_id: Label | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class Function(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """parameters: a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    type: Literal["function"]
    function: Function


class FunctionChoice(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: FunctionName


class NamedToolChoice(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    type: Literal["function"]
    function: FunctionChoice


class ChatBody(GenerationBody, kw_only=True, frozen=True):
    """POST /v1/chat/completions. max_tokens is the old name of max_completion_tokens: both are equal, or one.

    parallel_tool_calls: false keeps the first call of an answer only.
    include_reasoning: false leaves reasoning out of the answer.
    """

    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = None
