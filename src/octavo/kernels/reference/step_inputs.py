"""A step's inputs in plain Python over torch: the oracle of the fused kernels."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def apply_diff(
    packed: Tensor,
    token_segments: tuple[int, int],
    block_entries: tuple[int, int],
    params_entries: tuple[int, int],
    token_ids: Tensor,
    block_tables: Tensor,
    params: Tensor,
) -> None:
    """Write the entries in packed, int32 words, to the slots' state.

    Each pair: index of the first word, number of entries. A token segment is (slot, position, count, index of its
    token ids); a block entry (slot, index, block id); a params entry the slot and its words.
    token_ids: [num_slots, max_len]; block_tables: [num_slots, max_blocks]; params: [num_slots, P].
    """
    words = packed.tolist()

    def entries(span: tuple[int, int], size: int) -> list[list[int]]:
        begin, count = span
        return [words[begin + size * i : begin + size * (i + 1)] for i in range(count)]

    for slot, position, count, source in entries(token_segments, 4):
        token_ids[slot, position : position + count] = packed[source : source + count]
    for slot, index, block in entries(block_entries, 3):
        block_tables[slot, index] = block
    for slot, *values in entries(params_entries, 1 + params.shape[1]):
        params[slot] = packed.new_tensor(values)


def build_inputs(
    row_slots: Tensor,
    starts: Tensor,
    cu_q: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
    num_tokens: int,
) -> list[tuple[int, int, int]]:
    """(input id, position, KV slot) of each of num_tokens tokens; those of no row, or of a row without a slot, get
    (0, 0, t % block_size)."""
    inputs = [(0, 0, token % block_size) for token in range(num_tokens)]
    ends = cu_q.tolist()
    for row, (slot, start) in enumerate(zip(row_slots.tolist(), starts.tolist())):
        for token in range(ends[row], ends[row + 1]) if slot >= 0 else ():
            position = start + token - ends[row]
            block = int(block_tables[slot, position // block_size])
            inputs[token] = int(token_ids[slot, position]), position, block * block_size + position % block_size
    return inputs


def gather_last(hidden: Tensor, cu_q: Tensor) -> Tensor:
    """hidden's row of the last token of each of the len(cu_q) - 1 rows; rows without tokens are 0."""
    rows = [hidden[end - 1] if end > begin else torch.zeros_like(hidden[0]) for begin, end in pairwise(cu_q.tolist())]
    return torch.stack(rows)
