"""What one request may cost: a bound on the product of the fields that multiply each other."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.protocol.sampling import SamplingParams
from octavo.server.openai.errors import invalid


class RequestCost:
    """Adds up what the prompts of one request ask for, in tokens and log-probabilities."""

    def __init__(self, limit: int) -> None:
        """limit: ServerOptions.max_request_cost."""
        self._limit = limit
        self._output = 0  # written by `add` only, as is the next
        self._prompt = 0

    def add(self, num_prompt_tokens: int, params: SamplingParams, names: Mapping[str, str]) -> None:
        """One prompt, whose max_tokens is resolved. names: of SamplingParams' fields and "prompt", in the body.

        Raises APIError 400 that names the largest factor where the request is now above the limit.
        """
        assert params.max_tokens is not None
        factors = {
            "best_of" if params.best_of is not None else "n": params.num_completions,
            "max_tokens": params.max_tokens,
            "logprobs": 1 + (params.logprobs or 0),
        }
        self._output += params.num_completions * params.max_tokens * factors["logprobs"]
        if self._output > self._limit:
            field = max(factors, key=lambda name: factors[name])
            value: object = params.logprobs if field == "logprobs" else factors[field]
            self._refuse(names.get(field, field), value, "completions x max_tokens x (1 + logprobs)", self._output)
        self._prompt += num_prompt_tokens * (1 + (params.prompt_logprobs or 0))
        if self._prompt > self._limit:
            field = "prompt_logprobs" if params.prompt_logprobs else names["prompt"]
            value = params.prompt_logprobs or f"{num_prompt_tokens} tokens"
            self._refuse(field, value, "prompt tokens x (1 + prompt_logprobs)", self._prompt)

    def _refuse(self, field: str, value: object, product: str, cost: int) -> None:
        message = (
            f"{field}={value} makes the request cost {cost} ({product}, over all prompts); allowed by "
            f"--max-request-cost: 1..{self._limit}"
        )
        raise invalid(message, field, "request_too_costly")
