"""Drafts by lookup: what followed the same tokens earlier in the sequence (prompt lookup decoding, Saxena 2023), or in
other requests' outputs (as SuffixDecoding, Oliaro et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels import triton
from octavo.kernels.reference import lookup as reference
from octavo.kernels.reference.lookup import SEPARATOR
from octavo.protocol.plan import NewSequence, PlanRow
from octavo.worker.device_speculation import DeviceDraftBatch
from octavo.worker.drafters.drafter import DraftRow

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
        ring = (None, None) if self.past is None else (self.past.tokens, self.past.head)
        match = self.settings.min_match, self.settings.max_match
        self._find(token_ids, slots, lengths, wanted, *ring, *match, drafts, counts)


class _Owners:
    """Whose tokens a slot holds, so that they can be kept when the next one takes it."""

    def __init__(self, lookup: Lookup) -> None:
        self._past = lookup.past
        self._spans: dict[int, tuple[int, int]] = {}  # by slot: prompt tokens, and known tokens at most

    def enter(self, new: NewSequence, token_ids: Tensor) -> None:
        """A sequence takes a slot; keep the output that lies there."""
        begin, end = self._spans.pop(new.slot, (0, 0))
        if self._past is not None and end > begin:
            self._past.add(token_ids[new.slot, begin:end])
        if not new.is_private:
            self._spans[new.slot] = new.num_prompt_tokens, 0

    def know(self, slot: int, num_tokens: int) -> None:
        """The slot's sequence has so many tokens."""
        if slot in self._spans:
            self._spans[slot] = self._spans[slot][0], num_tokens


class LookupDrafter:
    """Guesses by lookup on a CPU."""

    def __init__(self, settings: LookupSettings, token_ids: Tensor) -> None:
        """token_ids: of all slots, [num_slots, max_len]."""
        self._token_ids = token_ids
        self._most = settings.max_drafts
        self._lengths = torch.zeros(len(token_ids), dtype=torch.int32)  # known tokens, by slot
        self._lookup = Lookup(settings, token_ids.device)
        self._owners = _Owners(self._lookup)

    def enter(self, new: NewSequence, start: int) -> None:  # noqa: ARG002
        """See Drafter."""
        self._owners.enter(new, self._token_ids)

    def propose(self, rows: list[DraftRow], features: Tensor | None) -> list[list[int]]:  # noqa: ARG002
        """See Drafter."""
        for row in rows:
            self._owners.know(row.slot, row.num_tokens)
            self._lengths[row.slot] = row.num_tokens
        slots, wanted = torch.tensor([[row.slot for row in rows], [row.count for row in rows]], dtype=torch.int32)
        drafts = torch.zeros(len(rows), self._most, dtype=torch.int32)
        counts = torch.zeros(len(rows), dtype=torch.int32)
        self._lookup.find(self._token_ids, slots, self._lengths, wanted, drafts, counts)
        return [found[:count] for found, count in zip(drafts.tolist(), counts.tolist())]


class DeviceLookupDrafter:
    """Guesses by lookup on a GPU, where the tokens are; the host waits for nothing."""

    def __init__(self, settings: LookupSettings, token_ids: Tensor) -> None:
        """token_ids: int32 [num_slots, max_len], of all slots."""
        self._token_ids = token_ids
        self._lookup = Lookup(settings, token_ids.device)
        self._owners = _Owners(self._lookup)

    def enter(self, new: NewSequence, start: int) -> None:  # noqa: ARG002
        """See Drafter."""
        self._owners.enter(new, self._token_ids)

    def propose(self, batch: DeviceDraftBatch) -> None:
        """See DeviceDrafter."""
        self.skip(batch.rows, batch.prompts)
        self._lookup.find(batch.token_ids, batch.slots, batch.lengths, batch.wanted, batch.drafts, batch.found)

    def skip(self, rows: Sequence[PlanRow], prompts: Sequence[bool]) -> None:  # noqa: ARG002
        """See DeviceDrafter."""
        for row in rows:
            self._owners.know(row.slot, row.start + row.length + row.samples)

    def record(self, lengths: Tensor, token_ids: Tensor) -> None:
        """See DeviceDrafter: it has no graphs."""
