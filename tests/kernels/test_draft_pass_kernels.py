"""The kernels between the passes of a draft model, against the reference, on random sequences."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from octavo.kernels.reference import draft_passes as reference
from octavo.kernels.reference.draft_passes import DraftRows
from octavo.kernels.triton import draft_passes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS, MAX_LEN, BLOCK_SIZE, MOST = 40, 96, 16, 4


def ints(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def tables(rng: random.Random) -> tuple[Tensor, Tensor, Tensor, int]:
    """Known lengths, tokens, block tables, and the tokens of a block."""
    lengths = ints([rng.randrange(1, MAX_LEN - MOST) for _ in range(NUM_SLOTS)])
    token_ids = ints([[rng.randrange(1000) for _ in range(MAX_LEN)] for _ in range(NUM_SLOTS)])
    blocks = ints([[rng.randrange(1, 99) for _ in range(MAX_LEN // BLOCK_SIZE)] for _ in range(NUM_SLOTS)])
    return lengths, token_ids, blocks, BLOCK_SIZE


def plan(rng: random.Random, num_rows: int, num_items: int) -> Tensor:
    rows = (rng.randrange(-1, num_rows) for _ in range(num_items))
    items = [[row, 16, rng.randrange(1, 200), rng.randint(1, max(1, min(3, num_rows - row))), 2, 5] for row in rows]
    return ints(items).reshape(-1, 6)


def room(num_rows: int, num_items: int, num_sequences: int, device: torch.device = DEVICE) -> DraftRows:
    short = [torch.full((num_rows,), 7, dtype=torch.int32, device=device) for _ in range(4)]
    long = [torch.full((num_rows,), 7, dtype=torch.int64, device=device) for _ in range(2)]
    items = torch.full((num_items, 6), 7, dtype=torch.int32, device=device)
    return DraftRows(*short, *long, items, torch.full((num_sequences,), 7, dtype=torch.int32, device=device))


def on_host(values: tuple) -> list:
    return [value.cpu() if isinstance(value, Tensor) else value for value in values]


def assert_same(found: DraftRows, expected: DraftRows) -> None:
    for name, one, other in zip(DraftRows._fields, found, expected):
        assert torch.equal(one.cpu(), other), name


@pytest.mark.parametrize(("num_rows", "num_items", "lag"), [(1, 1, 0), (7, 0, 1), (600, 900, 0)])
def test_the_first_pass_and_those_after_it(num_rows: int, num_items: int, lag: int) -> None:
    rng = random.Random(num_rows)
    known = tables(rng)
    slots = ints([rng.choice([-1, rng.randrange(NUM_SLOTS)]) for _ in range(num_rows)])
    planned = plan(rng, num_rows, num_items)
    found, expected = room(num_rows, num_items, 3), room(num_rows, num_items, 3, torch.device("cpu"))
    floors = ints([rng.choice([0, 0, 30]) for _ in range(num_rows)])
    first = slots, ints([rng.randint(1, 6) for _ in range(num_rows)]), floors, planned, lag, *known
    draft_passes.draft_rows(*first, found)
    reference.draft_rows(*on_host(first), expected)
    assert_same(found, expected)
    assert found.count.tolist() == [0, 0, 0]
    further = slots, None, ints([rng.randrange(MOST + 1) for _ in range(num_rows)]), planned, lag, *known
    for ahead in range(1, MOST):
        draft_passes.draft_rows(*further, found)
        reference.draft_rows(*on_host(further), expected)
        assert_same(found, expected)
        assert found.count.tolist() == [ahead] * 3


def test_a_row_has_no_token_below_its_floor() -> None:
    lengths, *rest = tables(random.Random(1))
    made = room(2, 0, 1)
    length = int(lengths[3])
    where = ints([3, 3]), ints([1, 1]), ints([length - 1, length]), ints([]).reshape(-1, 6)
    draft_passes.draft_rows(*where, 0, lengths, *rest, made)
    assert made.row_slots.tolist() == [3, -1]


def test_guesses_are_read_from_behind_what_is_known() -> None:
    rng = random.Random(2)
    lengths, token_ids, _, _ = tables(rng)
    slots = [rng.choice([-1, slot]) for slot in range(NUM_SLOTS)]
    wanted = ints([0 if slot < 0 else rng.randint(1, MOST) for slot in slots])
    drafts, found = ints([[-7] * MOST] * NUM_SLOTS), ints([0] * NUM_SLOTS)
    expected = drafts.cpu().clone(), found.cpu().clone()
    where = ints(slots), wanted, lengths, token_ids
    draft_passes.read_drafts(*where, drafts, found)
    reference.read_drafts(*on_host(where), *expected)
    assert torch.equal(drafts.cpu(), expected[0])
    assert torch.equal(found.cpu(), expected[1])
    assert found.any()
