"""Paged attention written to be read: one query at a time, in float64. The oracle of every backend.

Attention is that of "Attention Is All You Need" (Vaswani et al., 2017), with grouped queries (Ainslie
et al., 2023), over a paged KV cache (Kwon et al., 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_kv(cache: Tensor, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    """Write new tokens into the cache, in place.

    cache: [num_slots, 2, num_kv_heads, head_dim], keys at [:, 0] and values at [:, 1].
    key, value: [T, num_kv_heads, head_dim]. slot_mapping: int64 [T], block * block_size + offset.
    """
    for token, slot in enumerate(slot_mapping.tolist()):
        cache[slot, 0] = key[token]
        cache[slot, 1] = value[token]


def paged_attention(
    query: Tensor,
    cache: Tensor,
    starts: list[int],
    lengths: list[int],
    block_tables: Tensor,
    block_size: int,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attend from every new token to the keys that it sees; their KV must be in the cache already.

    query: [T, num_heads, head_dim], tokens by row; row r holds positions starts[r] ... starts[r] +
    lengths[r] - 1. cache: as in `write_kv`. block_tables: integers [R, max_blocks]. Query i sees key j
    if and only if j <= i, and i - sliding_window < j where there is a window.
    Returns [T, num_heads, head_dim] in query's dtype.
    """
    num_heads, num_kv_heads = query.shape[1], cache.shape[2]
    out = torch.empty_like(query)
    token = 0
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for position in range(start, start + length):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            slots = [
                int(block_tables[row, j // block_size]) * block_size + j % block_size
                for j in range(first, position + 1)
            ]
            for head in range(num_heads):
                seen = cache[slots, :, head * num_kv_heads // num_heads].double()
                weights = torch.softmax(seen[:, 0] @ query[token, head].double() * scale, dim=0)
                out[token, head] = (weights @ seen[:, 1]).to(out.dtype)
            token += 1
    return out
