"""The kernels of a draft model's passes in plain torch; see octavo.kernels.triton.draft_passes for the contracts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DraftRows(NamedTuple):
    """What a pass over R rows reads. row_slots: int32 [R], -1 for rows without a token. starts, positions: int32 [R],
    the position of the row's token, and one more. input_ids: int32 [R]; token_positions, slot_mapping: int64 [R], as
    `build_inputs` makes them. items: int32 [I, 6], of `paged_decode`. count: int32 [N], N sequences: how many passes
    came before."""

    row_slots: Tensor
    starts: Tensor
    positions: Tensor
    input_ids: Tensor
    token_positions: Tensor
    slot_mapping: Tensor
    items: Tensor
    count: Tensor


def draft_rows(
    slots: Tensor,
    backs: Tensor | None,
    limits: Tensor,
    planned: Tensor,
    lag: int,
    lengths: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
    made: DraftRows,
) -> None:
    """See the kernel."""
    ahead = 0 if backs is not None else int(made.count[0]) + 1
    made.count.fill_(ahead)
    made.items.copy_(planned)
    for row, (slot, limit) in enumerate(zip(slots.tolist(), limits.tolist())):
        back = 1 - ahead if backs is None else int(backs[row])
        position = int(lengths[slot]) - lag - back
        there = slot >= 0 and (limit > ahead if backs is None else position >= limit)
        if not there:
            slot, position = -1, 0
        made.row_slots[row], made.starts[row], made.positions[row] = slot, position, position + 1
        made.input_ids[row] = token_ids[slot, position] if there else 0
        made.token_positions[row] = position
        block, offset = (int(block_tables[slot, position // block_size]), position) if there else (0, row)
        made.slot_mapping[row] = block * block_size + offset % block_size
        if there:
            mine = (planned[:, 0] >= 0) & (planned[:, 0] + planned[:, 3] - 1 == row)
            made.items[mine, 2] = made.items[mine, 2].clamp(max=position + 1)


def read_drafts(
    slots: Tensor, wanted: Tensor, lengths: Tensor, token_ids: Tensor, drafts: Tensor, found: Tensor
) -> None:
    """See the kernel."""
    for group, (slot, count) in enumerate(zip(slots.tolist(), wanted.tolist())):
        if slot >= 0:
            begin = int(lengths[slot])
            drafts[group, :count] = token_ids[slot, begin : begin + count]
            found[group] = count
