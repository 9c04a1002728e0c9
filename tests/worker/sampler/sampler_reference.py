"""What the sampler should do to one row, written the long way: numpy, float64, full sorts. No torch.

Also the strategies and the small drivers that the sampler's tests share.
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.sampler import Sampled, Sampler
from octavo.worker.sampler.top_p import TOLERANCE

CPU = torch.device("cpu")
EOS = (2,)
PROPERTY = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Sequence:
    """One row of a batch: who asks, and what is there already."""

    sampling: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def set_in(self, sampler: Sampler, slot: int) -> None:
        sampler.set_slot(slot, self.sampling, EOS, self.token_ids, self.num_prompt_tokens)


def processed(logits: np.ndarray, row: Sequence) -> np.ndarray:
    """Logits after token lists, min_tokens, logit_bias and penalties; float32 [V], so that what is equal there is
    equal here."""
    s = row.sampling
    result = logits.astype(np.float32)
    if s.allowed_token_ids is not None:
        result[sorted(set(range(len(result))) - set(s.allowed_token_ids))] = -np.inf
    for *before, last in s.bad_words_token_ids or ():
        if not before or row.output[-len(before) :] == before:
            result[last] = -np.inf
    if len(row.output) < s.min_tokens:
        for token in {*EOS, *(s.stop_token_ids or ())}:
            result[token] = -np.inf
    for token, bias in (s.logit_bias or {}).items():
        result[token] += bias
    for token in set(row.token_ids):
        penalty = np.float32(s.repetition_penalty)
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token in set(row.output):
        result[token] -= s.frequency_penalty * row.output.count(token) + s.presence_penalty
    return result


@dataclass(frozen=True)
class Distribution:
    """Tokens that may be drawn, in the order in which they are laid out on [0, 1).

    margin: how near the data come to a limit (top_p, min_p), where float32 may decide otherwise.
    """

    ids: list[int]
    probabilities: np.ndarray
    margin: float


def distribution(logits: np.ndarray, row: Sequence) -> Distribution:
    s = row.sampling
    values = processed(logits, row)
    if s.temperature == 0:
        return Distribution([int(values.argmax())], np.ones(1), 1.0)
    values = values.astype(np.float64) / max(s.temperature, 0.01)
    weights = np.exp(values - values.max())
    margins = [abs(w - s.min_p) for w in weights if s.min_p and w != 1]
    weights[weights < s.min_p] = 0
    has_top_k = 0 < s.top_k < len(weights)
    if not has_top_k and s.top_p == 1:
        ids = list(range(len(weights)))
    else:
        ids = sorted(range(len(weights)), key=lambda i: (-values[i], i))
    if has_top_k:
        ids = ids[: s.top_k]
    if s.top_p < 1:
        cumulative = np.cumsum(weights[ids]) / weights[ids].sum()
        wanted = s.top_p * (1 - TOLERANCE)
        margins += list(abs(cumulative - wanted))
        ids = ids[: int(np.argmax(cumulative > wanted)) + 1]
    ids = [i for i in ids if weights[i] > 0]
    return Distribution(ids, weights[ids] / weights[ids].sum(), min(margins, default=1.0))


def leaves_tokens(logits: torch.Tensor, row: Sequence) -> bool:
    """Whether any token may be drawn."""
    return bool(np.isfinite(processed(logits.float().numpy(), row)).any())


def draw_at(sampler: Sampler, logits: torch.Tensor, row: Sequence, uniforms: list[float]) -> list[int]:
    """The tokens that the row draws at these uniforms. Each is drawn in a slot of its own."""
    for slot in range(len(uniforms)):
        row.set_in(sampler, slot)
    slots = list(range(len(uniforms)))
    with patch("octavo.worker.sampler.sampler.uniform", side_effect=uniforms):
        sampled = sampler.sample(logits.expand(len(slots), -1), slots, [len(row.token_ids)] * len(slots))
    assert not sampled.bad.any()
    return sampled.token_ids.tolist()


def sample(sampler: Sampler, logits: torch.Tensor, rows: list[Sequence]) -> Sampled:
    """Sample the rows as a batch in slots 0..R-1, which are set first."""
    for slot, row in enumerate(rows):
        row.set_in(sampler, slot)
    return sampler.sample(logits, list(range(len(rows))), [len(row.token_ids) for row in rows])


def grid_logits(vocab_size: int, seed: int, spread: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[vocab_size] logits on a grid of eighths: many are equal, and all are exact in float32."""
    values = torch.from_numpy(np.random.default_rng(seed).normal(0, spread, vocab_size))
    return (values.mul(8).round() / 8).to(dtype)


@st.composite
def sampling_params(draw: st.DrawFn, vocab_size: int) -> SamplingParams:
    """Any mix of features, each off half the time."""

    def maybe(strategy: st.SearchStrategy, off: object) -> object:
        return draw(st.one_of(st.just(off), strategy))

    tokens = st.integers(0, vocab_size - 1)
    return SamplingParams(
        temperature=maybe(st.sampled_from([0.0, 0.001, 0.5, 0.7, 1.3, 2.0]), 1.0),
        top_p=maybe(st.floats(0.01, 0.999), 1.0),
        top_k=maybe(st.integers(1, vocab_size + 5), 0),
        min_p=maybe(st.floats(0.001, 1.0), 0.0),
        repetition_penalty=maybe(st.sampled_from([0.5, 1.1, 1.5]), 1.0),
        frequency_penalty=maybe(st.sampled_from([-2.0, -0.5, 0.25, 2.0]), 0.0),
        presence_penalty=maybe(st.sampled_from([-1.5, 0.5, 2.0]), 0.0),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        max_tokens=100,
        min_tokens=maybe(st.integers(1, 8), 0),
        stop_token_ids=maybe(st.lists(tokens, max_size=3), None),
        logit_bias=maybe(st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 0.5, 3.0]), max_size=4), None),
        logprobs=maybe(st.integers(0, 20), None),
        allowed_token_ids=maybe(st.lists(tokens, min_size=3, max_size=20), None),
        bad_words_token_ids=maybe(st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=5), None),
    )


@st.composite
def sequences(draw: st.DrawFn, vocab_size: int) -> Sequence:
    token_ids = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=16))
    return Sequence(draw(sampling_params(vocab_size)), token_ids, draw(st.integers(1, len(token_ids))))
