"""Thousands of seeded draws are distributed as the exact softmax says (Pearson's chi-square test)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sampler_reference import CPU, EOS, Distribution, Sequence, distribution

pytest.importorskip("triton")

from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.sampler.sampler import Sampler

VOCAB = 16
LOGITS = torch.from_numpy(np.random.default_rng(11).normal(0, 1.0, VOCAB)).float()
WISHES = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
    {"logit_bias": {3: 2.0, 4: -1.0}, "presence_penalty": 1.0},
    {"allowed_token_ids": [1, 4, 7, 9, 12], "top_p": 0.95},
]
DEVICE = torch.device("cuda")


def rows(number: int, wish: dict[str, object]) -> list[Sequence]:
    """One for each seed 0..number-1."""
    made = SamplingParams(max_tokens=50, seed=0, **wish)
    return [Sequence(made.replace(seed=seed), [1, 2, 3], 2) for seed in range(number)]


def drawn_on_cpu(sequences: list[Sequence]) -> list[int]:
    sampler = Sampler(len(sequences), VOCAB, CPU)
    for slot, row in enumerate(sequences):
        row.set_in(sampler, slot)
    slots = list(range(len(sequences)))
    return sampler.sample(LOGITS.expand(len(slots), -1), slots, [3] * len(slots)).token_ids.tolist()


def drawn_on_device(sequences: list[Sequence]) -> list[int]:
    number = len(sequences)
    sampler = DeviceSampler(number, VOCAB, DEVICE)
    records = [sampler.set_slot(i, s.sampling, EOS, s.token_ids, 2) for i, s in enumerate(sequences)]
    params = torch.from_numpy(np.stack(records)).to(DEVICE)
    table = torch.tensor([[1, 2, 3, 0]], dtype=torch.int32, device=DEVICE).repeat(number, 1)
    slots = torch.arange(number, dtype=torch.int32, device=DEVICE)
    at, samples = torch.full_like(slots, 3), torch.ones_like(slots)
    logits, out = LOGITS.to(DEVICE).repeat(number, 1), torch.zeros(number, 2, dtype=torch.int32, device=DEVICE)
    sampler.draw(logits, slots, at, params, samples, table, out)
    if more := sampler.needs_more(slots.tolist(), at.tolist()):
        sampler.draw_more(logits, more, slots.tolist(), at.tolist(), params, table, out)
    return out[:, 0].tolist()


def assert_distributed(drawn: list[int], wanted: Distribution) -> None:
    """One in 30,000 honest samples would fail: the quantile by Wilson and Hilferty's cube root."""
    counts = np.bincount(drawn, minlength=VOCAB)[wanted.ids]
    assert counts.sum() == len(drawn)  # nothing else was drawn
    expected = wanted.probabilities * len(drawn)
    degrees = len(expected) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 4.0 * math.sqrt(2 / (9 * degrees))) ** 3
    assert ((counts - expected) ** 2 / expected).sum() < limit


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_cpu_draws_are_distributed_as_the_softmax(wish: dict[str, object]) -> None:
    sequences = rows(4000, wish)
    assert_distributed(drawn_on_cpu(sequences), distribution(LOGITS.numpy(), sequences[0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter takes a second for a few draws")
@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_gpu_draws_are_distributed_as_the_softmax(wish: dict[str, object]) -> None:
    sequences = rows(4000, wish)
    assert_distributed(drawn_on_device(sequences), distribution(LOGITS.numpy(), sequences[0]))


def test_the_test_can_fail() -> None:
    sequences = rows(4000, {})
    with pytest.raises(AssertionError):
        assert_distributed(drawn_on_cpu(sequences), distribution(LOGITS.numpy() * 1.25, sequences[0]))
