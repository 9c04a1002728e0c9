"""Token counts: what they hold, when their tables exist, and that sampling itself keeps them up."""

from __future__ import annotations

import torch
from sampler_reference import CPU, EOS, Sequence, sample

from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.penalties import Penalties
from octavo.worker.sampler.sampler import Sampler

VOCAB = 50


def test_the_sampled_token_is_counted_before_the_host_sees_it():
    """Greedy, one unit of frequency penalty a token: tokens one apart take turns."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20], logits[0, 30] = 5.0, 4.5, 3.75
    sampler = Sampler(1, VOCAB, CPU)
    sampler.set_slot(0, SamplingParams(seed=0, temperature=0, frequency_penalty=1.0), EOS, [1], 1)
    drawn = [sampler.sample(logits, [0], [1 + i]).token_ids.item() for i in range(6)]
    assert drawn == [10, 20, 10, 30, 20, 10]


def test_presence_counts_once_and_prompt_tokens_only_for_repetition():
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20] = 5.0, 4.0

    def first(token_ids: list[int], **wish: float) -> int:
        row = Sequence(SamplingParams(seed=0, temperature=0, **wish), token_ids, 2)
        return sample(Sampler(1, VOCAB, CPU), logits, [row]).token_ids.item()

    assert first([10, 10, 10, 10], presence_penalty=0.9) == 10
    assert first([10, 10, 10, 10], frequency_penalty=0.9) == 20
    assert first([10, 10], frequency_penalty=2.0, presence_penalty=2.0) == 10
    assert first([10, 10], repetition_penalty=1.5) == 20


def test_repetition_multiplies_negative_logits():
    logits = torch.full((1, VOCAB), -10.0)
    logits[0, 10], logits[0, 20] = -1.0, -1.5
    row = Sequence(SamplingParams(seed=0, temperature=0, repetition_penalty=2.0), [10], 1)
    assert sample(Sampler(1, VOCAB, CPU), logits, [row]).token_ids.tolist() == [20]


def test_the_smallest_and_largest_repetition_penalties_leave_numbers():
    logits = torch.full((1, VOCAB), -10.0)
    logits[0, 10], logits[0, 20], logits[0, 30] = 1.0, 0.0, -1.0
    for penalty in (5e-324, 1e308):
        sampling = SamplingParams(seed=0, temperature=0, repetition_penalty=penalty)
        row = Sequence(sampling, [10, 20, 30], 3)
        sampled = sample(Sampler(1, VOCAB, CPU), logits, [row])
        assert (sampled.token_ids.tolist(), sampled.bad.tolist()) == ([10], [False]), penalty


def test_a_slot_forgets_its_last_sequence():
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20] = 5.0, 4.0
    sampler = Sampler(1, VOCAB, CPU)
    penalized = SamplingParams(seed=0, temperature=0, presence_penalty=2.0)
    for sampling in (penalized, SamplingParams(seed=0, temperature=0), penalized):
        sampler.set_slot(0, sampling, EOS, [1], 1)
        assert sampler.sample(logits, [0], [1]).token_ids.tolist() == [10]


def test_tables_exist_only_where_they_are_used_and_keep_their_rows_as_they_grow():
    sampler = Sampler(64, VOCAB, CPU)
    tables = sampler._penalties
    sampler.set_slot(5, SamplingParams(seed=0), EOS, [1], 1)
    assert tables.num_rows == 0
    penalized = SamplingParams(seed=0, temperature=0, frequency_penalty=2.0, repetition_penalty=3.0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20], logits[0, 30] = 5.0, 4.0, 3.0
    sampler.set_slot(2, penalized, EOS, [20], 1)
    assert tables.num_rows == 3
    assert sampler.sample(logits, [2], [1]).token_ids.tolist() == [10]
    sampler.set_slot(40, penalized, EOS, [1], 1)
    assert tables.num_rows == 41
    assert sampler.sample(logits, [2], [2]).token_ids.tolist() == [30]


def test_apply_leaves_rows_that_do_not_ask_alone():
    penalties = Penalties(VOCAB, CPU)
    assert penalties.num_rows == 0
    penalties.apply(logits := torch.ones(2, VOCAB), [0, 1], [])
    assert torch.equal(logits, torch.ones(2, VOCAB))
