"""What the engine tells its clients: tokens, ends, and statistics."""

from __future__ import annotations

from typing import Literal

import msgspec

from octavo.protocol.plan import TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request. Exactly one output of a request has a finish_reason, its last.

    finish_reason: "repetition" by sampling.repetition_detection.
    stop_reason: the stop token id that ended the output; None for an end-of-sequence id.
    error: set with finish_reason "error", in words for the client. refused: it is the request's own fault.
    num_cached_tokens: prompt tokens found in the prefix cache when first scheduled.
    scheduled_time: when the request first ran, seconds on the monotonic clock; 0 if it never did.
    embedding: of a request with pooling, in its last output (protocol.pooling.floats).
    """

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    scheduled_time: float = 0.0
    embedding: bytes | None = None
    refused: bool = False


class SchedulerStats(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot. `*_total` count from the start of the engine."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0  # allocatable ones: the null block does not count
    num_free_blocks: int = 0  # free or only held by the prefix cache
    num_kv_tokens: int = 0  # KV entries computed for running sequences, shared blocks counted once per owner
    num_kv_slots: int = 0  # KV entries allocated to them
    prefix_cache_queries_total: int = 0  # tokens
    prefix_cache_hits_total: int = 0  # tokens
    num_preemptions_total: int = 0
    prompt_tokens_total: int = 0  # prompt tokens of requests that reached their first token, cached ones included
    generation_tokens_total: int = 0
    num_steps_total: int = 0
    running_adapters: tuple[str, ...] = ()  # names, of running sequences
    waiting_adapters: tuple[str, ...] = ()
    num_adapter_loads_total: int = 0  # times that one was brought to the device
    num_drafts_total: int = 0  # rows that verified guesses (speculative decoding)
    num_draft_tokens_total: int = 0  # guesses
    num_accepted_tokens_total: int = 0  # of these, those that came true
    num_accepted_by_position_total: tuple[int, ...] = ()  # the same by place in the row; none without speculation
    # Of decode steps that verified or made guesses, as far as steps without are known: seconds, and those that their
    # tokens would have taken without.
    guessing_seconds_total: float = 0.0
    plain_seconds_total: float = 0.0
