"""SamplingParams: what is refused, in which words, and the spellings that mean the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from octavo.protocol.repetition import RepetitionDetectionParams
from octavo.protocol.sampling import SamplingParams, sampling_from
from octavo.protocol.structured import StructuredOutputsParams

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 3, "best_of": 2}, r"best_of=2 is out of range; allowed: 3\.\.128"),
    ({"best_of": 129}, r"best_of=129 is out of range; allowed: 1\.\.128"),
    ({"best_of": 2, "temperature": 0}, "best_of=2 needs temperature > 0"),
    ({"n": 2, "temperature": 0}, "n=2 needs temperature > 0"),
    ({"truncate_prompt_tokens": 0}, r"truncate_prompt_tokens=0 is out of range; allowed: -1\.\..* except 0"),
    ({"truncate_prompt_tokens": -2}, r"truncate_prompt_tokens=-2 is out of range; allowed: -1\.\."),
    ({"allowed_token_ids": []}, "allowed_token_ids has 0 token ids; allowed: 1 or more"),
    ({"allowed_token_ids": [1, -1]}, "allowed_token_ids=-1 is out of range"),
    ({"allowed_token_ids": [1, True]}, "allowed_token_ids=True is not an integer"),
    ({"bad_words": ["a", ""]}, r"bad_words\[1\]='' is out of range; allowed: 1\.\.128 characters"),
    ({"bad_words": ["  "]}, r"bad_words\[0\]='  ' is out of range; allowed: .* not all of them spaces"),
    ({"bad_words": ["x" * 129]}, r"bad_words\[0\]='xxx.*\(129 characters\) is out of range"),
    ({"bad_words": [5]}, r"bad_words\[0\]='5' is not a string"),
    ({"bad_words": ["x"] * 129}, r"bad_words has 129 items; allowed: 0\.\.128"),
    ({"bad_words_token_ids": [[]]}, r"bad_words_token_ids\[0\] has 0 token ids; allowed: 1 or more"),
    ({"logits_processors": ["x"]}, "logits_processors has 'x'; allowed: callables"),
    ({"logprobs": -1}, r"logprobs=-1 is out of range; allowed: 0\.\.20"),
    ({"top_k": -2}, r"top_k=-2 is out of range; allowed: -1\.\."),
    ({"logprob_token_ids": []}, r"logprob_token_ids has 0 token ids; allowed: 1\.\.128"),
    ({"logprob_token_ids": list(range(129))}, r"logprob_token_ids has 129 token ids; allowed: 1\.\.128"),
    ({"logprob_token_ids": [4, 4]}, "logprob_token_ids has an id twice"),
    ({"logprob_token_ids": [-4]}, "logprob_token_ids=-4 is out of range"),
    ({"logprob_token_ids": [4], "logprobs": 2}, "logprobs=2 is refused with logprob_token_ids; allowed: 1, None"),
    ({"repetition_detection": {"min_count": 2}}, "repetition_detection={'min_count': 2} is not allowed; allowed: Rep"),
    ({"skip_reading_prefix_cache": 1}, "skip_reading_prefix_cache=1 is not a boolean; allowed: true, false"),
    ({"skip_reading_prefix_cache": False, "prompt_logprobs": 1}, "skip_reading_prefix_cache=False is refused with"),
    ({"length_penalty": 2.0}, "length_penalty=2.0 needs use_beam_search=True; allowed without: 1.0"),
    ({"early_stopping": True}, "early_stopping=True needs use_beam_search=True"),
    ({"use_beam_search": True}, "temperature=1 is refused with use_beam_search; allowed: 0"),
    ({"use_beam_search": True, "temperature": 0, "top_p": 0.5}, "top_p=0.5 is refused with use_beam_search"),
    ({"use_beam_search": True, "temperature": 0, "stop": ["x"]}, r"stop=\['x'\] is refused with use_beam_search"),
    ({"use_beam_search": True, "temperature": 0, "logprobs": 1}, "logprobs=1 is refused with use_beam_search"),
    ({"use_beam_search": True, "temperature": 0, "early_stopping": "x"}, "early_stopping='x' is not known"),
    ({"use_beam_search": True, "temperature": 0, "length_penalty": 11}, r"length_penalty=11 is out of range"),
]


@pytest.mark.parametrize(("wish", "message"), REFUSED, ids=[str(wish)[:50] for wish, _ in REFUSED])
def test_what_is_out_of_range_is_named_with_its_range(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(**wish)


def test_spellings_that_mean_the_same() -> None:
    assert SamplingParams(logprobs=True, prompt_logprobs=True) == SamplingParams(logprobs=1, prompt_logprobs=1)
    assert SamplingParams(logprobs=False).logprobs is None
    seeds = [SamplingParams(seed=seed).completions(lambda: 42)[0].seed for seed in (None, -1, 7)]
    assert seeds == [42, 42, 7]
    assert SamplingParams(stop="x").stop_strings == SamplingParams(stop=["x"]).stop_strings
    SamplingParams(top_k=-1, use_beam_search=False, length_penalty=1, early_stopping=False, best_of=1)


def test_completions_of_best_of_have_log_probabilities_to_be_ranked_by() -> None:
    own = SamplingParams(n=2, best_of=4, seed=10).completions(lambda: 0)
    assert [(p.n, p.best_of, p.seed, p.logprobs) for p in own] == [(1, None, seed, 0) for seed in (10, 11, 12, 13)]
    assert [p.logprobs for p in SamplingParams(n=2, best_of=3, logprobs=5).completions(lambda: 1)] == [5, 5, 5]
    assert [p.logprobs for p in SamplingParams(n=2, best_of=2).completions(lambda: 1)] == [None, None]


def test_truncation_keeps_the_end_of_a_prompt() -> None:
    ids = list(range(20))
    assert SamplingParams().truncated(ids, 10) == ids
    assert SamplingParams(truncate_prompt_tokens=3).truncated(ids, 10) == [17, 18, 19]
    assert SamplingParams(truncate_prompt_tokens=30).truncated(ids, 10) == ids
    assert SamplingParams(truncate_prompt_tokens=-1, max_tokens=4).truncated(ids, 10) == ids[-6:]
    assert SamplingParams(truncate_prompt_tokens=-1, max_tokens=None).truncated(ids, 20) == ids[-4:]
    assert SamplingParams(truncate_prompt_tokens=-1, max_tokens=50).truncated(ids, 10) == ids[-1:]


def test_all_but_functions_crosses_the_wire() -> None:
    params = SamplingParams(
        repetition_detection=RepetitionDetectionParams(max_pattern_size=3, min_count=2),
        logprob_token_ids=[7, 9],
        bad_words_token_ids=[[1, 2]],
        allowed_token_ids=[3],
        best_of=2,
        truncate_prompt_tokens=-1,
        bad_words=["x"],
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize("name", ["temprature", "extra_args", "flat_logprobs", "output_kind"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not a sampling parameter; known: "):
        sampling_from({name: 1})
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: 1})


REPETITION = RepetitionDetectionParams(max_pattern_size=4, min_count=2)


@pytest.mark.parametrize(
    ("fields", "fixed"),
    [
        ({}, False),
        ({"ignore_eos": True}, True),
        ({"ignore_eos": True, "stop": []}, True),
        ({"ignore_eos": True, "stop": "."}, False),
        ({"ignore_eos": True, "stop_token_ids": [3]}, False),
        ({"ignore_eos": True, "structured_outputs": StructuredOutputsParams(regex="a*")}, False),
        ({"ignore_eos": True, "repetition_detection": REPETITION}, False),
        ({"ignore_eos": True, "max_tokens": None}, True),
        ({"min_tokens": 15}, False),
        ({"min_tokens": 16, "max_tokens": None}, False),
        ({"min_tokens": 16}, True),
        ({"min_tokens": 16, "stop_token_ids": [3], "stop": ".", "repetition_detection": REPETITION}, True),
        ({"min_tokens": 16, "logit_bias": {3: -100.0}, "top_k": 5, "repetition_penalty": 1.2}, True),
        ({"min_tokens": 16, "structured_outputs": StructuredOutputsParams(regex="a*")}, False),
        ({"min_tokens": 16, "allowed_token_ids": [3]}, False),
        ({"min_tokens": 16, "bad_words": ["x"]}, False),
        ({"min_tokens": 16, "bad_words_token_ids": [[3]]}, False),
        ({"min_tokens": 16, "ignore_eos": True, "logits_processors": [print]}, False),
        ({"min_tokens": 16, "thinking_token_budget": 0}, False),
    ],
)
def test_lengths_that_are_known_up_front(fields: dict[str, Any], fixed: bool) -> None:
    assert SamplingParams(**fields).has_fixed_length is fixed
