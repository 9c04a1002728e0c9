"""SpeculationConfig: how guesses at tokens to come are made (speculative decoding)."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

SpeculationMethod = Literal["ngram", "suffix", "draft_model", "eagle", "eagle3"]
METHODS: tuple[SpeculationMethod, ...] = get_args(SpeculationMethod)
DraftQuantization = Literal["fp8"]
DraftSampleMethod = Literal["greedy", "probabilistic"]
LOOKUPS = frozenset(("ngram", "suffix"))  # which guess from text that is there, without a model

# Fields that mean something to these methods alone.
_ONLY_OF: dict[str, frozenset[str]] = {
    "model": frozenset(METHODS) - LOOKUPS,
    "revision": frozenset(METHODS) - LOOKUPS,
    "quantization": frozenset(("draft_model",)),
    "draft_sample_method": frozenset(("draft_model",)),
    "prompt_lookup_min": LOOKUPS,
    "prompt_lookup_max": LOOKUPS,
    "suffix_cached_tokens": frozenset(("suffix",)),
}

_CHOICES = {"quantization": get_args(DraftQuantization), "draft_sample_method": get_args(DraftSampleMethod)}

_RANGES = {
    "num_speculative_tokens": (1, 32),
    "prompt_lookup_min": (1, 16),
    "prompt_lookup_max": (1, 16),
    "suffix_cached_tokens": (1, 2**24),
    "synthetic_acceptance": (0, 1),
}


class SpeculationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `speculative_config` may say.

    method: ngram: what came after the last tokens where they stood before, in prompt or output; suffix: the same, in
    past outputs of other requests too; draft_model: a smaller model of the same tokens; eagle, eagle3: a head on the
    model's own states. model: of the last three: a folder or hub id; revision: of a hub id. num_speculative_tokens:
    guesses a step, at most. adaptive: fewer where that is faster. prompt_lookup_min, prompt_lookup_max: tokens that
    must agree, and are compared at most. suffix_cached_tokens: tokens of past outputs that are kept. quantization: of
    draft_model, fp8: weights in FP8, quantized while they are loaded; guesses change, and outputs do not.
    draft_sample_method: of draft_model on a GPU: greedy, what it holds likeliest; probabilistic, what it draws at the
    request's temperature with the random number of the model's own draw.
    synthetic_acceptance: for measurements on a GPU: each guess is taken with this probability, whatever it is; outputs
    then mean nothing.
    """

    method: SpeculationMethod
    model: str | None = None
    num_speculative_tokens: int = 5
    adaptive: bool = True
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    suffix_cached_tokens: int = 65536
    revision: str | None = None
    quantization: DraftQuantization | None = None
    draft_sample_method: DraftSampleMethod = "greedy"
    synthetic_acceptance: float | None = None


def speculation_config(
    text: str | None, model: str | None = None, num_speculative_tokens: int | None = None
) -> SpeculationConfig | None:
    """The configuration that the options speculative_config (JSON), speculative_model and num_speculative_tokens stand
    for; None without any. Raises ValueError naming the option or field, its value and what is allowed."""
    if text is None:
        if model is None and num_speculative_tokens is None:
            return None
        values: dict[str, object] = {}
    else:
        values = _object(text)
    for name, field, given in (
        ("speculative_model", "model", model),
        ("num_speculative_tokens", "num_speculative_tokens", num_speculative_tokens),
    ):
        if given is not None and values.setdefault(field, given) != given:
            raise ValueError(f"{name}={given!r} and speculative_config's {field}={values[field]!r} disagree")
    if values.get("model") in ("[ngram]", "ngram"):
        del values["model"]
        values.setdefault("method", "ngram")
    if "model" in values:
        values.setdefault("method", "draft_model")
    return _checked(values)


def _object(text: str) -> dict[str, object]:
    try:
        values = msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise ValueError(f"speculative_config={text[:80]!r} is not a JSON object: {error}") from None
    known = SpeculationConfig.__struct_fields__
    for name in values:
        if name not in known:
            raise ValueError(f"speculative_config: {name} is not supported; allowed: {', '.join(known)}")
    return values


def _checked(values: dict[str, object]) -> SpeculationConfig:
    if values.get("method") not in METHODS:
        said = f"method={values['method']!r} is not known" if "method" in values else "has no method and no model"
        raise ValueError(f"speculative_config: {said}; allowed: {', '.join(METHODS)}")
    for name, allowed in _CHOICES.items():
        given = values.get(name)
        if given is not None and given not in allowed:
            raise ValueError(f"speculative_config: {name}={given!r} is not supported; allowed: {', '.join(allowed)}")
    try:
        config = msgspec.convert(values, SpeculationConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"speculative_config: {error}") from None
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"speculative_config: {name}={value} is out of range; allowed: {low}..{high}")
    if config.prompt_lookup_min > config.prompt_lookup_max:
        raise ValueError(
            f"speculative_config: prompt_lookup_min={config.prompt_lookup_min} is out of range; allowed: "
            f"1..{config.prompt_lookup_max}, prompt_lookup_max"
        )
    needs_model = config.method not in LOOKUPS
    if needs_model and config.model is None:
        raise ValueError(f"speculative_config: method={config.method} needs a model: a folder or a hub id")
    for name, methods in _ONLY_OF.items():
        if values.get(name) is not None and config.method not in methods:
            raise ValueError(f"speculative_config: {name}={values[name]!r} has no use in {config.method}")
    return config
