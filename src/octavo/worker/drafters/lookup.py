"""Drafts by lookup: what followed the same tokens earlier in the sequence (prompt lookup decoding, Saxena 2023), or in
other requests' outputs (as SuffixDecoding, Oliaro et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels import triton
from octavo.kernels.reference import lookup as reference
from octavo.kernels.reference.lookup import SEPARATOR

MAX_MATCH = 64  # tokens; the kernel's time grows with it where text repeats itself
_LIMITS = {"min_match": (1, MAX_MATCH), "max_match": (1, MAX_MATCH), "max_drafts": (1, 64), "corpus_tokens": (0, 2**28)}


@dataclass(frozen=True, slots=True)
class LookupSettings:
    """min_match, max_match: tokens of the run looked for; a longer one than max_match counts as max_match.
    max_drafts: of a row and step. corpus_tokens: of past outputs that are kept, 0 for own tokens alone.

    Raises ValueError naming field, value and range.
    """

    min_match: int
    max_match: int
    max_drafts: int
    corpus_tokens: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name}={value}; allowed: {least} to {most}")
        if self.min_match > self.max_match:
            raise ValueError(f"min_match={self.min_match}; allowed: 1 to max_match={self.max_match}")


class PastOutputs:
    """The last outputs of finished requests, a ring of `capacity` tokens on the device; the oldest are overwritten.

    tokens: int32 [capacity], a SEPARATOR after each output and wherever nothing was written yet. head: int32 [1], the
    index of the oldest token, where the next output goes. Both stay where they are: CUDA graphs may read them.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.tokens = torch.full((capacity,), SEPARATOR, dtype=torch.int32, device=device)
        self.head = torch.zeros(1, dtype=torch.int32, device=device)
        self._next = 0  # host: what head holds

    def add(self, output_token_ids: Tensor) -> None:
        """Keep an output, or its end where it is longer than the ring has room for; waits for nothing.

        output_token_ids: integers [n], on any device; what lies on the ring's own must not be written meanwhile by
        another stream. Other tokens than outputs may be added just as well.
        """
        capacity = len(self.tokens)
        kept = output_token_ids[max(0, len(output_token_ids) - capacity + 1) :]
        for piece in (kept, self.tokens.new_full((1,), SEPARATOR)):
            fits = piece[: capacity - self._next]
            self.tokens[self._next : self._next + len(fits)] = fits
            self.tokens[: len(piece) - len(fits)] = piece[len(fits) :]
            self._next = (self._next + len(piece)) % capacity
        self.head.fill_(self._next)


class Lookup:
    """Finds drafts for the rows of a step. past: where finished outputs are to be added; None without a corpus."""

    def __init__(self, settings: LookupSettings, device: torch.device) -> None:
        self.settings = settings
        self.past = PastOutputs(settings.corpus_tokens, device) if settings.corpus_tokens else None
        self._find = triton.get().find_drafts if device.type == "cuda" else reference.find_drafts

    def find(
        self, token_ids: Tensor, slots: Tensor, lengths: Tensor, wanted: Tensor, drafts: Tensor, counts: Tensor
    ) -> None:
        """Write drafts, int32 [R, max_drafts], and how many there are of each row to counts, int32 [R].

        token_ids: [num_slots, max_len]; lengths: int32 [num_slots]; slots, wanted: int32 [R]. All as
        kernels/reference/lookup.py has them.
        On a GPU the launches depend on shapes alone.
        """
        corpus, head = (None, None) if self.past is None else (self.past.tokens, self.past.head)
        least, most = self.settings.min_match, self.settings.max_match
        self._find(token_ids, slots, lengths, wanted, corpus, head, least, most, drafts, counts)
