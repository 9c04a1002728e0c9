"""Masks of tokens, as in PlanRow: one bit each, the lowest of a byte first."""

from __future__ import annotations

import functools
from collections.abc import Iterable


@functools.lru_cache(4)
def full_mask(vocab_size: int) -> bytes:
    """All tokens; bits beyond the vocabulary mean nothing."""
    return b"\xff" * -(-vocab_size // 8)


def mask_of(token_ids: Iterable[int], vocab_size: int) -> bytes:
    """These tokens alone."""
    return with_tokens(bytes(-(-vocab_size // 8)), token_ids)


def with_tokens(mask: bytes, token_ids: Iterable[int]) -> bytes:
    """The mask and these tokens."""
    bits = bytearray(mask)
    for token_id in token_ids:
        bits[token_id >> 3] |= 1 << (token_id & 7)
    return bytes(bits)


def without(mask: bytes, token_ids: Iterable[int]) -> bytes:
    """The mask less these tokens, or the mask itself where nothing would be left."""
    bits = bytearray(mask)
    for token_id in token_ids:
        if token_id >> 3 < len(bits):
            bits[token_id >> 3] &= ~(1 << (token_id & 7))
    return mask if bits.count(0) == len(bits) else bytes(bits)


def admits(mask: bytes, token_id: int) -> bool:
    """Whether the mask has the token."""
    return bool(mask[token_id >> 3] >> (token_id & 7) & 1)


def first_of(mask: bytes) -> int:
    """The lowest token that the mask has; it has some."""
    bits = int.from_bytes(mask, "little")
    return (bits & -bits).bit_length() - 1
