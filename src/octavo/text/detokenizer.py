"""Incremental detokenization: token ids in, text out, in pieces that never cut a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from octavo.text.tokenizer import Tokenizer

# A UTF-8 character has at most 4 bytes and every visible token at least one: the last four such tokens of a
# prompt hold all that can still be part of an unfinished character.
_CONTEXT_TOKENS = 4


class IncrementalDetokenizer:
    """The text of an output that grows. The pieces concatenate to the text of all the ids, flush included.

    Bytes of an unfinished character wait for the rest of it; bytes that no continuation can make valid come
    out as U+FFFD at once. Time is linear in the bytes. An output that follows a prompt keeps its leading space,
    and completes a character that the prompt left unfinished.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._close_up = frozenset() if spaces_between_special_tokens else tokenizer.special_ids
        self._last_is_special = False
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        context = self._context(prompt_token_ids)
        self._utf8.decode(b"".join(context))
        self._spaces_to_strip = 0 if context else tokenizer.leading_spaces_stripped

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        if self._close_up:
            raw = b"".join([self._closed_up(i) for i in token_ids if i not in self._skipped])
        else:
            raw = b"".join([self._token_bytes(i) or b"" for i in token_ids if i not in self._skipped])
        text = self._utf8.decode(raw)
        return self._strip(text) if self._spaces_to_strip else text

    def flush(self) -> str:
        """The end of the text: U+FFFD for an unfinished character, else nothing."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _closed_up(self, token_id: int) -> bytes:
        """Its bytes, without spaces between it and a special token where it is one too."""
        raw = self._token_bytes(token_id) or b""
        follows, self._last_is_special = self._last_is_special, token_id in self._close_up
        return raw.lstrip(b" ") if follows and self._last_is_special else raw

    def _context(self, prompt_token_ids: Sequence[int]) -> list[bytes]:
        """The bytes of the prompt's last visible tokens, in order."""
        context: list[bytes] = []
        for token_id in reversed(prompt_token_ids):
            token = None if token_id in self._skipped else self._token_bytes(token_id)
            if token:
                context.append(token)
                if len(context) == _CONTEXT_TOKENS:
                    break
        return context[::-1]

    def _strip(self, text: str) -> str:
        while self._spaces_to_strip and text:
            if not text.startswith(" "):
                self._spaces_to_strip = 0
                break
            text = text[1:]
            self._spaces_to_strip -= 1
        return text
