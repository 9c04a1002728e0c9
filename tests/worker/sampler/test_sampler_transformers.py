"""A token's share of all draws is the probability that transformers' own processors of logits give it."""

from __future__ import annotations

import pytest
import torch
from sampler_reference import CPU, EOS, Sequence, draw_at
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.sampler import Sampler

VOCAB = 50
DRAWS = 2000  # a sampler that inverts the distribution gives each token its share of even uniforms, within one
TOKENS = [1, 3, 3, 7, 7, 7, 9]  # three of them are the prompt
NUM_PROMPT = 3
LIKELY = [2, 3, 5, 6, 7, 9, 11]  # what the cases are about
CASES: list[tuple[dict[str, object], list[LogitsProcessor]]] = [
    ({}, []),
    ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
    ({"top_k": 8}, [TopKLogitsWarper(8)]),
    ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    ({"temperature": 1.4, "top_k": 20}, [TemperatureLogitsWarper(1.4), TopKLogitsWarper(20)]),
    ({"temperature": 0.7, "top_p": 0.9}, [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)]),
    ({"temperature": 2.0, "min_p": 0.05}, [TemperatureLogitsWarper(2.0), MinPLogitsWarper(0.05)]),
    (
        {"temperature": 1.3, "min_p": 0.02, "top_k": 15, "top_p": 0.85},
        [TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.02), TopKLogitsWarper(15), TopPLogitsWarper(0.85)],
    ),
    ({"repetition_penalty": 1.6}, [RepetitionPenaltyLogitsProcessor(1.6)]),
    ({"repetition_penalty": 0.7, "top_p": 0.9}, [RepetitionPenaltyLogitsProcessor(0.7), TopPLogitsWarper(0.9)]),
    ({"logit_bias": {4: 2.5, 8: -3.0}}, [SequenceBiasLogitsProcessor([[[4], 2.5], [[8], -3.0]])]),
    (
        {"bad_words_token_ids": [[11], [7, 9, 5], [3, 9, 6]]},
        [NoBadWordsLogitsProcessor([[11], [7, 9, 5], [3, 9, 6]])],
    ),
    ({"min_tokens": 6}, [MinNewTokensLengthLogitsProcessor(NUM_PROMPT, 6, list(EOS))]),
]


@pytest.mark.parametrize(("wish", "processors"), CASES, ids=[str(wish) for wish, _ in CASES])
@pytest.mark.parametrize("seed", [0, 1])
def test_shares_of_draws_are_transformers_probabilities(
    wish: dict[str, object], processors: list[LogitsProcessor], seed: int
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    logits[LIKELY] = 3.0 + torch.arange(len(LIKELY)) / 10
    scores = LogitsProcessorList(processors)(torch.tensor([TOKENS]), logits[None].clone())
    wanted = scores[0].double().softmax(-1)
    row = Sequence(SamplingParams(seed=1, max_tokens=50, **wish), TOKENS, NUM_PROMPT)
    drawn = draw_at(Sampler(DRAWS, VOCAB, CPU), logits, row, [(i + 0.5) / DRAWS for i in range(DRAWS)])
    shares = torch.bincount(torch.tensor(drawn), minlength=VOCAB) / DRAWS
    assert (shares - wanted).abs().max() <= 1 / DRAWS + 1e-5
    if wish:
        assert (shares - logits.double().softmax(-1)).abs().max() > 5 / DRAWS
