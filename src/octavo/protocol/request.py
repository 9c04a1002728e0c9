"""Request: one generation asked of the engine."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from octavo.protocol.sampling import SamplingParams


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. The front end fans `n` completions out into `n` requests, so
    `sampling.n` is 1 here and `sampling.seed` is already the completion's own.

    request_id: unique among unfinished requests.
    eos_token_ids: ids that end the output (kept in it), unless sampling.ignore_eos.
    arrival_time: seconds on the monotonic clock.
    priority: lower runs earlier; only under the "priority" policy.
    cache_salt: prefix-cache blocks are shared only between requests of equal salt.
    max_tokens: >= 1, resolved: prompt + max_tokens <= max_model_len.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    arrival_time: float = 0.0
    priority: int = 0
    cache_salt: str | None = None


def fan_out(request: Request, n: int, fresh_seed: Callable[[], int]) -> list[Request]:
    """The `n` engine requests behind one of the caller's, ids `ID-0` .. `ID-(n-1)`.

    Completion i of a seeded request draws with seed + i; without a seed each draws with a fresh one.
    """
    seed = request.sampling.seed
    return [
        msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}-{i}",
            sampling=request.sampling.replace(n=1, seed=fresh_seed() if seed in (None, -1) else (seed + i) % 2**63),
        )
        for i in range(n)
    ]


def resolve_max_tokens(sampling: SamplingParams, num_prompt_tokens: int, max_model_len: int) -> int:
    """Output tokens the request may have. Raises ValueError when prompt and output cannot fit the context."""
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ValueError(
            f"the prompt has {num_prompt_tokens} tokens; allowed: at most {max_model_len - 1}, "
            f"so that one more fits max_model_len={max_model_len}"
        )
    if sampling.max_tokens is None:
        return room
    if sampling.max_tokens > room:
        raise ValueError(
            f"max_tokens={sampling.max_tokens} is out of range; allowed: 1..{room}, "
            f"for the prompt has {num_prompt_tokens} tokens and max_model_len={max_model_len}"
        )
    return sampling.max_tokens
