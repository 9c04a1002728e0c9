"""Repetition, frequency and presence penalties, and the token counts they need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.worker.sampler.slots import SlotParams


class Penalties:
    """Which tokens each slot has seen. Rows of the tables exist up to the highest slot that ever used them."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._output_counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)

    @property
    def num_rows(self) -> int:
        """Slots that the tables have room for."""
        return self._in_prompt.shape[0]

    def set_slot(self, slot: int, prompt: list[int], output: list[int]) -> None:
        """Forget the slot's past; it has now seen these tokens."""
        self._grow(slot + 1)
        vocab_size = self._in_prompt.shape[1]
        counts = np.bincount(np.array(output, dtype=np.int64), minlength=vocab_size)
        in_prompt = np.zeros(vocab_size, dtype=np.bool_)
        in_prompt[prompt] = True
        self._output_counts[slot] = torch.from_numpy(counts.astype(np.int32)).to(self._in_prompt.device)
        self._in_prompt[slot] = torch.from_numpy(in_prompt).to(self._in_prompt.device)

    def _grow(self, num_rows: int) -> None:
        if num_rows <= self.num_rows:
            return
        more = max(num_rows, 2 * self.num_rows) - self.num_rows
        self._output_counts = torch.nn.functional.pad(self._output_counts, (0, 0, 0, more))
        self._in_prompt = torch.nn.functional.pad(self._in_prompt, (0, 0, 0, more))

    def apply(self, logits: Tensor, slots: list[int], params: list[SlotParams]) -> None:
        """Penalize, in place, the rows that ask for it. logits: float32 [R, V]; row r is of slots[r].

        Repetition (Keskar et al. 2019): logits of tokens seen in prompt or output are divided by it
        where positive, else multiplied. Frequency and presence: over the output, count and fact.
        """
        rows = [r for r, p in enumerate(params) if p.is_penalized]
        if not rows:
            return
        where = torch.tensor([rows, [slots[r] for r in rows]], device=logits.device)
        values = torch.tensor(
            [[params[r].repetition_penalty, params[r].frequency_penalty, params[r].presence_penalty] for r in rows],
            device=logits.device,
        )
        repetition, frequency, presence = values[:, :, None].unbind(1)
        counts = self._output_counts[where[1]].float()
        in_output = counts.clamp(max=1)
        seen = torch.maximum(in_output, self._in_prompt[where[1]].float())
        factor = torch.addcmul(1 - seen, seen, repetition)  # exactly the penalty, or 1
        part = logits[where[0]]
        part = part.clamp(min=0).div_(factor).add_(part.clamp_(max=0).mul_(factor))
        part -= counts.mul_(frequency)
        part -= in_output.mul_(presence)
        logits[where[0]] = part

    def count(self, slots: list[int], params: list[SlotParams], token_ids: Tensor) -> None:
        """Add the sampled tokens, int64 [R] on the device, to the outputs of the slots that are counted."""
        rows = [r for r, p in enumerate(params) if p.is_penalized]
        if rows:
            where = torch.tensor([rows, [slots[r] for r in rows]], device=token_ids.device)
            self._output_counts[where[1], token_ids[where[0]]] += 1  # slots are distinct
