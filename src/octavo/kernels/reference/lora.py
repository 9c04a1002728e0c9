"""Low-rank adapters (LoRA, Hu et al. 2021), several of them in one batch, in plain torch; CPUs run this.

Tokens are gathered by adapter, so the work is that of one pair of small products an adapter and part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _rows_by_slot(token_slots: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every slot that some token has, and the indices of its tokens, int64."""
    for slot in token_slots.unique().tolist():
        if slot >= 0:
            yield slot, (token_slots == slot).nonzero()[:, 0]


def add_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, ranks: Tensor, parts: tuple[int, ...], token_slots: Tensor
) -> None:
    """y[t] += B[slot] (A[slot] x[t]) for every token t that has a slot, each part with its own A; in place.

    y: [T, N], x: [T, K], of one floating dtype, as a: [S, P, R, K] and b: [S, N, R]; parts: rows of each of the P
    parts, whose sum is N; ranks: int32 [P, S], a part's true rank in a slot, 0 for a part that the slot's adapter
    leaves alone; token_slots: int32 [T], -1 for none. Rows of A and columns of B from the true rank on are not read.
    """
    ranks_of = ranks.tolist()
    for slot, rows in _rows_by_slot(token_slots):
        tokens = x.index_select(0, rows)
        first = 0
        for part, size in enumerate(parts):
            if rank := ranks_of[part][slot]:
                hidden = tokens @ a[slot, part, :rank].t()
                y[:, first : first + size].index_add_(0, rows, hidden @ b[slot, first : first + size, :rank].t())
            first += size


def shrink_lora(x: Tensor, a: Tensor, ranks: Tensor, token_slots: Tensor) -> Tensor:
    """The first half of `add_lora`, A x: float32 [1, T, P * R], zeros where no token needs them."""
    _, num_parts, rank, _ = a.shape
    hidden = torch.zeros(1, len(x), num_parts, rank, dtype=torch.float32, device=x.device)
    ranks_of = ranks.tolist()
    for slot, rows in _rows_by_slot(token_slots):
        for part in range(num_parts):
            true = ranks_of[part][slot]
            hidden[0, rows, part, :true] = (x[rows] @ a[slot, part, :true].t()).float()
    return hidden.flatten(2)


def expand_lora(
    y: Tensor, hidden: Tensor, b: Tensor, ranks: Tensor, parts: tuple[int, ...], token_slots: Tensor
) -> None:
    """The second half of `add_lora`: y[t] += B[slot] hidden[t], each part with its own. hidden: float32
    [splits, T, P * R], of which the sum counts."""
    ranks_of, summed = ranks.tolist(), hidden.sum(0).unflatten(1, (len(parts), -1)).to(y.dtype)
    for slot, rows in _rows_by_slot(token_slots):
        first = 0
        for part, size in enumerate(parts):
            if rank := ranks_of[part][slot]:
                own = b[slot, first : first + size, :rank]
                y[:, first : first + size].index_add_(0, rows, summed[rows, part, :rank] @ own.t())
            first += size


def add_lora_embedding(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, ranks: Tensor, token_slots: Tensor) -> None:
    """y[t] += B[slot] A[slot][ids[t]] for every token t that has a slot; in place.

    y: [T, N]; ids: int64 or int32 [T]; a: [S, V, R], a token's numbers side by side; b: [S, N, R]; ranks: int32
    [1, S]. The rest as for `add_lora`.
    """
    ranks_of = ranks[0].tolist()
    for slot, rows in _rows_by_slot(token_slots):
        if rank := ranks_of[slot]:
            hidden = a[slot].index_select(0, ids.index_select(0, rows))[:, :rank]
            y.index_add_(0, rows, hidden @ b[slot, :, :rank].t())
