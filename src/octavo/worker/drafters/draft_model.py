"""A smaller model of the same tokens as drafter (Leviathan et al. 2023, Chen et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend
from octavo.models.base import CausalLM, narrow_to
from octavo.protocol.plan import NewSequence, PlanRow
from octavo.worker.drafters.drafter import DraftRow
from octavo.worker.forward import last_tokens, prepare
from octavo.worker.sampler.sampler import argmax
from octavo.worker.slots import Slots


class ModelDrafter:
    """Guesses what the smaller model holds likeliest, token after token, on a CPU.

    Its KV of a sequence may lag behind: what it has not seen yet it computes when guesses are wanted next.
    """

    def __init__(self, model: CausalLM, attention: AttentionBackend, slots: Slots) -> None:
        """attention: with as many blocks as the model's own, of the same size."""
        self._model = model
        self._attention = attention
        self._slots = slots
        self._num_computed: dict[int, int] = {}  # by slot: leading tokens whose KV is there

    def enter(self, new: NewSequence, start: int) -> None:
        """See Drafter."""
        self._num_computed[new.slot] = start

    def propose(self, rows: list[DraftRow], features: Tensor | None) -> list[list[int]]:  # noqa: ARG002
        """See Drafter."""
        guesses: list[list[int]] = [[] for _ in rows]
        wanted = [index for index, row in enumerate(rows) if row.count]
        begins = {index: min(self._num_computed[rows[index].slot], rows[index].num_tokens - 1) for index in wanted}
        while wanted:
            ends = {index: rows[index].num_tokens + len(guesses[index]) for index in wanted}
            likeliest = self._forward(
                [PlanRow(rows[index].slot, begins[index], ends[index] - begins[index], [], True) for index in wanted]
            )
            for index, token_id in zip(wanted, likeliest):
                slot = rows[index].slot
                guesses[index].append(token_id)
                self._slots.token_ids[slot, ends[index]] = token_id
                begins[index] = self._num_computed[slot] = ends[index]
            wanted = [index for index in wanted if len(guesses[index]) < rows[index].count]
        return guesses

    def _forward(self, rows: list[PlanRow]) -> list[int]:
        inputs = prepare(self._attention, self._slots, rows)
        last = last_tokens(rows)
        narrow = None if last is None else narrow_to(last)
        hidden = self._model(inputs.input_ids, inputs.positions, self._attention, None, narrow)
        return torch.Tensor.tolist(argmax(self._model.compute_logits(hidden)))
