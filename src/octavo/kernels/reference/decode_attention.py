"""The oracle of split decode attention: whole rows, in float64, whatever the items cut them into."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.reference.attention import paged_attention


def paged_decode(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    row_slots: Tensor,
    cu_q: Tensor,
    items: Tensor,
    out: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> None:
    """Fill `out` at the tokens of the rows that have items; arguments as those of the kernel of this name.

    cache: [num_blocks, 2, num_kv_heads, block_size, head_dim]. A row's items must cover each of its positions
    once: raises ValueError where they do not.
    """
    block_size, head_dim = cache.shape[3:]
    by_position = cache.double().permute(0, 3, 1, 2, 4).reshape(-1, 2, cache.shape[2], head_dim)
    ends: dict[int, int] = {}
    shared: dict[int, int] = {}
    for at, (row, begin, end, sharing, count, first) in enumerate(items.tolist()):
        if row < 0 or int(row_slots[row]) < 0:
            continue
        if not (
            begin == ends.get(row, 0) < end and first <= at < first + count and shared.get(row, sharing) == sharing
        ):
            raise ValueError(
                f"item {(row, begin, end, sharing, count, first)} does not go on where its row's last ended"
            )
        ends[row], shared[row] = end, sharing
    for row, num_positions in [(row + i, ends[row] - n + 1 + i) for row, n in shared.items() for i in range(n)]:
        token = int(cu_q[row])
        out[token] = paged_attention(
            query[token : token + 1],
            by_position,
            [num_positions - 1],
            [1],
            block_tables[int(row_slots[row])][None],
            block_size,
            scale,
            sliding_window,
        )[0].to(torch.float64)
