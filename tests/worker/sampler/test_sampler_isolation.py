"""A row's result is a function of its own request: neighbours, order, slots, preemption and replay change nothing."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_reference import CPU, EOS, PROPERTY, Sequence, grid_logits, sample, sequences

from octavo.protocol.plan import RowResult
from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.sampler import Sampler

VOCAB = 300


def logits_at(position: int, num_rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[num_rows, VOCAB]: what a model would give each of the rows' sequences at this step."""
    return torch.stack([grid_logits(VOCAB, 1000 * row + position, 1.5, dtype) for row in range(num_rows)])


def generate(row: Sequence, which: int, num_tokens: int, preempt_at: int | None = None) -> list[RowResult]:
    """Run one sequence alone; preempt_at: leave before that step, and come back into another slot."""
    sampler, slot = Sampler(2, VOCAB, CPU), 0
    row.set_in(sampler, slot)
    results, token_ids = [], list(row.token_ids)
    for step in range(num_tokens):
        if step == preempt_at:
            slot = 1
            sampler.set_slot(slot, row.sampling, EOS, token_ids, row.num_prompt_tokens)
        logits = logits_at(step, which + 1)[which:]
        [result] = sampler.to_rows(sampler.sample(logits, [slot], [len(token_ids)]))
        token_ids += result.token_ids
        results.append(result)
    return results


@settings(PROPERTY, max_examples=40)
@given(st.lists(sequences(VOCAB), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_a_batch_draws_what_each_row_draws_alone(rows, random):
    """Over 3 steps, in shuffled slots and order: tokens and log-probabilities to the last bit."""
    alone = [generate(row, which, 3) for which, row in enumerate(rows)]
    sampler = Sampler(len(rows) + 3, VOCAB, CPU)
    slots = random.sample(range(len(rows) + 3), len(rows))
    for slot, row in zip(slots, rows):
        row.set_in(sampler, slot)
    for step in range(3):
        order = random.sample(range(len(rows)), len(rows))
        sampled = sampler.sample(
            logits_at(step, len(rows))[order], [slots[i] for i in order], [len(rows[i].token_ids) + step for i in order]
        )
        for i, result in zip(order, sampler.to_rows(sampled)):
            assert result == alone[i][step]


@settings(PROPERTY, max_examples=40)
@given(sequences(VOCAB), st.integers(0, 5))
def test_preemption_changes_nothing(row, preempt_at):
    assert generate(row, 0, 6, preempt_at) == generate(row, 0, 6)


@settings(PROPERTY, max_examples=30)
@given(sequences(VOCAB), sequences(VOCAB), sequences(VOCAB))
def test_a_neighbours_parameters_and_nan_change_nothing(row, other, another):
    logits = logits_at(0, 2)
    broken = logits.clone()
    broken[1, 7] = torch.nan
    results = []
    for neighbour, given_logits in ((other, logits), (another, logits), (other, broken)):
        sampler = Sampler(2, VOCAB, CPU)
        results.append(sampler.to_rows(sample(sampler, given_logits, [row, neighbour]))[0])
    assert results[0] == results[1] == results[2]


WISHES = [
    {"temperature": 0.0},
    {},
    {"min_p": 0.1},
    {"top_p": 0.9},
    {"top_k": 5},
    {"presence_penalty": 1.0},
    {"logprobs": 3},
    {"min_tokens": 5, "stop_token_ids": [7]},
    {"logit_bias": {7: -100.0}},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_a_row_without_a_distribution_is_bad_alone(wish, value, dtype):
    """Also where the bad logit is one that a step masks or changes. The input is left as it was."""
    row = Sequence(SamplingParams(seed=5, **wish), [1, 2, 3], 2)
    logits = logits_at(0, 4, dtype)
    logits[1, 7] = value
    logits[2] = -torch.inf
    before = logits.clone()
    sampler = Sampler(4, VOCAB, CPU)
    sampled = sample(sampler, logits, [row] * 4)
    assert sampled.bad.tolist() == [0, 1, 1, 0]
    assert sampled.token_ids[1:3].tolist() == [0, 0]
    results = sampler.to_rows(sampled)
    assert [result.error is None for result in results] == [True, False, False, True]
    assert results[1] == RowResult(token_ids=[], error=results[1].error)
    assert torch.allclose(logits, before, rtol=0, atol=0, equal_nan=True)


def test_a_batch_too_large_to_work_on_at_once_draws_the_same():
    wishes = [
        {},
        {"logprobs": 2},
        {"top_p": 0.9},
        {"temperature": 0, "presence_penalty": 1.0},
        {"logprobs": 5, "top_k": 4},
    ]
    rows = [Sequence(SamplingParams(seed=i, **wish), [1, 2, 3], 1) for i, wish in enumerate(wishes * 3)]
    logits = logits_at(0, len(rows))
    sampler = Sampler(len(rows), VOCAB, CPU)
    wanted = sampler.to_rows(sample(sampler, logits, rows))
    for elements in (1, 2 * VOCAB, 7 * VOCAB):
        with patch.dict("octavo.worker.sampler.sampler._ELEMENTS_AT_ONCE", cpu=elements):
            assert sampler.to_rows(sample(sampler, logits, rows)) == wanted


def test_masking_every_token_makes_the_row_bad():
    row = Sequence(SamplingParams(seed=5, min_tokens=5, stop_token_ids=[0, 1]), [1], 1)  # 2 ends every output
    sampled = sample(Sampler(1, 3, CPU), torch.zeros(1, 3), [row])
    assert sampled.bad.tolist() == [2]


def test_seeds():
    def tokens(seed: int) -> list[int]:
        row = Sequence(SamplingParams(seed=seed, temperature=1.5), [1], 1)
        return [t for result in generate(row, 0, 20) for t in result.token_ids]

    assert tokens(7) == tokens(7)
    assert len({tuple(tokens(seed)) for seed in (*range(20), -1, 2**63 - 1, -(2**63))}) == 23


def test_a_slot_needs_a_seed_and_a_row_needs_a_slot():
    sampler = Sampler(2, VOCAB, CPU)
    with pytest.raises(ValueError, match="seed=None"):
        sampler.set_slot(0, SamplingParams(), EOS, [1], 1)
    with pytest.raises(ValueError, match="slot 1 was never set"):
        sampler.sample(torch.zeros(1, VOCAB), [1], [1])


def test_ids_beyond_the_vocabulary_do_nothing():
    sampling = SamplingParams(seed=1, min_tokens=3, stop_token_ids=[VOCAB + 1], logit_bias={VOCAB: 5.0}, temperature=0)
    row = Sequence(sampling, [1], 1)
    plain = replace(row, sampling=SamplingParams(seed=1, temperature=0, min_tokens=3))
    logits = logits_at(0, 1)
    results = [sample(Sampler(1, VOCAB, CPU), logits, [r]).token_ids.tolist() for r in (row, plain)]
    assert results[0] == results[1]
