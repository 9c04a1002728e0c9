"""Masked tokens are never drawn, by either sampler, whatever else the row and its neighbours ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampler_reference import CPU, EOS, PROPERTY, Sequence, grid_logits

from octavo.protocol.plan import PlanRow, RowResult
from octavo.protocol.sampling import SamplingParams
from octavo.protocol.structured import StructuredOutputsParams
from octavo.worker.sampler.sampler import Sampler, failed
from octavo.worker.sampler.token_masks import apply_masks

VOCAB = 60
NUM_ROWS = 3
WISH = StructuredOutputsParams(regex="a")
WISHES = [
    {},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.5},
    {"logit_bias": {3: 100.0, 7: 50.0}},
    {"min_tokens": 5},
    {"logprobs": 3},
]


def packed(token_ids: set[int], size: int = VOCAB) -> bytes:
    bits = np.zeros(size, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def row_of(wishes: dict[str, object], seed: int) -> Sequence:
    return Sequence(SamplingParams(seed=seed, max_tokens=20, structured_outputs=WISH, **wishes), [5, 9, 9], 1)


def draw_on_cpu(logits: torch.Tensor, rows: list[Sequence], masks: list[bytes | None]) -> list[RowResult]:
    sampler = Sampler(len(rows), VOCAB, CPU)
    for slot, row in enumerate(rows):
        row.set_in(sampler, slot)
    positions = [len(row.token_ids) for row in rows]
    return sampler.to_rows(sampler.sample(logits, list(range(len(rows))), positions, masks))


def draw_on_device(logits: torch.Tensor, rows: list[Sequence], masks: list[bytes | None]) -> list[RowResult]:
    rig = pytest.importorskip("test_device_sampler").Rig(len(rows), VOCAB)
    for slot, row in enumerate(rows):
        rig.enter(slot, row)
    rig.sampler.set_masks(
        [
            PlanRow(slot, 0, len(row.token_ids), [], True, None if mask is None else [mask])
            for slot, (row, mask) in enumerate(zip(rows, masks))
        ]
    )
    return rig.step(logits, list(range(len(rows))), [len(row.token_ids) for row in rows])


BOTH = pytest.mark.parametrize("draw", [draw_on_cpu, draw_on_device])


@PROPERTY
@given(st.integers(1, 5), st.data())
def test_what_a_mask_leaves_out_is_minus_infinity_and_all_else_stays(num_rows, data):
    size = data.draw(st.integers(1, 70))
    logits = torch.arange(num_rows * size, dtype=torch.float32).reshape(num_rows, size)
    kept = [data.draw(st.none() | st.sets(st.integers(0, size - 1))) for _ in range(num_rows)]
    length = data.draw(st.integers(0, 3))  # bytes more or less than the vocabulary has
    masks = [None if ids is None else (packed(ids, size) + b"\xff" * length) for ids in kept]
    masked = logits.clone()
    apply_masks(masked, masks)
    for row, ids in enumerate(kept):
        for token in range(size):
            expected = logits[row, token] if ids is None or token in ids else -torch.inf
            assert masked[row, token] == expected


def test_tokens_beyond_the_end_of_a_mask_are_left_out() -> None:
    logits = torch.zeros(1, 20)
    apply_masks(logits, [b"\xff"])
    assert logits.isfinite().sum() == 8


@BOTH
@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_only_tokens_of_the_mask_are_drawn(draw, wishes):
    rows = [row_of(wishes, seed) for seed in range(NUM_ROWS)]
    kept = [{(3 * i + j) % VOCAB for j in (0, 7, 20)} for i in range(NUM_ROWS)]
    logits = torch.stack([grid_logits(VOCAB, i, 1.5, torch.float32) for i in range(NUM_ROWS)])
    drawn = draw(logits, rows, [packed(ids) for ids in kept])
    assert all(result.token_ids[0] in ids for result, ids in zip(drawn, kept))
    if wishes.get("temperature") == 0.0:
        assert [r.token_ids[0] for r in drawn] == [max(ids, key=lambda t: logits[i, t]) for i, ids in enumerate(kept)]


@BOTH
def test_a_neighbour_without_a_mask_draws_what_it_draws_alone(draw):
    logits = torch.stack([grid_logits(VOCAB, i, 1.5, torch.float32) for i in range(3)])
    plain = Sequence(SamplingParams(seed=4, top_p=0.9, max_tokens=20), [5, 9], 1)
    alone = draw(logits[1:2], [plain], [None])
    masked = row_of({}, 1)
    among = draw(logits, [masked, plain, masked], [packed({8}), None, packed({9})])
    assert among[1] == alone[0]
    assert [among[0].token_ids, among[2].token_ids] == [[8], [9]]


@BOTH
def test_logprobs_are_those_of_the_unmasked_distribution(draw):
    logits = grid_logits(VOCAB, 3, 1.5, torch.float32)[None]
    [result] = draw(logits, [row_of({"logprobs": 2}, 0)], [packed({11})])
    assert result.token_ids == [11]
    assert result.logprobs is not None
    expected = torch.log_softmax(logits[0], -1)
    assert result.logprobs[0].logprobs[0] == pytest.approx(float(expected[11]), abs=1e-5)
    assert result.logprobs[0].token_ids[1] == int(expected.argmax())


@BOTH
def test_min_tokens_does_not_bar_the_only_way_to_end(draw):
    [result] = draw(torch.zeros(1, VOCAB), [row_of({"min_tokens": 9}, 0)], [packed(set(EOS))])
    assert result.token_ids == list(EOS)


@BOTH
def test_a_mask_that_leaves_nothing_is_an_error_of_its_row(draw):
    results = draw(torch.zeros(2, VOCAB), [row_of({}, 0), row_of({}, 1)], [packed(set()), packed({4})])
    assert results[0] == failed(2)
    assert results[1].token_ids == [4]
