"""The GPU's sampler does to every row what the long-hand reference says, whatever is beside it in the batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sampler_reference import EOS, PROPERTY, Sequence, distribution, grid_logits, leaves_tokens, processed, sequences

pytest.importorskip("triton")


from octavo.kernels.reference import sampling as reference
from octavo.kernels.triton import sampling_rows, sampling_truncation
from octavo.protocol.plan import RowResult
from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.sampler.random import stream_of
from octavo.worker.sampler.sampler import Sampler, failed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 60
MARGIN = 1e-5  # nearer to a limit, float32 may decide otherwise


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Small blocks, which the interpreter works through sooner."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sampling_truncation, "_BLOCK", 512)
        monkeypatch.setattr(sampling_rows, "_LOGPROBS_BLOCK", 512)
        yield


@dataclass
class Rig:
    """A sampler and the runner's tables: parameters and token ids by slot."""

    num_slots: int
    vocab_size: int = VOCAB
    sampler: DeviceSampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = DeviceSampler(self.num_slots, self.vocab_size, DEVICE)
        self.params = torch.zeros(self.num_slots, 16, dtype=torch.int32, device=DEVICE)
        self.token_ids = torch.full((self.num_slots, 64), 2**30, dtype=torch.int32, device=DEVICE)

    def enter(self, slot: int, row: Sequence) -> None:
        record = self.sampler.set_slot(slot, row.sampling, EOS, row.token_ids, row.num_prompt_tokens)
        self.params[slot] = torch.from_numpy(record).to(DEVICE)
        self.token_ids[slot] = 2**30
        self.token_ids[slot, : len(row.token_ids)] = torch.tensor(row.token_ids, dtype=torch.int32)

    def step(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> list[RowResult]:
        out = torch.full((len(slots), 2), -7, dtype=torch.int32, device=DEVICE)
        row_slots, at = torch.tensor([slots, positions], dtype=torch.int32, device=DEVICE)
        logits = logits.to(DEVICE)
        tables = (self.params, self.token_ids)
        self.sampler.draw(logits, row_slots, at, self.params, torch.ones_like(row_slots), self.token_ids, out)
        more = None
        if rows := self.sampler.needs_more(slots, positions):
            more = self.sampler.draw_more(logits, rows, slots, positions, *tables, out)
        host = self.sampler.pack_more(out, more).cpu().numpy()
        results = self.sampler.rows_from_host(host, [slot >= 0 for slot in slots], more)
        for slot, position, result in zip(slots, positions, results):
            if result.token_ids:
                assert self.token_ids[slot, position] == result.token_ids[0]
        return results


def one(logits: torch.Tensor, row: Sequence) -> RowResult:
    """The row alone, once."""
    rig = Rig(1, logits.shape[-1])
    rig.enter(0, row)
    [result] = rig.step(logits[None], [0], [len(row.token_ids)])
    return result


def assert_drawn(token: int, logits: torch.Tensor, row: Sequence) -> None:
    """The token is the Gumbel-max among those that the reference keeps, up to float32's error."""
    values = processed(logits.float().numpy(), row)
    wanted = distribution(logits.float().numpy(), row)
    assert token in wanted.ids
    if row.sampling.temperature == 0:
        assert values[token] == pytest.approx(values[wanted.ids[0]], abs=1e-5)
        return
    temperature = max(row.sampling.temperature, 0.01)
    stream = stream_of(row.sampling.seed or 0)
    scores = reference.gumbel_scores(torch.from_numpy(values), temperature, stream, len(row.token_ids))
    assert scores[wanted.ids].max() - scores[token] <= 1e-4


def rows_of(results: list[RowResult]) -> list[int]:
    return [result.token_ids[0] for result in results]


@settings(PROPERTY, max_examples=30)
@given(st.data(), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_mix_of_steps_draws_as_the_reference(data, seed, dtype):
    row = data.draw(sequences(VOCAB))
    logits = grid_logits(VOCAB, seed, 1.5, dtype)
    assume(leaves_tokens(logits, row))
    assume(distribution(logits.float().numpy(), row).margin > MARGIN)
    assert_drawn(one(logits, row).token_ids[0], logits, row)


WISHES = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.004},
    {"min_p": 0.1},
    {"top_k": 7},
    {"top_k": 1},
    {"top_p": 0.8},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.02},
    {"repetition_penalty": 1.7},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5, "top_p": 0.9},
    {"min_tokens": 9, "stop_token_ids": [5, 6]},
    {"min_tokens": 9, "logit_bias": {2: 100.0, 3: 1.0}, "presence_penalty": 0.5},
    {"logit_bias": {3: 5.0, 4: -100.0}, "temperature": 0.0},
    {"logprobs": 3, "top_k": 5},
    {"logprobs": 0},
    {"allowed_token_ids": [5, 40, 59], "top_k": 7},
    {"bad_words_token_ids": [[4], [7, 9, 5], [9, 6], [3, 9, 8]], "repetition_penalty": 1.5, "logit_bias": {6: 3.0}},
]


