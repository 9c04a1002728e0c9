"""What of a step's words is copied to the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.protocol.plan import PlanRow
from octavo.worker.step_buffers import SplitRows, StepBuffers, StepShape

UNWRITTEN = -77


@pytest.mark.parametrize("speculates", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        StepShape(3, 3, 5, 0, decodes=True, adapters=True),
        StepShape(9, 4, 2, 6, decodes=False, adapters=True),
        StepShape(9, 4, 0, 0, decodes=False, adapters=True),
    ],
)
def test_what_a_step_is_told_is_among_the_words_that_it_uses(shape: StepShape, speculates: bool) -> None:
    buffers = StepBuffers(40, 60, (50, 6), (70, 2), torch.device("cpu"), speculates)
    words = np.full(buffers.num_words, UNWRITTEN, np.int32)
    rows = [PlanRow(slot, slot, shape.num_tokens // shape.num_rows, [], True) for slot in range(shape.num_rows)]
    decode_items = np.ones((shape.num_decode_items, 6), np.int32)
    prefill_items = np.ones((shape.num_prefill_items, 2), np.int32)
    buffers.write_rows(words, rows, shape)
    buffers.write_adapters(words, [0] * len(rows), shape)
    if speculates:
        buffers.write_groups(words, SplitRows.of(rows, ()), shape)
    buffers.write_items(words, "decode_items", decode_items, shape.num_decode_items)
    buffers.write_items(words, "prefill_items", prefill_items, shape.num_prefill_items)
    used = buffers.num_used(shape)
    assert set(words[used:]) == {UNWRITTEN}
    # Of the last field, no more than the step has.
    assert not (shape.num_decode_items or shape.num_prefill_items) or words[used - 1] != UNWRITTEN
    assert used < buffers.num_fixed
