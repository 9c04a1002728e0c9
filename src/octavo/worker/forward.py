"""One pass of a model over rows of the slots' tokens, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.attention.backend import AttentionBackend, AttentionBatch
from octavo.protocol.plan import PlanRow
from octavo.worker.inputs import StepInputs, build_inputs
from octavo.worker.slots import Slots


def prepare(attention: AttentionBackend, slots: Slots, rows: Sequence[PlanRow]) -> StepInputs:
    """The inputs of a pass over these rows; the attention is told of it."""
    inputs = build_inputs(rows, slots)
    longest = max(row.start + row.length for row in rows)
    num_blocks = -(-longest // slots.block_size)
    attention.prepare(
        AttentionBatch(
            starts=[row.start for row in rows],
            lengths=[row.length for row in rows],
            block_tables=slots.block_tables[inputs.row_slots, :num_blocks],
            slot_mapping=inputs.slot_mapping,
        )
    )
    return inputs


def last_of(hidden: Tensor, rows: Sequence[PlanRow]) -> Tensor:
    """The hidden states of each row's last token. hidden: [T, H]; returns [R, H]."""
    ends = torch.tensor([row.length for row in rows]).cumsum(0) - 1
    return hidden if len(ends) == hidden.shape[0] else hidden[ends.to(hidden.device)]
