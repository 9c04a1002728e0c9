"""Embeddings: what a request may ask for in place of tokens, and how the vector travels."""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from octavo.protocol.sampling import SamplingParams

# Which of the last hidden states of a prompt make its embedding: that of its last token, or the mean of all.
Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean")


class PoolingParams(msgspec.Struct, frozen=True, array_like=True):
    """What a request wants of its prompt's last hidden states.

    kind: an embedding, or the last one's score, which is a vector of one number.
    normalize: the embedding is scaled to length 1. dimensions: only so many of its first numbers, None for all.
    """

    kind: Literal["last", "mean", "score"] = "last"
    normalize: bool = True
    dimensions: int | None = None


SCORE = PoolingParams("score", normalize=False)

# An embedding is a request of one token, which is drawn and thrown away: so it is scheduled as any other.
SAMPLING = SamplingParams(temperature=0, max_tokens=1, seed=0, detokenize=False)


def floats(vector: bytes) -> list[float]:
    """The numbers of an embedding: little-endian float32."""
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
