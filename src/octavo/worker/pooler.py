"""Pooler: embeddings and scores from the hidden states that steps make anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.protocol.plan import PlanRow, RowResult
from octavo.protocol.pooling import PoolingParams

NOT_FINITE = "the model's hidden states for this request are not numbers"


class Pooled(NamedTuple):
    """Of the slots whose prompts end with a step.

    vectors: float32 [n, hidden_size]; the first sizes[i] numbers of row i are its slot's, zeros follow.
    """

    slots: list[int]
    sizes: list[int]
    vectors: Tensor


class Pooler:
    """Owns, by slot, what is asked of a sequence and what of its mean is summed up. Nothing here waits for a device."""

    def __init__(self, score: Callable[[Tensor], Tensor] | None = None) -> None:
        """score: [1, hidden_size] to float32 [1, 1], of a model that scores texts."""
        self._score = score
        self._asked: dict[int, tuple[PoolingParams, int]] = {}  # the int is num_prompt_tokens
        self._sums: dict[int, Tensor] = {}  # float32 [hidden_size]; of a prompt that is half computed

    def set_slot(self, slot: int, pooling: PoolingParams | None, num_prompt_tokens: int) -> None:
        """A sequence enters a slot: a new one, or one whose prompt is computed again."""
        self._sums.pop(slot, None)
        if pooling is None:
            self._asked.pop(slot, None)
        else:
            self._asked[slot] = pooling, num_prompt_tokens

    def reads_all(self, rows: Sequence[PlanRow]) -> bool:
        """Whether a step of these rows must leave the last hidden states of all its tokens: for a mean."""
        asked = (self._asked.get(row.slot) for row in rows) if self._asked else ()
        return any(entry is not None and entry[0].kind == "mean" for entry in asked)

    def pool(self, rows: Sequence[PlanRow], last: Tensor, hidden: Tensor | None) -> Pooled | None:
        """What is asked of the slots whose prompts end with this step; None where there are none.

        last: [N, hidden_size], of the last 1 + num_drafts tokens of each row; hidden: [T, hidden_size], of all tokens,
        where `reads_all`. The rows' tokens one after the other; what follows them is not read.
        """
        if not self._asked or not any(row.slot in self._asked for row in rows):
            return None
        sums: dict[int, Tensor] = {}
        slots, vectors = [], []
        begin, last_end = 0, 0
        for row in rows:
            end = begin + row.length
            last_end += 1 + row.num_drafts
            pooling, num_prompt_tokens = self._asked.get(row.slot, (None, 0))
            if pooling is not None and pooling.kind == "mean":
                assert hidden is not None, "of the tokens whose mean is asked for, the last one alone is there"
                total = hidden[begin:end].sum(0, dtype=torch.float32)
                sums[row.slot] = total + self._sums[row.slot] if row.start else total
            if pooling is not None and row.samples:
                whole = sums[row.slot] / num_prompt_tokens if pooling.kind == "mean" else last[last_end - 1].float()
                slots.append(row.slot)
                vectors.append(self._finished(whole, pooling))
            begin = end
        # Only now: a step that runs out of memory in between is run again.
        self._sums |= sums
        for slot in slots:
            self.set_slot(slot, None, 0)
        if not slots:
            return None
        padded = torch.zeros(len(slots), last.shape[1], device=last.device)
        for index, vector in enumerate(vectors):
            padded[index, : vector.shape[0]] = vector
        return Pooled(slots, [vector.shape[0] for vector in vectors], padded)

    def _finished(self, vector: Tensor, pooling: PoolingParams) -> Tensor:
        """A pooled hidden state, float32 [hidden_size], as it is asked for. What is cut is cut before it is scaled."""
        if pooling.kind == "score":
            assert self._score is not None, "a score was asked of a model that has none"
            return self._score(vector[None])[0]
        cut = vector[: pooling.dimensions]
        return torch.nn.functional.normalize(cut, dim=0) if pooling.normalize else cut


def with_embeddings(rows: list[PlanRow], results: list[RowResult], pooled: Pooled) -> list[RowResult]:
    """The rows' results with the vectors of `pool`, now on the host. One that is not finite is the row's error."""
    finite = pooled.vectors.isfinite().all(-1).tolist()
    host = pooled.vectors.numpy().astype("<f4")
    found = {slot: (vector[:size], good) for slot, size, vector, good in zip(pooled.slots, pooled.sizes, host, finite)}
    return [
        _with_embedding(result, *found[row.slot]) if row.slot in found else result for row, result in zip(rows, results)
    ]


def _with_embedding(result: RowResult, vector: NDArray[np.float32], good: bool) -> RowResult:
    if result.error is not None:
        return result
    if not good:
        return RowResult([], error=NOT_FINITE)
    return msgspec.structs.replace(result, embedding=vector.tobytes())
