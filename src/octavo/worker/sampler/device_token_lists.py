"""Token lists and logits processors on a GPU, where the host does not know the last tokens yet."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from octavo.worker.sampler.logits_processors import apply_processors
from octavo.worker.sampler.slots import SlotParams
from octavo.worker.sampler.token_lists import Word

# What pads a word at its beginning: it stands for any token.
_ANY = -1


class DeviceTokenLists:
    """Masks of barred tokens, by slot, made at a slot's first draw. Only processors wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._params: dict[int, SlotParams] = {}
        self._barred: dict[int, Tensor] = {}

    def set_slot(self, slot: int, params: SlotParams) -> None:
        """The slot's sequence, from now on."""
        self._barred.pop(slot, None)
        if params.is_listed:
            self._params[slot] = params
        else:
            self._params.pop(slot, None)

    def has_processors(self, slots: list[int]) -> bool:
        """Whether `process` would change a row."""
        return any(slot in self._params and self._params[slot].processors for slot in slots)

    def process(self, logits: Tensor, slots: list[int], positions: list[int], token_ids: Tensor) -> None:
        """Call, in place, the rows' logits processors. logits: float32 [n, V]. positions: of the draws.
        token_ids: int32 [num_slots, N], the tokens of every slot."""
        for row, slot in enumerate(slots):
            params = self._params.get(slot)
            if params is not None and params.processors:
                tokens = token_ids[slot, : positions[row]].tolist()
                prompt, output = tokens[: params.num_prompt_tokens], tokens[params.num_prompt_tokens :]
                apply_processors(logits[row], params.processors, prompt, output)

    def bar(self, logits: Tensor, slots: list[int], positions: list[int], token_ids: Tensor) -> None:
        """Set to -inf, in place, what the rows' token lists bar. Arguments as for `process`."""
        words: list[tuple[int, Word]] = []
        for row, slot in enumerate(slots):
            params = self._params.get(slot)
            if params is None or params.lists is None:
                continue
            if params.lists.barred is not None:
                logits[row].masked_fill_(self._mask(slot, params.lists.barred), -torch.inf)
            num_output = positions[row] - params.num_prompt_tokens
            words += [(row, word) for word in params.lists.words if len(word) <= num_output + 1]
        if words:
            self._bar_words(logits, words, slots, positions, token_ids)

    def _bar_words(
        self, logits: Tensor, words: list[tuple[int, Word]], slots: list[int], positions: list[int], token_ids: Tensor
    ) -> None:
        """words: rows and sequences, none of which would reach into the prompt."""
        longest = max(len(word) for _, word in words)
        host = np.full((len(words), longest + 3), _ANY, dtype=np.int64)
        for index, (row, word) in enumerate(words):
            host[index, :3] = row, slots[row], positions[row]
            host[index, 3 + longest - len(word) :] = word
        table = self._upload(host)
        rows, at, ids = table[:, 0], table[:, 1:3], table[:, 3:]
        back = torch.arange(1 - longest, 0, device=self._device)
        before = token_ids[at[:, :1], (at[:, 1:] + back).clamp(min=0)]
        follows = ((before == ids[:, :-1]) | (ids[:, :-1] == _ANY)).all(-1)
        # Equal tokens of one row add up: -inf and 0 are -inf in any order.
        barred = torch.zeros(len(words), device=self._device).masked_fill_(follows, -torch.inf)
        logits.index_put_((rows, ids[:, -1]), barred, accumulate=True)

    def _mask(self, slot: int, barred: np.ndarray) -> Tensor:
        if slot not in self._barred:
            self._barred[slot] = self._upload(barred)
        return self._barred[slot]

    def _upload(self, array: np.ndarray) -> Tensor:
        host = torch.from_numpy(array)
        return (host.pin_memory() if self._device.type == "cuda" else host).to(self._device, non_blocking=True)
