"""What the sampler knows, on the host, of the sequence in a slot: its SamplingParams made ready for use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.protocol.sampling import MIN_TEMPERATURE, SamplingParams
from octavo.worker.sampler.random import stream_of
from octavo.worker.sampler.token_lists import TokenLists, token_lists

Ids = NDArray[np.int64]

# Beyond these, a logit times or over the penalty leaves float32.
_PENALTY_RANGE = (1e-30, 1e30)


@dataclass(frozen=True, slots=True, eq=False)
class SlotParams:
    """Features that are off hold the value that changes nothing, so every step reads one field.

    temperature: 0 (greedy) or >= 0.01. top_k: 0 (off) or 1..vocab_size-1.
    random_stream: the state of the request's random numbers (see random.py).
    stop_ids: int64 ids barred until the output has min_tokens tokens.
    bias_ids, bias_values: int64 [n] and float32 [n].
    num_logprobs: alternatives wanted beside the sampled token, or None. logprob_ids: which ones; empty for the most
    likely ones.
    lists: what may not be drawn, or None. processors: the caller's functions of the logits.
    is_masked: the step's plan may say which tokens may be drawn.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    random_stream: int
    num_prompt_tokens: int
    min_tokens: int
    stop_ids: Ids
    bias_ids: Ids
    bias_values: NDArray[np.float32]
    num_logprobs: int | None
    is_masked: bool
    logprob_ids: tuple[int, ...] = ()
    lists: TokenLists | None = None
    processors: tuple[Any, ...] = ()

    @property
    def is_penalized(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def is_listed(self) -> bool:
        return self.lists is not None or bool(self.processors)

    def bars_stops(self, position: int) -> bool:
        """Whether the token at `position` of the sequence may not be one that ends it."""
        return position - self.num_prompt_tokens < self.min_tokens and self.stop_ids.size > 0


def slot_params(
    sampling: SamplingParams, eos_token_ids: tuple[int, ...], num_prompt_tokens: int, vocab_size: int
) -> SlotParams:
    """Ids outside the vocabulary are dropped: they cannot be drawn. Raises ValueError without a seed."""
    if sampling.seed is None:
        raise ValueError("seed=None cannot be sampled with; allowed: an int64, set by the front end")
    stop_ids = sorted({i for i in (*eos_token_ids, *(sampling.stop_token_ids or ())) if i < vocab_size})
    bias = {i: value for i, value in (sampling.logit_bias or {}).items() if i < vocab_size}
    return SlotParams(
        temperature=0.0 if sampling.is_greedy else max(sampling.temperature, MIN_TEMPERATURE),
        top_p=sampling.top_p,
        top_k=sampling.top_k if 0 < sampling.top_k < vocab_size else 0,
        min_p=sampling.min_p,
        repetition_penalty=min(max(sampling.repetition_penalty, _PENALTY_RANGE[0]), _PENALTY_RANGE[1]),
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        random_stream=stream_of(sampling.seed),
        num_prompt_tokens=num_prompt_tokens,
        min_tokens=0 if sampling.structured_outputs is not None else sampling.min_tokens,  # the masks see to it
        stop_ids=np.array(stop_ids, dtype=np.int64),
        bias_ids=np.array(list(bias), dtype=np.int64),
        bias_values=np.array(list(bias.values()), dtype=np.float32),
        num_logprobs=sampling.logprobs,
        is_masked=sampling.structured_outputs is not None or sampling.thinking_token_budget is not None,
        logprob_ids=tuple(sampling.logprob_token_ids or ()),
        lists=token_lists(sampling, vocab_size),
        processors=tuple(sampling.logits_processors or ()),
    )
