"""Sampling the rows of a step on a CPU, guesses verified (speculative decoding).

A token is drawn at each position as it would be without guesses: from the same distribution, with the same random
number, after the same tokens. A guess is accepted where it is that token. So outputs are what they are without
speculation; and as a guess has no probability here, this is the rejection rule of Leviathan et al. (2023) and Chen et
al. (2023) itself: a guess d is accepted with the probability p(d), else the token comes from p without d.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.protocol.plan import PlanRow, RowResult, TokenLogprobs
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots


class Pending(NamedTuple):
    """A row that samples. at: of the logits of its first position; those after the guesses follow."""

    row: PlanRow
    at: int

    @property
    def first(self) -> int:
        """The first position that is sampled."""
        return self.row.start + self.row.length - self.row.num_drafts


class _Drawn:
    """What one row has come to."""

    def __init__(self, drafts: list[int]) -> None:
        self._drafts = drafts
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._failed: RowResult | None = None

    def take(self, result: RowResult) -> bool:
        """The draw at the next position. Returns whether the next but one is to be drawn: the guess came true."""
        self._failed = result if result.error is not None else None
        self._token_ids += result.token_ids
        self._logprobs += result.logprobs or []
        count = len(self._token_ids)
        return self._failed is None and count <= len(self._drafts) and self._token_ids[-1] == self._drafts[count - 1]

    def result(self) -> RowResult:
        if self._failed is not None:
            return self._failed
        return RowResult(self._token_ids, self._logprobs or None)


def verify(logits: Tensor, pending: list[Pending], sampler: Sampler, slots: Slots) -> list[RowResult]:
    """Draw each row's tokens, up to the first that is not the guess there, and write them to the slots.

    logits: [N, V], of all positions that may be sampled.
    """
    drawn = []
    for row, first in ((p.row, p.first) for p in pending):
        drafts = slots.token_ids[row.slot, first : first + row.num_drafts].tolist() if row.num_drafts else []
        drawn.append(_Drawn(drafts))
    going, step = list(range(len(pending))), 0
    while going:
        some = [pending[index] for index in going]
        picked = logits
        if len(some) < logits.shape[0]:
            picked = logits[torch.tensor([p.at + step for p in some], device=logits.device)]
        own_slots, positions = [p.row.slot for p in some], [p.first + step for p in some]
        masks = [p.row.masks[step] if p.row.masks is not None else None for p in some]
        sampled = sampler.sample(picked, own_slots, positions, masks)
        where = torch.tensor([own_slots, positions], device=logits.device)
        slots.token_ids[where[0], where[1]] = sampled.token_ids
        results = sampler.to_rows(sampled)
        going = [index for index, result in zip(going, results) if drawn[index].take(result)]
        step += 1
    return [own.result() for own in drawn]
