"""From a plan's rows to the flat tensors one forward pass takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.protocol.plan import PlanRow
from octavo.worker.slots import Slots


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Flat over the T tokens of the R rows, row after row. All int64, on the device.

    input_ids, positions, slot_mapping: [T]. row_slots: [R].
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    row_slots: Tensor


def build_inputs(rows: Sequence[PlanRow], slots: Slots) -> StepInputs:
    """One view for every row, whether it decodes one token or computes a piece of a prompt."""
    device = slots.token_ids.device
    packed = torch.tensor([[row.slot for row in rows], [row.start for row in rows], [row.length for row in rows]])
    row_slots, starts, lengths = packed.to(device)
    if all(row.length == 1 for row in rows):
        token_slots, positions = row_slots, starts
    else:
        ends = lengths.cumsum(0)
        total = sum(row.length for row in rows)
        token_rows = torch.repeat_interleave(torch.arange(len(rows), device=device), lengths, output_size=total)
        token_slots = row_slots[token_rows]
        positions = torch.arange(total, device=device) + (starts - ends + lengths)[token_rows]
    return StepInputs(
        input_ids=slots.token_ids[token_slots, positions],
        positions=positions,
        slot_mapping=slots.positions_to_kv(token_slots, positions),
        row_slots=row_slots,
    )
