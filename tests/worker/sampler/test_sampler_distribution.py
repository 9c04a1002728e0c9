"""The tokens drawn at given uniforms are those of the long-hand reference, step by step and in any mix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sampler_reference import (
    CPU,
    PROPERTY,
    Distribution,
    Sequence,
    distribution,
    draw_at,
    grid_logits,
    leaves_tokens,
    sequences,
)

from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.sampler import Sampler, argmax
from octavo.worker.sampler.top_k import stable_topk
from octavo.worker.sampler.top_p import draw_by_bucket, draw_by_sort

MARGIN = 3e-7  # nearer to a limit, float32 may decide otherwise


def assert_draws_as_reference(logits: torch.Tensor, row: Sequence, wanted: Distribution) -> None:
    """In the middle of each likely token's stretch of [0, 1) that token is drawn, and near the ends the outermost."""
    ends = np.cumsum(wanted.probabilities)
    middles = ends - wanted.probabilities / 2
    likely = [i for i in range(len(wanted.ids)) if wanted.probabilities[i] > 1e-5][:100]
    uniforms = [float(middles[i]) for i in likely] + [0.0, 1 - 2.0**-53]
    drawn = draw_at(Sampler(len(uniforms), len(logits), CPU), logits, row, uniforms)
    assert drawn[:-2] == [wanted.ids[i] for i in likely]
    for token, end in zip(drawn[-2:], (0, -1)):
        assert token in wanted.ids
        assert token == wanted.ids[end] or wanted.probabilities[end] <= 1e-5


@settings(PROPERTY, max_examples=150)
@given(st.data(), st.sampled_from([5, 40, 256, 700]), st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 4.0]))
def test_any_mix_of_steps_draws_as_the_reference(data, vocab_size, seed, spread):
    row = data.draw(sequences(vocab_size))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    logits = grid_logits(vocab_size, seed, spread, dtype)
    assume(leaves_tokens(logits, row))
    wanted = distribution(logits.float().numpy(), row)
    assume(wanted.margin > MARGIN)
    assert_draws_as_reference(logits, row, wanted)


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 0.004},
        {"min_p": 0.1},
        {"top_k": 7},
        {"top_k": 1},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"top_p": 0.9999},
        {"top_k": 30, "top_p": 0.7, "min_p": 0.02},
        {"top_p": 0.7, "min_p": 0.02},
        {"repetition_penalty": 1.7},
        {"frequency_penalty": 1.5, "presence_penalty": -0.5},
        {"min_tokens": 9, "stop_token_ids": [5, 6]},
        {"logit_bias": {3: 5.0, 4: -100.0}},
        {"allowed_token_ids": [5, 40, 40, 299]},
        {"allowed_token_ids": [5, 40, 41, 299], "top_k": 6, "repetition_penalty": 1.3},
        {"bad_words_token_ids": [[4], [7, 9, 5], [9, 6], [3, 9, 8], [9, 9]], "top_p": 0.9},
    ],
    ids=str,
)
def test_one_step_draws_as_the_reference(wish):
    row = Sequence(SamplingParams(seed=1, max_tokens=50, **wish), [1, 3, 3, 7, 7, 7, 9], 3)
    logits = grid_logits(300, 5, 1.5)
    wanted = distribution(logits.numpy(), row)
    assert wanted.margin > MARGIN
    assert_draws_as_reference(logits, row, wanted)


def drawn_set(logits: list[float], **wish: object) -> set[int]:
    """Every token that 1,000 even uniforms reach."""
    uniforms = [i / 1000 for i in range(1000)]
    row = Sequence(SamplingParams(seed=0, **wish), [0], 1)
    return set(draw_at(Sampler(1000, len(logits), CPU), torch.tensor(logits), row, uniforms))


def test_the_nucleus_is_the_smallest_set_that_reaches_p():
    logits = np.log([0.2, 0.5, 0.3]).tolist()
    assert drawn_set(logits, top_p=0.5) == {1}
    assert drawn_set(logits, top_p=0.51) == {1, 2}
    assert drawn_set(logits, top_p=0.8) == {1, 2}
    assert drawn_set(logits, top_p=0.81) == {0, 1, 2}


def test_ties_at_a_limit_are_kept_by_id():
    assert drawn_set([1.0] * 10, top_p=0.3) == {0, 1, 2}
    assert drawn_set([1.0] * 10, top_k=3) == {0, 1, 2}
    assert drawn_set([1.0, 2.0, 1.0, 2.0, 1.0], top_k=3) == {0, 1, 3}


def test_top_p_counts_what_top_k_left():
    # Of the first two alone 0.4 / 0.7 = 0.57 reaches 0.55; of all three 0.4 does not.
    logits = np.log([0.4, 0.3, 0.3]).tolist()
    assert drawn_set(logits, top_k=2, top_p=0.55) == {0}
    assert drawn_set(logits, top_p=0.55) == {0, 1}


def test_a_token_of_no_probability_is_never_drawn():
    logits = torch.full((600,), -torch.inf)
    logits[[255, 256, 599]] = torch.tensor([0.0, 1.0, 0.0])
    for wish in ({}, {"top_p": 0.999}, {"top_k": 500}, {"min_p": 1e-9}):
        assert drawn_set(logits.tolist(), **wish) <= {255, 256, 599}


def test_huge_logits_do_not_overflow():
    logits = [3e38, -3e38, 2.9e38]
    for wish in ({}, {"top_p": 0.9}, {"top_k": 2}):
        assert drawn_set(logits, temperature=0.01, **wish) == {0}


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0, 30.0])
def test_both_ways_to_the_nucleus_agree(spread):
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 1, (20, 3000)) * spread).bfloat16().float()
    weights = logits.softmax(-1)
    top_p, uniforms = torch.from_numpy(rng.uniform(0, 1, (2, 20, 1)))
    top_p[:4] = torch.tensor([[1e-9], [1 - 1e-12], [0.5], [0.9999]])
    by_sort = draw_by_sort(weights, top_p, uniforms).flatten().tolist()
    rows = zip(weights.numpy(), top_p.flatten().tolist(), uniforms.flatten().tolist())
    assert [draw_by_bucket(*row) for row in rows] == by_sort


@settings(PROPERTY, max_examples=60)
@given(st.lists(st.sampled_from([-np.inf, -7.5, -0.0, 0.0, 1e-30, 2.0, 3e38]), min_size=1, max_size=40), st.data())
def test_stable_topk_orders_by_value_then_id(values, data):
    k = data.draw(st.integers(0, len(values)))
    wanted = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert stable_topk(torch.tensor([values], dtype=torch.float32), k).tolist() == [wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_is_the_first_of_the_largest_and_sees_nan(dtype):
    logits = torch.tensor([[1, 5, 5], [7, 0, 7], [0, 9, torch.nan], [-torch.inf] * 3], dtype=dtype)
    assert argmax(logits).tolist() == [1, 0, 2, 0]
    assert logits.argmax(-1).tolist() == [1, 0, 2, 0]  # what other devices use
