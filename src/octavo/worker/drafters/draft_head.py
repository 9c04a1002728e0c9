"""A head on the model's own states as drafter (EAGLE, Li et al. 2024 and 2025), on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend
from octavo.models.base import Drafted, DraftHead
from octavo.protocol.plan import NewSequence, PlanRow
from octavo.worker.drafters.drafter import DraftRow
from octavo.worker.forward import prepare
from octavo.worker.sampler.sampler import argmax
from octavo.worker.slots import Slots


class HeadDrafter:
    """Guesses what the head holds likeliest, each from what it made of the one before.

    Its KV has gaps where a sequence was asked for no guesses; those cost acceptance.
    """

    def __init__(self, head: DraftHead, attention: AttentionBackend, slots: Slots) -> None:
        """attention: of one layer, with as many blocks as the model's own, of the same size."""
        self._head = head
        self._attention = attention
        self._slots = slots

    def enter(self, new: NewSequence, start: int) -> None:
        """See Drafter: its KV is that of the slot's blocks."""

    def propose(self, rows: list[DraftRow], features: Tensor | None) -> list[list[int]]:
        """See Drafter."""
        assert features is not None
        guesses: list[list[int]] = [[] for _ in rows]
        read, picked, begin = [], [], 0
        for index, row in enumerate(rows):
            if row.count or row.is_prompt:
                # At position i the head reads the features there and the token after it.
                length = row.length if row.is_prompt else row.num_tokens - 1 - row.start
                read.append((index, PlanRow(row.slot, row.start, length, [], True)))
                picked.append(torch.arange(begin, begin + length))
            begin += row.length
        if not read:
            return guesses
        drafted = self._forward([row for _, row in read], self._head.fuse(features[torch.cat(picked)]), None)
        ends = torch.tensor([row.length for _, row in read]).cumsum(0) - 1
        going = [index for index, _ in read if rows[index].count]
        last = ends[torch.tensor([bool(rows[index].count) for index, _ in read])]
        while going:
            likeliest = argmax(self._head.compute_logits(drafted.hidden[last]))
            ids = self._head.to_target_ids(likeliest)
            kept = []
            for place, (index, token_id) in enumerate(zip(going, ids.tolist())):
                guesses[index].append(token_id)
                if len(guesses[index]) < rows[index].count:
                    kept.append(place)
            if not kept:
                break
            going = [going[place] for place in kept]
            where = torch.tensor(kept)
            ahead = [
                PlanRow(rows[index].slot, rows[index].num_tokens - 2 + len(guesses[index]), 1, [], True)
                for index in going
            ]
            drafted = self._forward(ahead, drafted.features[last][where], ids[where])
            last = torch.arange(len(going))
        return guesses

    def _forward(self, rows: list[PlanRow], features: Tensor, next_ids: Tensor | None) -> Drafted:
        """next_ids: the tokens after the rows' positions; None: those in the slots."""
        inputs = prepare(self._attention, self._slots, rows)
        if next_ids is None:
            slots = torch.repeat_interleave(inputs.row_slots, torch.tensor([row.length for row in rows]))
            next_ids = self._slots.token_ids[slots, inputs.positions + 1]
        drafted: Drafted = self._head(next_ids, inputs.positions, features.contiguous(), self._attention)
        return drafted
