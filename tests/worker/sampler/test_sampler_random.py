"""The uniforms: known values, range, and that draws follow the distribution they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampler_reference import CPU, EOS, Sequence, distribution

from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.random import _mix, stream_of, uniform
from octavo.worker.sampler.sampler import Sampler


def test_splitmix64_known_outputs():
    """The first outputs of SplitMix64 started at 1234567, as published with the algorithm's C code."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(uniform(1234567, n) * 2**53) for n in range(4)] == [value >> 11 for value in wanted]


def test_mix_is_a_bijection_on_samples_and_streams_take_any_int64():
    assert len({_mix(i) for i in range(5000)}) == 5000
    assert stream_of(-1) == _mix(2**64 - 1)
    for seed in (-(2**63), -1, 0, 2**63 - 1):
        assert 0 <= stream_of(seed) < 2**64
        assert 0 <= uniform(stream_of(seed), 0) < 1


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_uniforms_are_even_and_neighbours_uncorrelated(along):
    """Chi-square of 100 cells over 20,000 draws, 99.9% bound 149; lag-1 correlation within 4 sigma."""
    pairs = [(7, n) if along == "positions" else (n, 7) for n in range(20_000)]
    values = np.array([uniform(stream_of(seed), position) for seed, position in pairs])
    cells = np.bincount((values * 100).astype(int), minlength=100)
    assert ((cells - 200) ** 2 / 200).sum() < 149
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(20_000)


@pytest.mark.parametrize("wish", [{}, {"temperature": 0.6, "top_p": 0.9}, {"top_k": 5}, {"min_p": 0.15}], ids=str)
def test_draws_follow_the_distribution(wish):
    """Chi-square over 16 tokens and 8,000 draws: 200 slots, 40 positions; 99.9% bound for 15 degrees 37.7."""
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 1, 16)).float()
    row = Sequence(SamplingParams(seed=0, **wish), [1], 1)
    sampler = Sampler(200, 16, CPU)
    for slot in range(200):
        sampler.set_slot(slot, row.sampling.replace(seed=slot), EOS, [1], 1)
    drawn = [sampler.sample(logits.expand(200, -1), list(range(200)), [n] * 200).token_ids for n in range(1, 41)]
    counts = np.bincount(torch.cat(drawn).numpy(), minlength=16)
    wanted = distribution(logits.numpy(), row)
    expected = wanted.probabilities * 8000
    assert counts[wanted.ids].sum() == 8000
    assert ((counts[wanted.ids] - expected) ** 2 / expected).sum() < 37.7
