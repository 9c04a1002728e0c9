"""SamplingParams: what a caller wishes of one generation. Immutable; it validates itself."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from octavo.protocol.structured import GuidedDecodingParams, StructuredOutputsParams

_log = logging.getLogger(__name__)

MAX_N = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_TOKEN_IDS = 128
INT64_MAX = 2**63 - 1

# Temperatures in (0, 0.01) are raised to it: dividing float32 logits by less overflows.
MIN_TEMPERATURE = 0.01


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen and when they end.

    n: how many completions, 1..128.
    temperature: 0..2; 0 is greedy. Values in (0, 0.01) count as 0.01.
    top_p: (0, 1]; top_k: 0 or -1 for off, else >= 1; min_p: 0..1, relative to the largest probability.
    presence_penalty, frequency_penalty: -2..2, over the output tokens.
    repetition_penalty: > 0, over prompt and output tokens (Keskar et al. 2019, CTRL).
    seed: the same seed gives the same tokens, alone or in any batch; -1 counts as None.
    max_tokens: >= 1, or None for as many as the context holds; min_tokens: 0..max_tokens.
    stop: strings that end the text and are not part of it, unless include_stop_str_in_output.
    stop_token_ids: ids that end the output besides the model's end-of-sequence ids.
    logprobs, prompt_logprobs: 0..20 alternatives a token, beside the token itself, from the
    raw (unprocessed) distribution; None for off.
    logit_bias: token id -> -100..100, added to the logits.
    structured_outputs: what shape the text must have. min_tokens and ignore_eos then count as far as that shape lets
    the text go on. guided_decoding: its old name; it becomes structured_outputs.
    Raises ValueError naming the field, the value and the allowed range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    guided_decoding: GuidedDecodingParams | None = None

    def __post_init__(self) -> None:
        self._check_structured_outputs()
        self._check_numbers()
        self._check_stops()
        self._check_logit_bias()
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n={self.n} needs temperature > 0: greedy completions are all the same")

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _real("temperature", self.temperature, 0.0, 2.0)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, -1, INT64_MAX)
        _real("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), INT64_MAX)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, INT64_MAX)
        _integer("min_tokens", self.min_tokens, 0, INT64_MAX if self.max_tokens is None else self.max_tokens)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _integer(name, value, 0, MAX_LOGPROBS)

    def _check_stops(self) -> None:
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            raise ValueError(f"stop has {len(stops)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for text in stops:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={text!r} is not allowed: each must be a non-empty string")
        if stops and not self.detokenize:
            raise ValueError("stop needs detokenize=True: stop strings are looked for in the text")
        ids = self.stop_token_ids or ()
        if len(ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"stop_token_ids has {len(ids)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed")
        for token_id in ids:
            _integer("stop_token_ids", token_id, 0, 2**31 - 1)

    def _check_logit_bias(self) -> None:
        bias = self.logit_bias
        if bias is None:
            return
        if len(bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS} are allowed")
        for token_id, value in bias.items():
            _integer("logit_bias", token_id, 0, 2**31 - 1)
            _real(f"logit_bias[{token_id}]", value, -100.0, 100.0)

    def _check_structured_outputs(self) -> None:
        old = self.guided_decoding
        if old is not None:
            if not isinstance(old, StructuredOutputsParams):
                raise ValueError(f"guided_decoding={old!r} is not allowed; allowed: GuidedDecodingParams")
            if self.structured_outputs is not None:
                raise ValueError("guided_decoding is the old name of structured_outputs; allowed: one of them")
            _warn_of_old_name()
            new = old.renamed() if isinstance(old, GuidedDecodingParams) else old
            msgspec.structs.force_setattr(self, "structured_outputs", new)
            msgspec.structs.force_setattr(self, "guided_decoding", None)
        elif not isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))):
            raise ValueError(
                f"structured_outputs={self.structured_outputs!r} is not allowed; allowed: StructuredOutputsParams"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, empty when there are none."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have: raises ValueError with the range."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in ids or ():
                _integer(name, token_id, 0, vocab_size - 1)

    def completions(self, fresh_seed: Callable[[], int]) -> list[SamplingParams]:
        """One for each of the n completions, with n=1 and a seed of its own: the given seed plus the
        completion's index, else a fresh one."""
        if self.seed is None or self.seed == -1:
            return [self.replace(n=1, seed=fresh_seed()) for _ in range(self.n)]
        return [self.replace(n=1, seed=_wrapped(self.seed + index)) for index in range(self.n)]

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated again."""
        return msgspec.structs.replace(self, **changes)


@functools.cache
def _warn_of_old_name() -> None:
    """Once a process."""
    _log.warning("SamplingParams(guided_decoding=GuidedDecodingParams(...)) is now structured_outputs")


def _wrapped(seed: int) -> int:
    """`seed` as an int64. -1 would mean "no seed", so it becomes another."""
    seed = (seed + 2**63) % 2**64 - 2**63
    return INT64_MAX if seed == -1 else seed


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not an integer; allowed: {low}..{high}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is out of range; allowed: {low}..{high}")


def _real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    bracket = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not a finite number; allowed: {bracket}")
    if not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name}={value:g} is out of range; allowed: {bracket}")


def sampling_from(values: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from untyped values (a request body). Raises ValueError naming the field."""
    known = set(SamplingParams.__struct_fields__)
    for name in values:
        if name not in known:
            raise ValueError(f"{name!r} is not a sampling parameter; known: {', '.join(sorted(known))}")
    return SamplingParams(**values)


def generation_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a model's generation_config.json asks for, where a request gives none."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if generation_config.get("max_new_tokens") is not None:
        found["max_tokens"] = generation_config["max_new_tokens"]
    return found
