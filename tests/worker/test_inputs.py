"""Slots and the flat inputs built from them, against plain Python."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.protocol.plan import NewSequence, PlanRow, StepPlan
from octavo.protocol.sampling import SamplingParams
from octavo.worker.inputs import build_inputs
from octavo.worker.slots import Slots

BLOCK = 4
MAX_LEN = 24


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[PlanRow]]:
    """Token ids and block tables of some sequences, and one row for each of some of them."""
    count = draw(st.integers(1, 5))
    blocks = draw(st.permutations(range(1, 1 + count * MAX_LEN // BLOCK)))
    tokens, tables, rows = [], [], []
    for slot in range(count):
        length = draw(st.integers(1, MAX_LEN))
        tokens.append(draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)))
        tables.append([blocks.pop() for _ in range(-(-length // BLOCK))])
        start = draw(st.integers(0, length - 1))
        rows.append(PlanRow(slot, start, draw(st.integers(1, length - start)), [], True))
    return tokens, tables, draw(st.permutations(rows))


@settings(deadline=None, max_examples=60)
@given(steps())
def test_inputs_are_the_rows_one_after_another(step: tuple[list[list[int]], list[list[int]], list[PlanRow]]) -> None:
    tokens, tables, rows = step
    slots = Slots(len(tokens), MAX_LEN, BLOCK, torch.device("cpu"))
    new = [
        NewSequence(slot, ids, len(ids), table, SamplingParams(), ())
        for slot, (ids, table) in enumerate(zip(tokens, tables))
    ]
    slots.apply(StepPlan(0, new, rows))
    inputs = build_inputs(rows, slots)
    where = [(row.slot, position) for row in rows for position in range(row.start, row.start + row.length)]
    assert inputs.input_ids.tolist() == [tokens[slot][position] for slot, position in where]
    assert inputs.positions.tolist() == [position for _, position in where]
    assert inputs.slot_mapping.tolist() == [tables[s][p // BLOCK] * BLOCK + p % BLOCK for s, p in where]
    assert inputs.row_slots.tolist() == [row.slot for row in rows]


def test_blocks_are_appended_and_a_reused_slot_starts_anew() -> None:
    slots = Slots(1, MAX_LEN, BLOCK, torch.device("cpu"))
    slots.apply(StepPlan(0, [NewSequence(0, [1, 2, 3, 4], 4, [5], SamplingParams(), ())], []))
    slots.apply(StepPlan(1, [], [PlanRow(0, 4, 1, [7], True)]))
    slots.apply(StepPlan(2, [], [PlanRow(0, 8, 1, [9], True)]))
    assert slots.block_tables[0, :3].tolist() == [5, 7, 9]
    slots.apply(StepPlan(3, [NewSequence(0, [8, 8], 2, [2], SamplingParams(), ())], []))
    slots.apply(StepPlan(4, [], [PlanRow(0, 4, 1, [3], True)]))
    assert slots.block_tables[0, :2].tolist() == [2, 3]
    assert slots.token_ids[0, :2].tolist() == [8, 8]
