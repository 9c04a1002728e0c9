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


def first_draft_rows(
    slots: Tensor,
    backs: Tensor,
    floors: Tensor,
    planned: Tensor,
    lag: int,
    lengths: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
    made: DraftRows,
) -> None:
    """See the kernel."""
    made.count.zero_()
    places = []
    for slot, back, floor in zip(slots.tolist(), backs.tolist(), floors.tolist()):
        position = int(lengths[slot]) - lag - back
        places.append((slot, position) if slot >= 0 and position >= floor else None)
    _place(places, planned, token_ids, block_tables, block_size, made)


def next_draft_rows(
    slots: Tensor,
    wanted: Tensor,
    planned: Tensor,
    lag: int,
    lengths: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
    made: DraftRows,
) -> None:
    """See the kernel."""
    made.count.add_(1)
    ahead = int(made.count[0])
    places = [
        (slot, int(lengths[slot]) - lag - 1 + ahead) if slot >= 0 and count > ahead else None
        for slot, count in zip(slots.tolist(), wanted.tolist())
    ]
    _place(places, planned, token_ids, block_tables, block_size, made)


def _place(
    places: list[tuple[int, int] | None],
    planned: Tensor,
    token_ids: Tensor,
    block_tables: Tensor,
    block_size: int,
    made: DraftRows,
) -> None:
    """places: of each row, the slot and the position of its token, None where there is none."""
    made.items.copy_(planned)
    for row, place in enumerate(places):
        slot, position = place or (-1, 0)
        made.row_slots[row], made.starts[row], made.positions[row] = slot, position, position + 1
        made.input_ids[row] = 0 if place is None else token_ids[place]
        made.token_positions[row] = position
        block = 0 if place is None else int(block_tables[slot, position // block_size])
        offset = (row if place is None else position) % block_size
        made.slot_mapping[row] = block * block_size + offset
        if place is not None:
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
