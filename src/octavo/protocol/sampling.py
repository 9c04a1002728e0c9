"""SamplingParams: what a caller wishes of one generation. Immutable; it validates itself."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from octavo.protocol import checks
from octavo.protocol.fields import COMPLETIONS, fields_of
from octavo.protocol.ranges import INT64_MAX
from octavo.protocol.repetition import RepetitionDetectionParams
from octavo.protocol.structured import GuidedDecodingParams, StructuredOutputsParams

_log = logging.getLogger(__name__)

# Temperatures in (0, 0.01) are raised to it: dividing float32 logits by less overflows.
MIN_TEMPERATURE = 0.01


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen and when they end.

    n: how many completions, 1..128.
    temperature: 0..2; 0 is greedy. Values in (0, 0.01) count as 0.01.
    top_p: (0, 1]; top_k: 0 or -1 for off, else >= 1; min_p: 0..1, relative to the largest probability.
    presence_penalty, frequency_penalty: -2..2, over the output tokens.
    repetition_penalty: > 0, over prompt and output tokens (Keskar et al. 2019, CTRL).
    seed: the same seed gives the same tokens, alone or in any batch, up to near ties; -1 counts as None.
    max_tokens: >= 1, or None for as many as the context holds; min_tokens: 0..max_tokens.
    stop: strings that end the text and are not part of it, unless include_stop_str_in_output.
    stop_token_ids: ids that end the output besides the model's end-of-sequence ids.
    logprobs, prompt_logprobs: 0..20 alternatives a token, beside the token itself, from the
    raw (unprocessed) distribution; None for off.
    logprob_token_ids: 1..128 distinct ids whose logprobs are given at each position, beside the token itself, in place
    of the most likely ones; logprobs is then their number, or None. Of LLM only.
    logit_bias: token id -> -100..100, added to the logits.
    best_of: n..128, how many completions to make, of which the n of the highest cumulative log-probability are
    returned; None for n.
    truncate_prompt_tokens: keep only so many of the prompt's last tokens; -1 for as many as the context holds beside
    max_tokens, or beside 16 where that is None.
    bad_words: strings that the output may not hold, as the tokens that spell them, with and without a space before.
    A front end turns them into bad_words_token_ids: an output may not hold any of these sequences.
    allowed_token_ids: the only ids that may be drawn.
    spaces_between_special_tokens: False drops the spaces that begin a special token right after another.
    logits_processors: called in turn before all else, with (output ids, logits) or (prompt ids, output ids, logits);
    logits is float32 [V], and so is what is returned. Only in the process of the engine.
    use_beam_search: search, instead of drawing, for the n best of best_of beams, at temperature 0;
    length_penalty, early_stopping: see BeamSearchParams.
    repetition_detection: see RepetitionDetectionParams; it looks at the output once min_tokens are there.
    skip_reading_prefix_cache: compute the whole prompt, whatever the prefix cache holds of it; None for where
    prompt_logprobs need that, which they always do. Of LLM only.
    thinking_token_budget: the most tokens of reasoning; where it is then still open, its end is forced. None or -1 for
    any number. It needs a reasoning parser, whose marks say what is reasoning.
    structured_outputs: what shape the text must have, after the reasoning. min_tokens and ignore_eos then count as far
    as that shape lets the text go on. guided_decoding: its old name; it becomes structured_outputs.
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
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    best_of: int | None = None
    truncate_prompt_tokens: int | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    allowed_token_ids: list[int] | None = None
    spaces_between_special_tokens: bool = True
    logits_processors: list[Any] | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_detection: RepetitionDetectionParams | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    guided_decoding: GuidedDecodingParams | None = None

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(value := getattr(self, name), bool):  # True is another spelling of 1
                msgspec.structs.force_setattr(self, name, 1 if value else None)
        self._check_structured_outputs()
        for name, value, default in zip(self.__struct_fields__, msgspec.structs.astuple(self), _DEFAULTS.values()):
            if value is default or (value is None and name == "max_tokens"):
                continue
            if name != "logprobs" or self.logprob_token_ids is None:
                _ROWS[name].range.check(name, value)
        if self.thinking_token_budget == -1:
            msgspec.structs.force_setattr(self, "thinking_token_budget", None)
        self._check_together()
        self._check_beams()

    def _check_together(self) -> None:
        """What depends on more than one field, or is of a type of its own."""
        self._check_logprobs()
        if not isinstance(self.repetition_detection, (RepetitionDetectionParams, type(None))):
            wrong = self.repetition_detection
            raise ValueError(f"repetition_detection={wrong!r} is not allowed; allowed: RepetitionDetectionParams")
        if self.thinking_token_budget is not None and self.allowed_token_ids is not None:
            raise ValueError(
                f"thinking_token_budget={self.thinking_token_budget} is refused with allowed_token_ids, which may lack "
                "the mark that it forces; allowed: None"
            )
        if self.best_of is not None:
            checks.integer("best_of", self.best_of, self.n, COMPLETIONS.high)
        if self.max_tokens is not None:
            checks.integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.stop and not self.detokenize:
            raise ValueError("stop needs detokenize=True: stop strings are looked for in the text")
        for processor in self.logits_processors or ():
            if not callable(processor):
                raise ValueError(f"logits_processors has {processor!r}; allowed: callables")
        if self.temperature == 0 and not self.use_beam_search:
            for name, count in (("n", self.n), ("best_of", self.best_of or 1)):
                if count > 1:
                    raise ValueError(f"{name}={count} needs temperature > 0: greedy completions are all the same")

    def _check_logprobs(self) -> None:
        ids = self.logprob_token_ids
        if ids is not None:
            if len(set(ids)) != len(ids):
                raise ValueError("logprob_token_ids has an id twice; allowed: distinct ids")
            if self.logprobs not in (None, len(ids)):
                allowed = f"{len(ids)}, None"
                raise ValueError(f"logprobs={self.logprobs!r} is refused with logprob_token_ids; allowed: {allowed}")
            msgspec.structs.force_setattr(self, "logprobs", len(ids))
        if self.skip_reading_prefix_cache is False and self.prompt_logprobs is not None:
            raise ValueError("skip_reading_prefix_cache=False is refused with prompt_logprobs; allowed: True, None")

    def _check_beams(self) -> None:
        if not self.use_beam_search:
            for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(f"{name}={value!r} needs use_beam_search=True; allowed without: {default}")
            return
        if self.temperature != 0:
            shown = checks.shown(self.temperature)
            raise ValueError(f"temperature={shown} is refused with use_beam_search; allowed: 0")
        for name in self.__struct_fields__:
            value, default = getattr(self, name), _DEFAULTS[name]
            if name not in _WITH_BEAMS and value not in (default, None, []):
                raise ValueError(f"{name}={value!r} is refused with use_beam_search; allowed: {default!r}")

    @property
    def num_completions(self) -> int:
        """How many are made, of which n are returned."""
        return self.best_of or self.n

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

    @property
    def has_fixed_length(self) -> bool:
        """Whether the output has max_tokens tokens, or as many as the context holds, whatever they are."""
        if self.structured_outputs:
            return False  # its shape may end it, whatever min_tokens and ignore_eos say
        if self.min_tokens == self.max_tokens:
            # Nothing that may end it counts before. But what these leave may be no more than what min_tokens bars: then
            # it fails.
            lists = self.allowed_token_ids or self.bad_words or self.bad_words_token_ids
            return not (lists or self.logits_processors or self.thinking_token_budget is not None)
        return self.ignore_eos and not (self.stop or self.stop_token_ids or self.repetition_detection)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have: raises ValueError with the range."""
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", self.logit_bias),
            ("allowed_token_ids", self.allowed_token_ids),
            ("logprob_token_ids", self.logprob_token_ids),
            *(("bad_words_token_ids", ids) for ids in self.bad_words_token_ids or ()),
        ):
            checks.token_ids(name, ids or (), vocab_size - 1)

    def truncated(self, token_ids: list[int], max_model_len: int) -> list[int]:
        """The part of a prompt that truncate_prompt_tokens keeps: its end."""
        if self.truncate_prompt_tokens is None:
            return token_ids
        if self.truncate_prompt_tokens == -1:
            return token_ids[-max(1, max_model_len - (self.max_tokens or _DEFAULTS["max_tokens"])) :]
        return token_ids[-self.truncate_prompt_tokens :]

    def completions(self, fresh_seed: Callable[[], int]) -> list[SamplingParams]:
        """One for each of the best_of, else n, completions, with n=1 and a seed of its own: the given seed plus
        the completion's index, else a fresh one. Where the best are to be chosen, each has its log-probabilities."""
        logprobs = 0 if self.logprobs is None and self.num_completions > self.n else self.logprobs
        if self.seed is None or self.seed == -1:
            seeds = [fresh_seed() for _ in range(self.num_completions)]
        else:
            seeds = [_wrapped(self.seed + index) for index in range(self.num_completions)]
        return [self.replace(n=1, best_of=None, logprobs=logprobs, seed=seed) for seed in seeds]

    @property
    def depends_on_output(self) -> bool:
        """Whether what may come, or how likely it is, depends on how much output there is, or on what it says."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.min_tokens or self.bad_words_token_ids or self.logits_processors)

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated again."""
        return msgspec.structs.replace(self, **changes)


