"""Embeddings: what a request may ask for in place of tokens, and how the vector travels."""

from __future__ import annotations

import struct
from typing import Literal

from octavo.protocol.sampling import SamplingParams

# Which of the last hidden states of a prompt make its embedding: that of its last token, or the mean of all.
# Either is scaled to length 1.
Pooling = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean")

# An embedding is a request of one token, which is drawn and thrown away: so it is scheduled as any other.
SAMPLING = SamplingParams(temperature=0, max_tokens=1, seed=0, detokenize=False)


def floats(vector: bytes) -> list[float]:
    """The numbers of an embedding: little-endian float32."""
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
