"""A drafter for tests on a GPU's runner."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from octavo.protocol.plan import NewSequence, PlanRow
from octavo.worker.device_speculation import DeviceDraftBatch


class Oracle:
    """Knows what is to come, and is wrong now and then, or says nothing."""

    def __init__(self, prompts: list[list[int]], outputs: list[list[int]], num_drafts: int, vocab_size: int) -> None:
        self._whole = [prompt + output for prompt, output in zip(prompts, outputs)]
        self._most, self._vocab_size = num_drafts, vocab_size
        self._rng = random.Random(0)

    def enter(self, new: NewSequence, start: int) -> None:
        pass

    def skip(self, rows: Sequence[PlanRow], prompts: Sequence[bool]) -> None:
        pass

    def propose(self, batch: DeviceDraftBatch) -> None:
        for group, slot in enumerate(batch.slots.tolist()):
            if slot < 0 or self._rng.random() < 0.1:
                continue
            known = batch.token_ids[slot, : batch.lengths[slot]].tolist()
            (whole,) = (ids for ids in self._whole if ids[: len(known)] == known)
            guesses = whole[len(known) :][: self._rng.randrange(1, self._most + 1)]
            wrong = [self._rng.randrange(self._vocab_size) if self._rng.random() < 0.25 else guess for guess in guesses]
            batch.drafts[group, : len(wrong)] = torch.tensor(wrong, dtype=torch.int32)
            batch.found[group] = len(wrong)
