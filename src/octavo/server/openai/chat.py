"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import msgspec

from octavo.protocol.sampling import SamplingParams
from octavo.server.context import ServerState
from octavo.server.openai.chat_messages import (
    AssistantMessage,
    ChatDelta,
    ChatFinishReason,
    ParsedStream,
    parsed_message,
)
from octavo.server.openai.decode import warn_of_old_name
from octavo.server.openai.endpoint import GenerationEndpoint
from octavo.server.openai.errors import invalid
from octavo.server.openai.logprobs import ChatLogprobs, PromptToken
from octavo.server.openai.runner import Choice, Run, Usage
from octavo.server.openai.sampling import sampling_params, with_max_tokens
from octavo.server.openai.schema import ChatBody, Message
from octavo.server.openai.sse import EventEncoder, Frames
from octavo.server.openai.structured import Wish
from octavo.server.openai.tools import OutputFormat, ToolCalling
from octavo.text.chat_template import RESERVED_VARIABLES
from octavo.text.generation import Delta

_PLAIN_TAIL = b'},"finish_reason":null}'  # of a ChunkChoice that has only text


class ChatChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    index: int
    message: AssistantMessage
    finish_reason: ChatFinishReason | None
    logprobs: ChatLogprobs | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptToken] | None] | None = None
    prompt_token_ids: list[int] | None = None


