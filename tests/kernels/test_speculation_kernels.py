"""The kernels of speculative decoding, against the reference, on random steps."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from octavo.kernels.reference import speculation as reference
from octavo.kernels.triton import speculation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS, MOST = 300, 4


def ints(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def both(name: str, *tensors: Tensor, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors after the kernel, and after the reference."""
    found = [tensor.clone() for tensor in tensors]
    expected = [tensor.cpu().clone() for tensor in tensors]
    getattr(speculation, name)(*found, **options)
    getattr(reference, name)(*expected, **options)
    return found, expected


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one.cpu(), other) for one, other in zip(found, expected))


@pytest.mark.parametrize(("num_rows", "num_items"), [(1, 1), (5, 0), (130, 300)])
def test_rows_follow_the_true_length(num_rows, num_items):
    rng = random.Random(num_rows)
    slots = [rng.choice([-1, rng.randrange(NUM_SLOTS)]) for _ in range(num_rows)]
    offsets = [rng.choice([-1, 0, 3]) for _ in range(num_rows)]
    items = [
        [row, 0, rng.randrange(1, 200), rng.randint(1, max(1, min(3, num_rows - row))), 1, 0]
        for row in (rng.randrange(-1, num_rows) for _ in range(num_items))
    ]
    lengths = ints([rng.randrange(1, 100) for _ in range(NUM_SLOTS)])
    state = ints([7] * num_rows), ints([7] * num_rows), ints(items).reshape(-1, 6)
    found, expected = both("follow_rows", ints(slots), ints(offsets), lengths, *state)
    assert same(found, expected)


@pytest.mark.parametrize("num_groups", [1, 40])
def test_guesses_count_up_to_the_first_that_is_not_what_was_drawn(num_groups):
    rng = random.Random(num_groups)
    first_rows, num_drafts, slots, positions, cu_q, inputs, drawn = [], [], [], [], [0], [], []
    for group, slot in enumerate(rng.sample(range(NUM_SLOTS), num_groups)):
        planned = rng.choice([-1, 0, 1, MOST, MOST])
        first_rows.append(len(slots))
        num_drafts.append(planned)
        for index in range(1 + max(0, planned)):
            slots.append(-1 if group == 7 else slot)
            positions.append(20 + index)
            prompt = rng.choice([0, 3]) if planned <= 0 else 0  # a row of a prompt has more tokens
            inputs += [rng.randrange(2) for _ in range(1 + prompt)]
            cu_q.append(len(inputs))
            drawn.append([rng.randrange(2), int(rng.random() < 0.05)])
    ready, lengths = ints([rng.randrange(MOST + 1) for _ in range(NUM_SLOTS)]), ints([-3] * NUM_SLOTS)
    given = [ints(values) for values in (first_rows, num_drafts, slots, positions, cu_q, inputs, drawn)]
    found, expected = both("verify_rows", *given, ready, lengths, ints([9] * num_groups), most=MOST)
    assert same(found, expected)


def test_an_acceptance_that_is_set_is_met():
    groups, most = 4096, 3
    rows = groups * (1 + most)
    counts, slots = ints([0] * groups), ints([index // (1 + most) for index in range(rows)])
    lengths = ints([0] * groups)
    speculation.verify_rows(
        ints(list(range(0, rows, 1 + most))),
        ints([most] * groups),
        slots,
        ints([50 + index % (1 + most) for index in range(rows)]),
        ints(list(range(rows + 1))),
        ints([1] * rows),
        ints([[0, 0]] * rows),
        ints([most] * groups),
        lengths,
        counts,
        most,
        acceptance=0.6,
    )
    assert abs((counts > 1).float().mean().item() - 0.6) < 0.03
    assert abs(counts.float().mean().item() - (1 + 0.6 + 0.36 + 0.216)) < 0.08


def test_guesses_are_put_behind_what_is_known():
    rng = random.Random(3)
    groups = 150
    slots = ints([rng.choice([-1, slot]) for slot in rng.sample(range(NUM_SLOTS), groups)])
    drafts = ints([[rng.randrange(1000) for _ in range(MOST)] for _ in range(groups)])
    found_counts, asked = (ints([rng.randrange(MOST + 1) for _ in range(groups)]) for _ in range(2))
    lengths = ints([rng.randrange(1, 40) for _ in range(NUM_SLOTS)])
    counts = ints([rng.randrange(5) for _ in range(groups)])
    tables = ints([-1] * NUM_SLOTS), torch.full((NUM_SLOTS, 50), -7, dtype=torch.int32, device=DEVICE)
    verdict = ints([[9] * (2 + MOST)] * groups)
    found, expected = both("place_drafts", slots, drafts, found_counts, asked, lengths, counts, *tables, verdict)
    assert same(found, expected)
    assert not found[2].any()


@pytest.mark.parametrize("longest", [1, 30])
def test_features_of_the_last_tokens_are_kept_by_position(longest):
    rng = random.Random(longest)
    lengths = [rng.randrange(1 + longest) for _ in range(6)]
    ends = [sum(lengths[:index]) for index in range(7)]
    slots = [rng.choice([-1, slot]) for slot in rng.sample(range(9), 6)]
    starts = [rng.randrange(50) for _ in lengths]
    features = torch.randn(ends[-1] + 2, 40, dtype=torch.bfloat16, device=DEVICE)
    recent = torch.zeros(9, 8, 40, dtype=torch.bfloat16, device=DEVICE)
    rows = ints(slots), ints(starts), ints(ends)
    found, expected = both("keep_features", features, *rows, recent, longest=longest)
    assert same(found, expected)
    assert expected[-1].any()
