"""The tokens of those sequences whose next token depends on them, on the host."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from octavo.worker.sampler.logits_processors import apply_processors
from octavo.worker.sampler.slots import SlotParams
from octavo.worker.sampler.token_lists import bar_listed


class Histories:
    """All tokens, the prompt first, of the slots with token lists or logits processors. `set_slot` and `append`
    are the only writers."""

    def __init__(self) -> None:
        self._token_ids: dict[int, list[int]] = {}

    def set_slot(self, slot: int, params: SlotParams, token_ids: list[int]) -> None:
        """The slot's sequence, from now on."""
        if params.is_listed:
            self._token_ids[slot] = list(token_ids)
        else:
            self._token_ids.pop(slot, None)

    def process(self, logits: Tensor, slots: list[int], params: list[SlotParams]) -> None:
        """Call, in place, the rows' logits processors. logits: float32 [R, V]; row r is of slots[r]."""
        for row, (slot, p) in enumerate(zip(slots, params)):
            if p.processors:
                tokens = self._token_ids[slot]
                prompt, output = tokens[: p.num_prompt_tokens], tokens[p.num_prompt_tokens :]
                apply_processors(logits[row], p.processors, prompt, output)

    def bar(self, logits: Tensor, slots: list[int], params: list[SlotParams]) -> None:
        """Set, in place, what the rows' token lists bar to -inf."""
        for row, (slot, p) in enumerate(zip(slots, params)):
            if p.lists is not None:
                output = self._token_ids[slot][p.num_prompt_tokens :] if p.lists.words else []
                bar_listed(logits[row], p.lists, output)

    def append(self, slots: Iterable[int], token_ids: Tensor) -> None:
        """The tokens drawn, int64 [R]. Waits for the device only where a slot's tokens matter."""
        kept = [(row, slot) for row, slot in enumerate(slots) if slot in self._token_ids]
        if kept:
            drawn = token_ids.tolist()
            for row, slot in kept:
                self._token_ids[slot].append(drawn[row])
