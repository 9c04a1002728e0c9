"""Vocabulary: what a grammar has to know of a tokenizer."""

from __future__ import annotations

from typing import Protocol

import msgspec


class TokenSource(Protocol):
    """A tokenizer, as far as it is needed here."""

    vocab_size: int
    special_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]

    def token_bytes(self, token_id: int) -> bytes | None: ...


class Vocabulary(msgspec.Struct, frozen=True):
    """tokens: the bytes of each id, empty for one that no text has. special_ids: tokens that only a grammar which
    names them allows. eos_ids: at least one; allowed where the text may end."""

    tokens: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]


def vocabulary_of(source: TokenSource, vocab_size: int) -> Vocabulary:
    """The first `vocab_size` ids, the model's. Raises ValueError for a tokenizer without an end-of-sequence token."""
    eos_ids = [i for i in source.eos_token_ids if i < vocab_size]
    if not eos_ids:
        raise ValueError("structured_outputs needs a tokenizer with an end-of-sequence token")
    tokens = [source.token_bytes(i) or b"" for i in range(vocab_size)]
    return Vocabulary(tokens, sorted({i for i in source.special_ids if i < vocab_size}.union(eos_ids)), eos_ids)
