"""One pass of a model over rows of the slots' tokens, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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


def last_tokens(rows: Sequence[PlanRow]) -> Tensor | None:
    """Where the last 1 + num_drafts tokens of each row are among all of the rows', int64 [N]; None: they are all."""
    if all(row.length == 1 + row.num_drafts for row in rows):
        return None
    ends = accumulate(row.length for row in rows)
    return torch.tensor([at for row, end in zip(rows, ends) for at in range(end - 1 - row.num_drafts, end)])