class ChunkChoice(msgspec.Struct, frozen=True, omit_defaults=True):
    index: int
    delta: ChatDelta
    finish_reason: ChatFinishReason | None
    logprobs: ChatLogprobs | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletions(GenerationEndpoint[ChatBody]):
    """The endpoint. Raises APIError inside; the app turns it into an answer."""

    body_type = ChatBody

    def __init__(self, state: ServerState) -> None:
        """Raises ValueError where the options ask for tool calls that cannot be read."""
        super().__init__(state)
        self.tool_calling = ToolCalling(state.context.options, state.context.chat_template)

    def num_prompts(self, body: ChatBody) -> int:  # noqa: ARG002 (completions have several)
        return 1

    def wish(self, body: ChatBody) -> Wish | None:
        self.check(body)
        return self.tool_calling.wish(body)

    async def prepare(self, body: ChatBody, run: Run) -> None:
        _check_max_tokens(body)
        max_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        names = {"logprobs": "top_logprobs", "max_tokens": max_name, "prompt": "messages"}
        params = self._params(body, names, run.wish)
        text, ids = await self.prompt_of(body)
        ids = params.truncated(ids, self.context.max_model_len)
        default = self.context.generation_defaults.get("max_tokens")
        params = with_max_tokens(params, len(ids), default, self.context, names)
        run.reasoning = self.tool_calling.marks(body, text, params)
        run.add(text, ids, params, names)

    async def prompt_of(self, body: ChatBody) -> tuple[str, list[int]]:
        """Text and token ids of the prompt, for a body that `wish` or `check` has seen. Raises APIError 400."""
        text = await self._render(body)
        return text, await self.encode(text, bool(body.add_special_tokens), "messages")

    def check(self, body: ChatBody) -> None:
        """Refuse what cannot be rendered. Raises APIError 400."""
        _check_messages(body.messages)
        if self.context.chat_template is not None:
            self.tool_calling.check(body)

    def answer(self, body: ChatBody, run: Run, request_id: str) -> ChatCompletion:
        answered = run.answered
        first = answered[0]
        output_format = self.tool_calling.format(body)
        prompt_logprobs = first.generation.prompt_logprobs
        return ChatCompletion(
            id=f"chatcmpl-{request_id}",
            object="chat.completion",
            created=int(time.time()),
            model=run.model.name,
            system_fingerprint=self.fingerprint,
            choices=[self._choice(body, choice, output_format) for choice in answered],
            usage=run.usage(),
            prompt_logprobs=None if prompt_logprobs is None else self.formatter.prompt(prompt_logprobs),
            prompt_token_ids=first.request.prompt_token_ids if body.return_token_ids else None,
        )

    def frames(self, body: ChatBody, run: Run, request_id: str) -> ChatFrames:
        return ChatFrames(self, body, run, request_id)

    def _params(self, body: ChatBody, names: dict[str, str], wish: Wish | None) -> SamplingParams:
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        if body.use_beam_search and body.logprobs:
            raise invalid("logprobs=true is refused with use_beam_search; allowed: false", "logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        skips = False if self.tool_calling.format(body).needs_special_tokens else None
        return sampling_params(
            body,
            self.context,
            names,
            wish,
            max_tokens=wanted,
            logprobs=logprobs,
            skip_special_tokens=skips,
            thinking_token_budget=body.thinking_token_budget,
        )

    async def _render(self, body: ChatBody) -> str:
        template = self.context.chat_template
        if template is None:
            raise invalid("the model has no chat template; start the server with --chat-template FILE", "messages")
        kwargs = body.chat_template_kwargs or {}
        for key in kwargs:
            if key in RESERVED_VARIABLES:
                raise invalid(f"{key!r} is reserved: the request's own fields set it", f"chat_template_kwargs.{key}")
        continues = bool(body.continue_final_message)
        opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt
        if continues and opens:
            raise invalid("exclude each other: add_generation_prompt, continue_final_message", "continue_final_message")
        messages = [_for_template(message) for message in body.messages]
        render = partial(
            template.render,
            messages,
            add_generation_prompt=opens,
            continue_final_message=continues,
            tools=self.tool_calling.for_template(body),
            **kwargs,
        )
        try:
            return await self.state.in_thread(render)
        except ValueError as error:
            raise invalid(str(error), "messages") from None

    def _choice(self, body: ChatBody, choice: Choice, output_format: OutputFormat) -> ChatChoice:
        generation = choice.generation
        parser = output_format.parser(choice.prompt)
        message = AssistantMessage(generation.text)
        finish_reason: ChatFinishReason | None = generation.finish_reason
        if parser is not None:
            message, finish_reason = parsed_message(parser, generation.text, generation.finish_reason, body)
        logprobs = None
        if body.logprobs and generation.logprobs is not None:
            logprobs = self.formatter.chat(generation.logprobs, body.top_logprobs or 0)
        return ChatChoice(
            index=choice.index,
            message=message,
            finish_reason=finish_reason,
            logprobs=logprobs,
            stop_reason=generation.stop_reason,
            token_ids=generation.token_ids if body.return_token_ids else None,
        )


class ChatFrames(Frames):
    """The chunks of one streamed answer. Before the first one, each choice opens with its role."""

    def __init__(self, endpoint: ChatCompletions, body: ChatBody, run: Run, request_id: str) -> None:
        self._formatter = endpoint.formatter
        self._body = body
        self._run = run
        self._options = endpoint.stream_options(body)
        self._encoder = EventEncoder(
            {
                "id": f"chatcmpl-{request_id}",
                "object": "chat.completion.chunk",
                "created": int(time.time()),
                "model": run.model.name,
                "system_fingerprint": endpoint.fingerprint,
            }
        )
        self._opened = False
        output_format = endpoint.tool_calling.format(body)
        parsers = {choice.index: output_format.parser(choice.prompt) for choice in run.choices}
        self._parsed = {index: ParsedStream(p, body) for index, p in parsers.items() if p is not None}
        # Nothing but text in all chunks but each choice's last.
        says_more = body.return_token_ids or body.logprobs or self._options.continuous_usage_stats
        self._plain = not (self._parsed or says_more)

    def frame(self, choice: Choice, delta: Delta) -> bytes:
        """See Frames.frame."""
        opening = b""
        if not self._opened:
            self._opened = True
            opening = b"".join(self._opening(each) for each in self._run.choices)
        if self._plain and delta.finish_reason is None:
            if not delta.text:
                return opening
            return opening + self._encoder.text_chunk(
                b'{"index":%d,"delta":{"content":' % choice.index, delta.text, _PLAIN_TAIL
            )
        chunk = self._chunk(choice, delta)
        if chunk is None:
            return opening
        return opening + self._encoder.chunk(chunk, self._usage())

    def last(self) -> bytes:
        """See Frames.last."""
        return self._encoder.chunk(None, self._run.usage()) if self._options.include_usage else b""

    def _usage(self) -> Usage | None:
        """What every chunk says of it."""
        return self._run.usage() if self._options.continuous_usage_stats else None

    def _opening(self, choice: Choice) -> bytes:
        """The chunk of a choice's role. That of the first choice has the prompt's tokens: they are all choices' own."""
        shown = self._body.return_token_ids and choice.index == 0
        chunk = ChunkChoice(choice.index, ChatDelta("assistant", ""), None)
        return self._encoder.chunk(chunk, self._usage(), choice.request.prompt_token_ids if shown else None)

    def _chunk(self, choice: Choice, delta: Delta) -> ChunkChoice | None:
        shows_tokens = bool(delta.token_ids) and bool(delta.logprobs or self._body.return_token_ids)
        message, finish_reason = self._message(choice, delta)
        if not (message.says_something or finish_reason or shows_tokens):
            return None
        if shows_tokens and not message.says_something:
            message.content = ""
        logprobs = self._formatter.chat(delta.logprobs, self._body.top_logprobs or 0) if delta.logprobs else None
        return ChunkChoice(
            index=choice.index,
            delta=message,
            finish_reason=finish_reason,
            logprobs=logprobs,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else None,
        )

    def _message(self, choice: Choice, delta: Delta) -> tuple[ChatDelta, ChatFinishReason | None]:
        stream = self._parsed.get(choice.index)
        if stream is None:
            return ChatDelta(content=delta.text or None), delta.finish_reason
        return stream.push(delta)


def _check_max_tokens(body: ChatBody) -> None:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise invalid(
            f"max_tokens={old} is not max_completion_tokens={new}, whose old name it is; allowed: one of them, or "
            "equal values",
            "max_tokens",
        )


def _check_messages(messages: list[Message]) -> None:
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise invalid(f"{at}.content is null or missing", f"{at}.content", "invalid_type")
        if message.tool_calls is not None and message.role != "assistant":
            raise invalid(f"{at}.tool_calls is only allowed for the role assistant", f"{at}.tool_calls")
        for name in ("reasoning", "reasoning_content"):
            if getattr(message, name) is not None and message.role != "assistant":
                raise invalid(f"{at}.{name} is only allowed for the role assistant", f"{at}.{name}")
        if message.reasoning_content not in (None, message.reasoning) and message.reasoning is not None:
            old = f"{at}.reasoning_content"
            raise invalid(f"{old} differs from {at}.reasoning, whose old name it is; allowed: one of them", old)
        if (message.tool_call_id is not None) != (message.role == "tool"):
            raise invalid(f"{at}.tool_call_id belongs to the role tool, which needs it", f"{at}.tool_call_id")
        for number, call in enumerate(message.tool_calls or ()):
            try:
                msgspec.json.decode(call.function.arguments, type=dict[str, msgspec.Raw])
            except (msgspec.DecodeError, RecursionError):
                path = f"{at}.tool_calls[{number}].function.arguments"
                raise invalid(f"{path} is not a JSON object", path) from None


def _for_template(message: Message) -> dict[str, Any]:
    """The message as templates know it: fields that were not given are absent."""
    if message.reasoning_content is not None:
        warn_of_old_name("messages[].reasoning_content", "messages[].reasoning")
    given: dict[str, Any] = msgspec.to_builtins(message)
    given["reasoning"] = given["reasoning_content"] = message.reasoning or message.reasoning_content
    return {name: value for name, value in given.items() if value is not None or name == "content"}
