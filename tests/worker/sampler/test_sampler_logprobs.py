"""Log-probabilities come from the raw distribution, with ranks that are right, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_reference import CPU, PROPERTY, Sequence, grid_logits, sample

from octavo.protocol.plan import TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.sampler import Sampler

VOCAB = 200


def reference(logits: torch.Tensor, token: int, num: int) -> TokenLogprobs:
    values = logits.double().numpy()
    logprobs = values - values.max() - np.log(np.exp(values - values.max()).sum())
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:num]
    ids = [token, *order]
    return TokenLogprobs(ids, [float(logprobs[i]) for i in ids], 1 + int((values > values[token]).sum()))


def assert_close(found: TokenLogprobs, wanted: TokenLogprobs) -> None:
    assert found.token_ids == wanted.token_ids
    assert found.rank == wanted.rank
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=2e-5)
    assert max(found.logprobs) <= 0


@settings(PROPERTY, max_examples=40)
@given(
    st.lists(st.one_of(st.none(), st.integers(0, 20)), min_size=1, max_size=6),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rows_get_what_they_asked_for(asked, seed, dtype):
    """Each row its own number of alternatives; bias and penalties draw the token but do not show."""
    logits = torch.stack([grid_logits(VOCAB, seed + r, 1.0, dtype) for r in range(len(asked))])
    wish = {"temperature": 2.0, "logit_bias": {5: 8.0}, "presence_penalty": 1.0, "top_p": 0.95}
    rows = [Sequence(SamplingParams(seed=seed + r, logprobs=n, **wish), [1, 2], 1) for r, n in enumerate(asked)]
    sampler = Sampler(len(rows), VOCAB, CPU)
    results = sampler.to_rows(sample(sampler, logits, rows))
    for result, num, values in zip(results, asked, logits):
        if num is None:
            assert result.logprobs is None
        else:
            assert result.logprobs is not None
            assert len(result.logprobs) == len(result.token_ids) == 1
            assert len(result.logprobs[0].token_ids) == len(result.logprobs[0].logprobs) == 1 + num
            assert_close(result.logprobs[0], reference(values, result.token_ids[0], num))


def test_equal_logits_share_a_rank_and_are_listed_by_id():
    sampler = Sampler(1, 6, CPU)
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 0.0]])
    found = [sampler.prompt_logprobs(logits, torch.tensor([token]), 4)[0] for token in range(6)]
    assert [entry.rank for entry in found] == [5, 1, 3, 1, 3, 6]
    assert found[5].token_ids == [5, 1, 3, 2, 4]


@pytest.mark.parametrize("num", [0, 1, 20])
def test_prompt_logprobs(num):
    logits = torch.stack([grid_logits(VOCAB, r, 2.0, torch.bfloat16) for r in range(7)])
    targets = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    found = Sampler(1, VOCAB, CPU).prompt_logprobs(logits, targets, num)
    assert len(found) == 7
    for entry, values, token in zip(found, logits, targets.tolist()):
        assert_close(entry, reference(values, token, num))


def test_more_alternatives_than_the_vocabulary_has():
    [found] = Sampler(1, 3, CPU).prompt_logprobs(torch.zeros(1, 3), torch.tensor([1]), 20)
    assert found.token_ids == [1, 0, 1, 2]
    assert found.logprobs == pytest.approx([-np.log(3)] * 4)


def test_a_near_certain_token_is_not_above_zero():
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, 3] = 50.0
    [found] = Sampler(1, VOCAB, CPU).prompt_logprobs(logits, torch.tensor([3]), 1)
    assert found.logprobs == [0.0, 0.0]