def test_a_batch_of_everything_draws_what_each_row_draws_alone():
    """In shuffled slots and order, with padding; tokens and log-probabilities to the last bit."""
    rows = [
        Sequence(SamplingParams(seed=9 + i, max_tokens=50, **wish), [1, 3, 3, 7, 7, 7, 9 + i], 3)
        for i, wish in enumerate(WISHES)
    ]
    logits = torch.stack([grid_logits(VOCAB, 50 + i, 1.5, torch.bfloat16) for i in range(len(rows))])
    rng = np.random.default_rng(2)
    slots, order = rng.permutation(24)[: len(rows)].tolist(), rng.permutation(len(rows)).tolist()
    rig = Rig(24)
    for slot, row in zip(slots, rows):
        rig.enter(slot, row)
    padded = torch.cat([logits[order], torch.full((2, VOCAB), torch.nan)])
    together = rig.step(padded, [*(slots[i] for i in order), -1, -1], [7] * len(rows) + [0, 0])
    assert together[-1] == together[-2] == RowResult(token_ids=[])
    for i, result in zip(order, together):
        assert result == one(logits[i], rows[i])
        assert_drawn(result.token_ids[0], logits[i], rows[i])
        assert (result.logprobs is None) == (rows[i].sampling.logprobs is None)


