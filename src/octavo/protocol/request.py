"""Request: one generation asked of the engine."""

from __future__ import annotations

import msgspec

from octavo.protocol.lora import LoRARequest
from octavo.protocol.pooling import PoolingParams
from octavo.protocol.reasoning import ReasoningMarks
from octavo.protocol.sampling import SamplingParams


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. The front end fans `n` completions out into `n` requests, so
    `sampling.n` is 1 here and `sampling.seed` is already the completion's own.

    request_id: unique among unfinished requests.
    eos_token_ids: ids that end the output (kept in it), unless sampling.ignore_eos.
    arrival_time: seconds on the monotonic clock.
    priority: lower runs earlier; only under the "priority" policy.
    cache_salt: prefix-cache blocks are shared only between requests of equal salt.
    reasoning: the marks to look for, where a grammar follows the reasoning or sampling.thinking_token_budget bounds it.
    grammar: what sampling.structured_outputs was compiled to by the front end; the text is llguidance's.
    lora: the adapter that the model runs with; None: the model as it is.
    max_tokens: >= 1, resolved: prompt + max_tokens <= max_model_len.
    patient: it has max_tokens tokens in any case, and only the end of all requests like it is waited for, so that its
    prompt may be computed later than it could be.
    pooling: the prompt's embedding is asked for, along with one token that means nothing; max_tokens is 1.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    arrival_time: float = 0.0
    priority: int = 0
    cache_salt: str | None = None
    grammar: str | None = None
    reasoning: ReasoningMarks | None = None
    pooling: PoolingParams | None = None
    lora: LoRARequest | None = None
    patient: bool = False
