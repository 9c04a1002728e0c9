"""The kernels that make a step's inputs on the device, against plain Python."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.kernels.reference import step_inputs as reference
from octavo.kernels.triton import step_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS, MAX_LEN, MAX_BLOCKS, NUM_PARAMS = 5, 3001, 20, 16


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class State:
    """What the slots hold, filled with -7 to show what a kernel writes."""

    def __init__(self) -> None:
        self.token_ids = torch.full((NUM_SLOTS, MAX_LEN), -7, dtype=torch.int32, device=DEVICE)
        self.block_tables = torch.full((NUM_SLOTS, MAX_BLOCKS), -7, dtype=torch.int32, device=DEVICE)
        self.params = torch.full((NUM_SLOTS, NUM_PARAMS), -7, dtype=torch.int32, device=DEVICE)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.token_ids, self.block_tables, self.params


def check_diff(
    segments: list[tuple[int, int, int]], blocks: list[tuple[int, int, int]], params: list[list[int]], base: int
) -> State:
    """Pack the entries from word `base` on, apply them both ways and compare. segments: (slot, position, count)."""
    segments_at, blocks_at = base, base + 4 * len(segments)
    params_at = blocks_at + 3 * len(blocks)
    tokens_at = params_at + (1 + NUM_PARAMS) * len(params)
    words, tokens = [99] * base, []
    for slot, position, count in segments:
        words += [slot, position, count, tokens_at + len(tokens)]
        tokens += [random.randrange(50_000) for _ in range(count)]
    words += [word for entry in (*blocks, *params) for word in entry]
    packed = ints(words + tokens + [0] * 8)
    found, expected = State(), State()
    longest = max((count for _, _, count in segments), default=0)
    step_inputs.apply_diff(
        packed, segments_at, len(segments), longest, blocks_at, len(blocks), params_at, len(params), *found.tensors()
    )
    spans = (segments_at, len(segments)), (blocks_at, len(blocks)), (params_at, len(params))
    reference.apply_diff(packed, *spans, *expected.tensors())
    for one, other in zip(found.tensors(), expected.tensors()):
        assert torch.equal(one, other)
    return found


def test_apply_diff_writes_all_three_kinds() -> None:
    floats = np.array([0.7, -1.5], np.float32).view(np.int32).tolist()
    params = [[slot, *floats, *range(slot, slot + NUM_PARAMS - 2)] for slot in (3, 0)]
    blocks = [(slot, index, 10 * slot + index) for slot in (0, 2, 4) for index in range(MAX_BLOCKS)]
    state = check_diff([(3, 0, 2500), (0, 17, 1), (4, 2999, 2), (1, 0, 1024)], blocks, params, base=48)
    assert state.params[3, :2].view(torch.float32).tolist() == pytest.approx([0.7, -1.5])


@pytest.mark.parametrize("kind", range(4))
def test_apply_diff_of_one_kind_or_none(kind: int) -> None:
    segments = [(2, 5, 3)] if kind == 0 else []
    blocks = [(1, 2, 3)] if kind == 1 else []
    params = [[4, *range(NUM_PARAMS)]] if kind == 2 else []
    check_diff(segments, blocks, params, base=7)


def test_apply_diff_of_empty_segments_and_of_many_entries() -> None:
    """More block entries and parameters than one program copies, and segments without tokens."""
    blocks = [(i % NUM_SLOTS, i // NUM_SLOTS, i) for i in range(NUM_SLOTS * MAX_BLOCKS)]
    check_diff([(0, 0, 0), (1, 4, 0)], blocks, [], base=0)
    state = State()
    state.params = torch.zeros(100, NUM_PARAMS, dtype=torch.int32, device=DEVICE)
    packed = torch.arange(100 * (1 + NUM_PARAMS), dtype=torch.int32, device=DEVICE).view(100, -1)
    packed[:, 0] = torch.arange(100).flip(0)
    step_inputs.apply_diff(packed.view(-1), 0, 0, 0, 0, 0, 0, 100, *state.tensors())
    assert torch.equal(state.params, packed[:, 1:].flip(0))


def check_inputs(lengths: list[int], starts: list[int], slots: list[int], total: int, block_size: int = 16) -> None:
    """Rows of these lengths, padded to `total` tokens, both ways."""
    ends = np.cumsum([0, *lengths]).tolist()
    generator = torch.Generator().manual_seed(len(lengths))
    token_ids = torch.randint(1, 50_000, (NUM_SLOTS, 400), dtype=torch.int32, generator=generator).to(DEVICE)
    block_tables = torch.randint(1, 1 << 30, (NUM_SLOTS, 30), dtype=torch.int32, generator=generator).to(DEVICE)
    state = ints(slots), ints(starts), ints(ends), token_ids, block_tables, block_size
    input_ids = torch.full((total,), -7, dtype=torch.int32, device=DEVICE)
    positions, slot_mapping = (torch.full((total,), -7, dtype=torch.int64, device=DEVICE) for _ in range(2))
    step_inputs.build_inputs(*state, input_ids, positions, slot_mapping)
    expected = reference.build_inputs(*state, total)
    assert list(zip(input_ids.tolist(), positions.tolist(), slot_mapping.tolist())) == expected


@pytest.mark.parametrize(
    ("lengths", "starts", "slots", "total"),
    [
        pytest.param([1], [9], [3], 1, id="one token"),
        pytest.param([1, 1, 1, 1], [0, 31, 32, 399], [4, 0, 1, 2], 4, id="decodes"),
        pytest.param([1, 1, 0, 0], [7, 200, 0, 0], [4, 1, -1, -1], 8, id="decodes, padded with empty rows"),
        pytest.param([1, 1, 1, 1], [7, 200, 0, 0], [4, 1, -1, -1], 8, id="decodes, padded with rows of no slot"),
        pytest.param([130, 1, 47, 300], [16, 5, 0, 99], [2, 0, 4, 1], 500, id="chunks of prompts, padded"),
        pytest.param([200], [100], [0], 200, id="one prompt"),
        pytest.param([0, 3, 0, 0, 2, 0], [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, -1], 6, id="rows without tokens"),
        pytest.param([0, 0], [0, 0], [-1, -1], 20, id="nothing but padding"),
    ],
)
def test_build_inputs(lengths: list[int], starts: list[int], slots: list[int], total: int) -> None:
    check_inputs(lengths, starts, slots, total)


def test_build_inputs_of_random_batches() -> None:
    rng = random.Random(1)
    for num_rows in (2, 3, 5, 33):
        lengths = [rng.choice([0, 1, 1, 7, 19]) for _ in range(num_rows)]
        starts = [rng.randrange(300) for _ in range(num_rows)]
        slots = [rng.randrange(-1, NUM_SLOTS) for _ in range(num_rows)]
        check_inputs(lengths, starts, slots, sum(lengths) + rng.randrange(1, 20), block_size=rng.choice([16, 64]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [64, 576, 1100])
def test_gather_last(dtype: torch.dtype, size: int) -> None:
    hidden = torch.randn(9, size, device=DEVICE).to(dtype)
    cu_q = ints([0, 1, 5, 5, 9, 9])
    out = torch.full((5, size), float("nan"), dtype=dtype, device=DEVICE)
    assert step_inputs.gather_last(hidden, cu_q, out) is out
    assert torch.equal(out, reference.gather_last(hidden, cu_q))
    assert torch.equal(out[[0, 1, 3]], hidden[[0, 4, 8]])
    assert not out[[2, 4]].any()