def test_only_rows_that_need_it_are_drawn_again():
    rig = Rig(len(WISHES))
    for slot, wish in enumerate(WISHES):
        rig.enter(slot, Sequence(SamplingParams(seed=1, max_tokens=50, **wish), [1, 2], 1))
    slots = list(range(len(WISHES)))
    # The rest is plain, and top_k=1 is greedy.
    assert rig.sampler.needs_more(slots, [2] * len(slots)) == [3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    # 9 tokens later min_tokens is over; a bias stays.
    assert rig.sampler.needs_more(slots, [10] * len(slots)) == [3, 4, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16]
    assert rig.sampler.needs_more([-1] * 3, [0] * 3) == []
    rig.enter(3, Sequence(SamplingParams(seed=1), [1], 1))
    assert rig.sampler.needs_more([3, 4], [1, 1]) == [1]


def test_features_that_change_nothing_draw_the_plain_token():
    """The random numbers are the same on every way to the draw."""
    logits = grid_logits(VOCAB, 3, 1.0)
    for seed in range(4):
        plain, *others = (
            one(logits, Sequence(SamplingParams(seed=seed, **wish), [4, 5], 1)).token_ids
            for wish in ({}, {"top_p": 1 - 1e-12}, {"top_k": VOCAB - 1}, {"logit_bias": {1: 0.0}}, {"min_p": 1e-9})
        )
        assert all(other == plain for other in others)


def test_the_drawn_token_is_counted_before_the_host_sees_it():
    """Greedy, one unit of frequency penalty a token: tokens one apart take turns, across a preemption too."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20], logits[0, 30] = 5.0, 4.5, 3.75
    rig = Rig(3)
    row = Sequence(SamplingParams(seed=0, temperature=0, frequency_penalty=1.0), [1], 1)
    rig.enter(1, row)
    drawn = [rig.step(logits, [1], [1 + i])[0].token_ids[0] for i in range(4)]
    assert drawn == [10, 20, 10, 30]
    rig.enter(2, replace(row, token_ids=[1, *drawn]))
    drawn += [rig.step(logits, [2], [1 + i])[0].token_ids[0] for i in range(4, 6)]
    assert drawn == [10, 20, 10, 30, 20, 10]


def test_a_slot_forgets_its_last_sequence_and_gives_its_counts_back():
    logits = torch.zeros(1, VOCAB)
    logits[0, 10], logits[0, 20] = 5.0, 4.0
    rig = Rig(4)
    penalized = SamplingParams(seed=0, temperature=0, presence_penalty=2.0)
    for slot, sampling in [(0, penalized), (0, penalized), (0, SamplingParams(seed=0, temperature=0)), (1, penalized)]:
        rig.enter(slot, Sequence(sampling, [1], 1))
        assert rows_of(rig.step(logits, [slot], [1])) == [10]
    assert rig.sampler._seen.shape[0] == 1
    for slot in (0, 2, 3):
        rig.enter(slot, Sequence(penalized, [1], 1))
    assert rows_of(rig.step(logits.expand(4, -1), [0, 1, 2, 3], [1, 2, 1, 1])) == [10, 20, 10, 10]
    assert rig.sampler._seen.shape[0] == 4


def test_bad_rows_cost_themselves_only():
    logits = torch.stack([grid_logits(VOCAB, i, 1.0) for i in range(5)])
    logits[1, 7] = torch.nan
    logits[2, 7] = torch.inf
    everything = dict.fromkeys(range(VOCAB), -100.0)
    wishes = [{}, {"logit_bias": {7: -100.0}, "logprobs": 2}, {"top_p": 0.5}, {"min_tokens": 2}, {"top_k": 3}]
    rows = [Sequence(SamplingParams(seed=1, **wish), [1], 1) for wish in wishes]
    rows[3] = Sequence(rows[3].sampling.replace(stop_token_ids=list(everything)), [1], 1)
    rig = Rig(5)
    for slot, row in enumerate(rows):
        rig.enter(slot, row)
    with np.errstate(all="ignore"):
        results = rig.step(logits, [0, 1, 2, 3, 4], [1] * 5)
    assert results[1:4] == [failed(1), failed(1), failed(2)]
    for row in (0, 4):
        assert results[row] == one(logits[row], rows[row])


@pytest.mark.parametrize("num", [0, 4, 20])
def test_logprobs_are_the_cpu_samplers(num):
    """Raw ones: bias and penalties draw the token but do not show. More alternatives than tokens there are, too."""
    vocab_size = 12
    wish = {"temperature": 0.0, "logit_bias": {5: 8.0}, "presence_penalty": 1.0}
    row = Sequence(SamplingParams(seed=1, logprobs=num, **wish), [1, 2], 1)
    logits = grid_logits(vocab_size, 3, 1.0, torch.bfloat16)
    found = one(logits, row)
    cpu = Sampler(1, vocab_size, torch.device("cpu"))
    row.set_in(cpu, 0)
    [wanted] = cpu.to_rows(cpu.sample(logits[None], [0], [2]))
    assert found.token_ids == wanted.token_ids
    assert found.logprobs is not None
    assert wanted.logprobs is not None
    [entry], [other] = found.logprobs, wanted.logprobs
    assert entry.token_ids == other.token_ids
    assert entry.rank == other.rank
    assert entry.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_logprobs_of_chosen_ids_stand_beside_those_of_the_likeliest():
    logits = torch.stack([grid_logits(VOCAB, seed, 2.0, torch.bfloat16) for seed in range(3)])
    wishes = [{"logprob_token_ids": [9, 0, 59]}, {"logprobs": 5}, {"logprob_token_ids": [4]}]
    rows = [Sequence(SamplingParams(seed=1, temperature=0, **wish), [1, 2], 1) for wish in wishes]
    rig, cpu = Rig(3), Sampler(3, VOCAB, torch.device("cpu"))
    for slot, row in enumerate(rows):
        rig.enter(slot, row)
        row.set_in(cpu, slot)
    results = rig.step(logits, [0, 1, 2], [2, 2, 2])
    others = cpu.to_rows(cpu.sample(logits, [0, 1, 2], [2, 2, 2]))
    for row, result, other, values in zip(rows, results, others, logits):
        [found], [wanted] = result.logprobs or (), other.logprobs or ()
        assert found.token_ids == wanted.token_ids
        assert found.rank == wanted.rank
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=2e-5)
        assert found.logprobs == pytest.approx(values.float().log_softmax(-1)[found.token_ids].tolist(), abs=2e-5)
        chosen = row.sampling.logprob_token_ids
        assert chosen is None or found.token_ids[1:] == chosen


def test_prompt_logprobs_are_the_cpu_samplers():
    logits = torch.stack([grid_logits(VOCAB, r, 1.0, torch.bfloat16) for r in range(3)])
    targets = torch.tensor([3, 1, 4])
    found = DeviceSampler(1, VOCAB, DEVICE).prompt_logprobs(logits.to(DEVICE), targets.to(DEVICE), 3)
    wanted = Sampler(1, VOCAB, torch.device("cpu")).prompt_logprobs(logits, targets, 3)
    for entry, other in zip(found, wanted):
        assert (entry.token_ids, entry.rank) == (other.token_ids, other.rank)
        assert entry.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_more_rows_than_are_copied_at_once(monkeypatch):
    monkeypatch.setattr("octavo.worker.sampler.device_sampler._MOST_ELEMENTS_AT_ONCE", 2 * VOCAB)
    rig = Rig(5)
    rows = [Sequence(SamplingParams(seed=s, frequency_penalty=1.0, logit_bias={s: 1.0}), [1, 2], 1) for s in range(5)]
    for slot, row in enumerate(rows):
        rig.enter(slot, row)
    logits = torch.stack([grid_logits(VOCAB, s, 1.0) for s in range(5)])
    for row, values, result in zip(rows, logits, rig.step(logits, list(range(5)), [2] * 5)):
        assert_drawn(result.token_ids[0], values, row)


def test_mistakes_are_named():
    sampler = DeviceSampler(2, VOCAB, DEVICE)
    with pytest.raises(ValueError, match=r"slot=2 is out of range; allowed: 0\.\.1"):
        sampler.set_slot(2, SamplingParams(seed=1), EOS, [1], 1)
    with pytest.raises(ValueError, match="seed=None"):
        sampler.set_slot(0, SamplingParams(), EOS, [1], 1)
    with pytest.raises(ValueError, match=r"num_prompt_tokens=2 is out of range; allowed: 0\.\.1"):
        sampler.set_slot(0, SamplingParams(seed=1), EOS, [1], 2)
