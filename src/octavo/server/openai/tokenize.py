"""POST /tokenize and /detokenize: what the server's own tokenizer and chat template make of a text (vLLM's shape)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from octavo.server.adapters import ServedModel
from octavo.server.context import ServerState
from octavo.server.openai.chat import ChatCompletions
from octavo.server.openai.errors import invalid
from octavo.server.openai.json_endpoint import JsonEndpoint
from octavo.server.openai.prompts import encode_text
from octavo.server.openai.schema import ChatBody, Message, Tool
from octavo.text.tokenizer import Tokenizer

_OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


class TokenizeBody(msgspec.Struct, kw_only=True, frozen=True):
    """Either prompt or messages. add_special_tokens is by default true for a prompt; messages bring their own.
    tools: 1..128 functions that are shown beside the messages."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "chat_template": (),
        "media_io_kwargs": (),
        "mm_processor_kwargs": (),
    }

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=128)] | None = None
    return_token_strs: bool | None = None


class Tokens(msgspec.Struct, frozen=True):
    """token_strs: each token as text, with U+FFFD for a part of a character; null where they were not asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(msgspec.Struct, kw_only=True, frozen=True):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}

    tokens: list[int]
    model: str | None = None


class Text(msgspec.Struct, frozen=True):
    prompt: str


class Tokenize(JsonEndpoint[TokenizeBody]):
    """The endpoint. A prompt that could not fit the context by its characters alone is refused untokenized."""

    body_type = TokenizeBody

    def __init__(self, chat: ChatCompletions) -> None:
        super().__init__(chat.state)
        self._chat = chat

    async def answer(self, body: TokenizeBody, model: ServedModel) -> Tokens:  # noqa: ARG002 (adapters bring no tokens)
        tokenizer = tokenizer_of(self.state)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", "prompt")
        ids = await (self._of_prompt(body, tokenizer) if body.messages is None else self._of_messages(body))
        strings = None
        if body.return_token_strs:
            strings = await self.state.in_thread(lambda: [tokenizer.token_text(token_id) for token_id in ids])
        return Tokens(len(ids), self.context.max_model_len, ids, strings)

    async def _of_prompt(self, body: TokenizeBody, tokenizer: Tokenizer) -> list[int]:
        for name in _OF_MESSAGES:
            if getattr(body, name) is not None:
                raise invalid(f"{name} is only allowed with messages", name)
        assert body.prompt is not None
        if not body.prompt:  # which is refused elsewhere
            return tokenizer.encode("", body.add_special_tokens is not False)
        return await encode_text(self.state, body.prompt, body.add_special_tokens is not False, "prompt")

    async def _of_messages(self, body: TokenizeBody) -> list[int]:
        assert body.messages is not None
        chat = ChatBody(
            model=self.context.served_model_names[0],
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
            tools=body.tools,
            add_special_tokens=body.add_special_tokens,
        )
        self._chat.check(chat)
        _, ids = await self._chat.prompt_of(chat)
        return ids


class Detokenize(JsonEndpoint[DetokenizeBody]):
    """The endpoint. Special tokens are written out."""

    body_type = DetokenizeBody

    async def answer(self, body: DetokenizeBody, model: ServedModel) -> Text:  # noqa: ARG002
        tokenizer = tokenizer_of(self.state)
        return Text(await self.state.in_thread(tokenizer.decode, body.tokens, False))


def tokenizer_of(state: ServerState) -> Tokenizer:
    """Raises APIError 400 where the server runs without one."""
    if state.context.tokenizer is None:
        raise invalid("the server runs without a tokenizer", code="no_tokenizer")
    return state.context.tokenizer
