"""Draws that verify guesses are distributed as exact arithmetic says, for any two sampling parameters together.

    python -m pytest tests/worker/sampler/test_verified_draws.py --examples 600 --timeout 1200 -rP

draws 200,000 sequences for each pair, and prints the p-values.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sampler_reference import CPU, Sequence, distribution

from octavo.protocol.plan import PlanRow
from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.sampler import Sampler
from octavo.worker.slots import Slots
from octavo.worker.verification import Pending, verify

VOCAB, BATCH, LENGTH = 6, 600, 2
PROMPT, GUESSES = [1], [0, 3]
# Of the tokens after the prompt. top_p, top_k and min_p each keep other tokens, alone and two together.
LOGITS = torch.tensor(
    [
        [0.50, 0.12, 0.055, 0.08, 0.20, 0.045],
        [0.13, 0.10, 0.20, 0.25, 0.17, 0.15],
        [0.17, 0.30, 0.20, 0.10, 0.15, 0.08],
    ]
).log()
PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_p": {"top_p": 0.85},
    "top_k": {"top_k": 4},
    "min_p": {"min_p": 0.2},
    "logit_bias": {"logit_bias": {0: -0.5, 4: 0.5}},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "bad_words": {"bad_words_token_ids": [[0, 2], [5]]},
    "min_tokens": {"min_tokens": 1, "stop_token_ids": [4]},  # so the second token may be one that the first may not
}
PAIRS = list(itertools.combinations(PARAMETERS, 2))
LIMIT = 1e-3 / len(PAIRS)  # Bonferroni's, for one false alarm in a thousand runs with other seeds


def draws(wish: dict[str, Any], guesses: list[int], first_seed: int) -> NDArray[np.int64]:
    """The first LENGTH tokens of BATCH sequences of seeds from first_seed on, [BATCH, LENGTH]; guesses: at them."""
    sampler, slots = Sampler(BATCH, VOCAB, CPU), Slots(BATCH, 8, 4, CPU)
    for slot in range(BATCH):
        own = SamplingParams(seed=first_seed + slot, max_tokens=4, **wish)
        Sequence(own, PROMPT, len(PROMPT)).set_in(sampler, slot)
    begin, count = len(PROMPT), len(guesses)
    slots.token_ids[:, begin : begin + count] = torch.tensor(guesses, dtype=slots.token_ids.dtype)
    found: list[list[int]] = [[] for _ in range(BATCH)]
    for done in range(LENGTH):
        going = [slot for slot in range(BATCH) if len(found[slot]) == done]
        pending = [
            Pending(PlanRow(slot, begin + done - 1, 1 + count, [], True, None, count), at * (1 + count))
            for at, slot in enumerate(going)
        ]
        logits = LOGITS[done : done + 1 + count].repeat(len(going), 1)
        for slot, result in zip(going, verify(logits, pending, sampler, slots)):
            found[slot] += result.token_ids
        count = 0
    return np.array([own[:LENGTH] for own in found])


def exact(wish: dict[str, Any]) -> NDArray[np.float64]:
    """Probability of each pair of tokens, [VOCAB, VOCAB]."""
    sampling, logits = SamplingParams(seed=0, max_tokens=4, **wish), LOGITS.numpy()
    wanted = np.zeros((VOCAB, VOCAB))
    first = distribution(logits[0], Sequence(sampling, PROMPT, len(PROMPT)))
    for token, probability in zip(first.ids, first.probabilities):
        second = distribution(logits[1], Sequence(sampling, [*PROMPT, token], len(PROMPT)))
        wanted[token, second.ids] = probability * second.probabilities
    return wanted


def p_value(counts: NDArray[np.int64], wanted: NDArray[np.float64]) -> float:
    """Of Pearson's chi-square test; cells where fewer than 5 are expected count as one. Raises AssertionError where
    something impossible was drawn."""
    assert counts[wanted == 0].sum() == 0
    expected = wanted * counts.sum()
    rare = expected < 5
    found = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    found, expected = found[expected > 0], expected[expected > 0]
    statistic = float(((found - expected) ** 2 / expected).sum())
    halves = torch.tensor([(len(found) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves))


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda name: name)
def test_pairs_of_parameters(one: str, other: str, examples: int) -> None:
    wish = PARAMETERS[one] | PARAMETERS[other]
    counts, num_accepted = np.zeros((VOCAB, VOCAB), dtype=np.int64), 0
    first_seed = PAIRS.index((one, other)) * 10_000_000
    for seed in range(first_seed, first_seed + BATCH * max(1, examples // 3), BATCH):
        drawn = draws(wish, GUESSES, seed)
        if seed == first_seed:
            assert (drawn == draws(wish, [], seed)).all()  # a seed draws what it draws without guesses
        np.add.at(counts, (drawn[:, 0], drawn[:, 1]), 1)
        num_accepted += int((drawn[:, 0] == GUESSES[0]).sum())
    assert num_accepted > 0.1 * counts.sum()
    p = p_value(counts, exact(wish))
    print(f"{one} and {other}: {counts.sum()} sequences, {num_accepted} begin as guessed, p = {p:.4g}")
    assert p > LIMIT


def test_the_test_can_fail() -> None:
    """Tokens that are accepted too often, and a parameter that is not followed after a guess."""
    counts = np.zeros((VOCAB, VOCAB), dtype=np.int64)
    for begin in range(0, 4 * BATCH, BATCH):
        drawn = draws({}, GUESSES, begin)
        np.add.at(counts, (drawn[:, 0], drawn[:, 1]), 1)
    assert p_value(counts, exact({})) > LIMIT
    assert p_value(counts, exact({"logit_bias": {GUESSES[0]: 0.25}})) < LIMIT
    assert p_value(counts, exact({"presence_penalty": 0.5})) < LIMIT