# What shapes an answer, not the choice of its tokens: this goes together with beams.
_WITH_BEAMS = frozenset(
    {"n", "best_of", "temperature", "max_tokens", "ignore_eos", "detokenize", "truncate_prompt_tokens", "seed"}
    | {"include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"}
    | {"use_beam_search", "length_penalty", "early_stopping"}
)
_DEFAULTS = dict(zip(SamplingParams.__struct_fields__, SamplingParams.__struct_defaults__))
_ROWS = fields_of("SamplingParams")


@functools.cache
def _warn_of_old_name() -> None:
    """Once a process."""
    _log.warning("SamplingParams(guided_decoding=GuidedDecodingParams(...)) is now structured_outputs")


def _wrapped(seed: int) -> int:
    """`seed` as an int64. -1 would mean "no seed", so it becomes another."""
    seed = (seed + 2**63) % 2**64 - 2**63
    return INT64_MAX if seed == -1 else seed


def sampling_from(values: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from untyped values (a request body). Raises ValueError naming the field."""
    known = set(SamplingParams.__struct_fields__)
    for name in values:
        if name not in known:
            raise ValueError(f"{name!r} is not a sampling parameter; known: {', '.join(sorted(known))}")
    return SamplingParams(**values)


def generation_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a model's generation_config.json asks for, where a request gives none.

    Raises ValueError for a value that no request could have.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if generation_config.get("max_new_tokens") is not None:
        found["max_tokens"] = generation_config["max_new_tokens"]
    try:
        sampling_from(found)
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from None
    return found
