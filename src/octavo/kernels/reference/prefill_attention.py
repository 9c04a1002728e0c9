"""Attention of rows with several new tokens, in plain torch and float64: the oracle of the prefill kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_prefill(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    rows: list[tuple[int, int, int]],
    out: Tensor,
    scale: float,
    sliding_window: int | None = None,
) -> None:
    """Attend from every token of the rows to the keys that it sees.

    query, out: [T, num_heads, head_dim], tokens ordered by row. cache: [num_blocks, 2, num_kv_heads, block_size,
    head_dim]. block_tables: integers [num_slots, max_blocks]. rows: (slot, tokens in the cache before, new tokens).
    """
    group = query.shape[1] // cache.shape[2]
    first = 0
    for slot, start, length in rows:
        keys, values = _row_kv(cache, block_tables[slot], start + length).double().repeat_interleave(group, 1)
        distance = torch.arange(start, start + length)[:, None] - torch.arange(start + length)
        seen = distance >= 0
        if sliding_window is not None:
            seen &= distance < sliding_window
        scores = query[first : first + length].double().transpose(0, 1) @ keys.transpose(1, 2) * scale
        weights = torch.softmax(scores.masked_fill(~seen.to(scores.device), -torch.inf), -1)
        out[first : first + length] = (weights @ values).transpose(0, 1).to(out.dtype)
        first += length


def gather_kv(cache: Tensor, block_table: Tensor, num_tokens: int, out: Tensor) -> None:
    """Copy the first `num_tokens` keys and values of a sequence. out: [2, num_kv_heads, >= num_tokens, head_dim]."""
    out[:, :, :num_tokens] = _row_kv(cache, block_table, num_tokens).to(out.dtype)


def merge_attention(parts: list[Tensor], log_sum_exps: list[Tensor], out: Tensor) -> None:
    """Attention over the union of disjoint key sets. parts: [H, T, head_dim] each, sums: [H, T]; out: [T, H, head_dim].

    The method is the rescaling of online softmax (Milakov & Gimelshein, 2018).
    """
    weights = torch.softmax(torch.stack(log_sum_exps).double(), 0)[..., None]
    out.copy_((torch.stack(parts).double() * weights).sum(0).transpose(0, 1))


def _row_kv(cache: Tensor, block_table: Tensor, num_tokens: int) -> Tensor:
    """[2, num_kv_heads, num_tokens, head_dim] of cache's dtype; float8 comes as float32, which torch can index."""
    blocks = block_table[: -(-num_tokens // cache.shape[3])].long()
    wide = cache.view(torch.uint8)[blocks].view(cache.dtype).float() if cache.itemsize == 1 else cache[blocks]
    return wide.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :num_tokens]
