"""What `LLM` returns: the shapes that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One candidate at one position. rank: 1 for the most likely token of the vocabulary."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion.

    finish_reason: "stop", "length", "abort", "error" or "repetition".
    stop_reason: the stop string or stop token id that ended it; None for end of sequence or another reason.
    logprobs: for each token, candidates by token id; None unless asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class EmbeddingOutput:
    """embedding: hidden_size numbers, of length 1."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """One prompt with its embedding."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class RequestOutput:
    """One prompt with its completions, in order of their index.

    prompt_logprobs: one entry a prompt token, the first None; None unless asked for.
    num_cached_tokens: prompt tokens that the prefix cache held.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class BeamSearchSequence:
    """One output of a beam search.

    tokens: prompt and output; an end-of-sequence token only under include_stop_str_in_output. text: of tokens.
    logprobs: one entry a token of the output. cum_logprob: their sum. score: what outputs are ranked by.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float
    score: float
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """What beam search found for one prompt, the best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)
