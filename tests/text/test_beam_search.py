"""The search, told log-probabilities by a small Markov chain, finds what an exhaustive search finds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.protocol.beam_search import BeamSearchParams, beams_of
from octavo.protocol.plan import TokenLogprobs
from octavo.protocol.sampling import SamplingParams
from octavo.text.beam_search import Beam, BeamSearch

VOCAB, EOS = 4, 3


def chain(seed: int) -> np.ndarray:
    """Log-probabilities of the next token after each, and after nothing; float64 [VOCAB + 1, VOCAB]."""
    logits = np.random.default_rng(seed).normal(0, 1.5, (VOCAB + 1, VOCAB))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def told(search: BeamSearch, table: np.ndarray) -> list[TokenLogprobs]:
    """What the engine would say of each running beam."""
    found = []
    for beam in search.running:
        row = table[beam.token_ids[-1] if beam.token_ids else VOCAB]
        top = np.argsort(-row, kind="stable")[: search.num_candidates].tolist()
        found.append(TokenLogprobs([top[0], *top], [float(row[i]) for i in (top[0], *top)], 1))
    return found


def run(search: BeamSearch, table: np.ndarray) -> list[Beam]:
    while not search.done:
        search.advance(told(search, table))
    return search.ended


def exhaustive(table: np.ndarray, max_tokens: int, length_penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """Every output there is, with its score, the best first."""
    found = []
    for length in range(1, max_tokens + 1):
        for ids in itertools.product(range(VOCAB), repeat=length):
            if EOS in ids[:-1] or (ids[-1] != EOS and length < max_tokens):
                continue
            total = sum(table[before, after] for before, after in zip((VOCAB, *ids), ids))
            found.append((total / length**length_penalty, ids))
    return sorted(found, reverse=True)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([-1.0, 0.0, 0.7, 1.0, 2.0]))
def test_as_many_beams_as_there_are_outputs_find_the_best_of_all(seed, max_tokens, length_penalty):
    table = chain(seed)
    every = exhaustive(table, max_tokens, length_penalty)
    params = BeamSearchParams(
        beam_width=16, max_tokens=max_tokens, length_penalty=length_penalty, early_stopping="never"
    )
    found = run(BeamSearch(params, [EOS]), table)
    # 16 beams hold every beginning of up to two tokens, of which there are 9; of whole outputs they may drop the worst.
    assert found[0].token_ids == every[0][1]
    assert found[0].score == pytest.approx(every[0][0])
    for beam in found:
        total = sum(entry.logprobs[0] for entry in beam.logprobs)
        assert beam.cumulative_logprob == pytest.approx(total)
        assert [entry.token_ids for entry in beam.logprobs] == [[token] for token in beam.token_ids]
        assert beam.ends == (beam.token_ids[-1] == EOS)
        assert beam.score == pytest.approx(total / len(beam.token_ids) ** length_penalty)
    assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True)


def test_one_beam_is_the_greedy_output() -> None:
    table = chain(5)
    params = BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
    [beam] = run(BeamSearch(params, [EOS]), table)
    expected, last = [], VOCAB
    for _ in range(6):
        last = int(table[last].argmax())
        expected.append(last)
    assert list(beam.token_ids) == expected


def biased(eos: float) -> np.ndarray:
    """After anything: an end with probability `eos`, else one of three tokens, the first the likeliest."""
    rest = 1 - eos
    return np.log(np.tile([rest * 0.7, rest * 0.2, rest * 0.1, eos], (VOCAB + 1, 1)))


def test_when_a_search_ends() -> None:
    """True: at two ends. False: when the best unended one ranks below at its length. never: later still."""
    lengths = {}
    for early_stopping in (True, False, "never"):
        params = BeamSearchParams(beam_width=2, max_tokens=12, early_stopping=early_stopping, length_penalty=1.0)
        search = BeamSearch(params, [EOS])
        steps = 0
        while not search.done:
            search.advance(told(search, biased(0.3)))
            steps += 1
        lengths[early_stopping] = steps
        assert len(search.ended) == 2
    assert lengths[True] < lengths[False] <= lengths["never"] == 12


def test_ends_that_are_ignored_are_tokens_like_others() -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=4, ignore_eos=True)
    search = BeamSearch(params, [EOS])
    assert search.num_candidates == 3
    assert all(len(beam.token_ids) == 4 and not beam.ends for beam in run(search, biased(0.5)))


def test_impossible_tokens_are_no_candidates() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3, max_tokens=2), [EOS])
    search.advance([TokenLogprobs([0, 0, 1, 2, 3], [0.0, 0.0, -math.inf, -math.inf, -math.inf], 1)])
    assert [beam.token_ids for beam in search.running] == [(0,)]


def test_requests_are_the_beams_and_distinct() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True), [])
    first = search.requests("s", [9, 9])
    assert [(r.prompt_token_ids, r.max_tokens, r.sampling.logprobs) for r in first] == [([9, 9], 1, 2)]
    search.advance(told(search, biased(0.1)))
    second = search.requests("s", [9, 9])
    assert [r.prompt_token_ids for r in second] == [[9, 9, 0], [9, 9, 1]]
    assert len({r.request_id for r in first + second}) == 3


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"beam_width": 0}, r"beam_width=0 is out of range; allowed: 1\.\.16"),
        ({"beam_width": 17}, r"beam_width=17 is out of range"),
        ({"max_tokens": 0}, "max_tokens=0 is out of range"),
        ({"temperature": 0.5}, r"temperature=0.5 is refused in a beam search; allowed: 0"),
        ({"length_penalty": math.nan}, "length_penalty=nan is not a finite number"),
        ({"early_stopping": "sometimes"}, "early_stopping='sometimes' is not known; allowed: true, false, never"),
        ({"early_stopping": 1}, "early_stopping=1 is not known"),
    ],
)
def test_what_is_out_of_range_is_named(wish: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **wish})


def test_more_beams_than_the_engine_tells_candidates_of_are_refused() -> None:
    with pytest.raises(ValueError, match=r"beam_width=16 is out of range; allowed: 1\.\.15 for a model with 5"):
        BeamSearch(BeamSearchParams(beam_width=16, max_tokens=4), range(5))
    sampling = SamplingParams(use_beam_search=True, temperature=0, n=2, best_of=17)
    with pytest.raises(ValueError, match=r"best_of=17 is out of range; allowed: 1\.\.16 beams"):
        beams_of(sampling, 4)
