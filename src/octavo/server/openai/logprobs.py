"""Log-probabilities in OpenAI's two shapes and in vLLM's one for prompts."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octavo.protocol.plan import TokenLogprobs
from octavo.text.tokenizer import Tokenizer

_FLOOR = -9999.0  # stands for minus infinity, which JSON cannot say


class TokenEntry(msgspec.Struct, frozen=True):
    """One token of chat's logprobs. bytes: its UTF-8 bytes, for a token may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ContentEntry(TokenEntry, frozen=True):
    top_logprobs: list[TokenEntry]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ContentEntry]


class CompletionLogprobs(msgspec.Struct):
    """text_offset: characters from the start of the text, in token texts. None: the first token of a prompt has
    no distribution before it."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class PromptToken(msgspec.Struct, frozen=True):
    logprob: float
    rank: int | None
    decoded_token: str


class LogprobsFormatter:
    """Renders token ids with their texts; without a tokenizer a token's text is "token_id:<id>"."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def chat(self, positions: Sequence[TokenLogprobs], num_top: int) -> ChatLogprobs:
        return ChatLogprobs([self._content(position, num_top) for position in positions])

    def completion(
        self, token_ids: Sequence[int], positions: Sequence[TokenLogprobs | None], num_top: int, offset: int
    ) -> tuple[CompletionLogprobs, int]:
        """The entries for `token_ids` and the offset after them. top_logprobs has the token itself as well."""
        shaped = CompletionLogprobs()
        for token_id, position in zip(token_ids, positions, strict=True):
            text = self._text(token_id)
            shaped.tokens.append(text)
            shaped.text_offset.append(offset)
            offset += len(text)
            if position is None:
                shaped.token_logprobs.append(None)
                shaped.top_logprobs.append(None)
                continue
            own = max(position.logprobs[0], _FLOOR)
            top = list(zip(position.token_ids, position.logprobs))[1 : 1 + num_top]
            shaped.token_logprobs.append(own)
            shaped.top_logprobs.append({self._text(i): max(p, _FLOOR) for i, p in top} | {text: own})
        return shaped, offset

    def prompt(self, positions: Sequence[TokenLogprobs]) -> list[dict[str, PromptToken] | None]:
        """vLLM's prompt_logprobs: a dict of token id -> values a position, None for the first token.

        The rank of an alternative is its place among them.
        """
        shaped: list[dict[str, PromptToken] | None] = [None]
        for position in positions:
            entries: dict[str, PromptToken] = {}
            for rank, (token_id, logprob) in enumerate(zip(position.token_ids, position.logprobs)):
                entry = PromptToken(max(logprob, _FLOOR), rank or position.rank, self._text(token_id))
                entries.setdefault(str(token_id), entry)
            shaped.append(entries)
        return shaped

    def _content(self, position: TokenLogprobs, num_top: int) -> ContentEntry:
        own, *top = (self._entry(i, p) for i, p in zip(position.token_ids, position.logprobs))
        return ContentEntry(own.token, own.logprob, own.bytes, top[:num_top])

    def _entry(self, token_id: int, logprob: float) -> TokenEntry:
        raw = (self._tokenizer.token_bytes(token_id) or b"") if self._tokenizer is not None else b""
        return TokenEntry(self._text(token_id), max(logprob, _FLOOR), list(raw))

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.token_text(token_id)
