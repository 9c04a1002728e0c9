"""Pooler: embeddings from the hidden states that steps make anyway."""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.protocol.plan import PlanRow, RowResult
from octavo.protocol.pooling import Pooling

NOT_FINITE = "the model's hidden states for this request are not numbers"


class Pooler:
    """Owns, by slot, what is asked of a sequence and what of its mean is summed up. Nothing here waits for a device."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[Pooling, int]] = {}  # the int is num_prompt_tokens
        self._sums: dict[int, Tensor] = {}  # float32 [hidden_size]; of a prompt that is half computed

    def set_slot(self, slot: int, pooling: Pooling | None, num_prompt_tokens: int) -> None:
        """A sequence enters a slot: a new one, or one whose prompt is computed again."""
        self._sums.pop(slot, None)
        if pooling is None:
            self._asked.pop(slot, None)
        else:
            self._asked[slot] = pooling, num_prompt_tokens

    def pool(self, rows: list[PlanRow], hidden: Tensor) -> tuple[list[int], Tensor] | None:
        """The slots whose prompts end with this step, and their embeddings, float32 [n, hidden_size] of length 1.

        hidden: [T, hidden_size], the rows' tokens one after the other; what follows them is not read.
        """
        if not self._asked or not any(row.slot in self._asked for row in rows):
            return None
        sums: dict[int, Tensor] = {}
        slots, pooled = [], []
        begin = 0
        for row in rows:
            end = begin + row.length
            pooling, num_prompt_tokens = self._asked.get(row.slot, (None, 0))
            if pooling == "mean":
                total = hidden[begin:end].sum(0, dtype=torch.float32)
                sums[row.slot] = total + self._sums[row.slot] if row.start else total
            if pooling is not None and row.samples:
                slots.append(row.slot)
                pooled.append(hidden[end - 1].float() if pooling == "last" else sums[row.slot] / num_prompt_tokens)
            begin = end
        # Only now: a step that runs out of memory in between is run again.
        self._sums |= sums
        for slot in slots:
            self.set_slot(slot, None, 0)
        return (slots, torch.nn.functional.normalize(torch.stack(pooled), dim=-1)) if slots else None


def with_embeddings(rows: list[PlanRow], results: list[RowResult], pooled: tuple[list[int], Tensor]) -> list[RowResult]:
    """The rows' results with the embeddings of `pool`, now on the host. One that is not finite is the row's error."""
    slots, embeddings = pooled
    finite = embeddings.isfinite().all(-1).tolist()
    found = {slot: (vector, good) for slot, vector, good in zip(slots, embeddings.numpy().astype("<f4"), finite)}
    return [
        _with_embedding(result, *found[row.slot]) if row.slot in found else result for row, result in zip(rows, results)
    ]


def _with_embedding(result: RowResult, vector: NDArray[np.float32], good: bool) -> RowResult:
    if result.error is not None:
        return result
    if not good:
        return RowResult([], error=NOT_FINITE)
    return msgspec.structs.replace(result, embedding=vector.tobytes())
