"""What speculative_config may say, and how it is refused."""

from __future__ import annotations

import json

import pytest

from octavo.protocol.speculation import SpeculationConfig, speculation_config


def test_nothing_said_is_no_speculation():
    assert speculation_config(None) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "ngram"}, SpeculationConfig(method="ngram")),
        (
            {"model": "[ngram]", "num_speculative_tokens": 3},
            SpeculationConfig(method="ngram", num_speculative_tokens=3),
        ),
        ({"model": "small"}, SpeculationConfig(method="draft_model", model="small")),
        ({"method": "suffix", "prompt_lookup_max": 16}, SpeculationConfig(method="suffix", prompt_lookup_max=16)),
    ],
)
def test_what_is_said_is_read(given, expected):
    assert speculation_config(json.dumps(given)) == expected


def test_the_short_options_stand_for_it():
    assert speculation_config(None, "[ngram]", 4) == SpeculationConfig(method="ngram", num_speculative_tokens=4)
    assert speculation_config(None, "small") == SpeculationConfig(method="draft_model", model="small")
    text = '{"method": "ngram"}'
    assert speculation_config(text, None, 7) == SpeculationConfig(method="ngram", num_speculative_tokens=7)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "is not a JSON object"),
        ("{", "is not a JSON object"),
        ("{}", "has no method and no model; allowed: ngram, suffix"),
        ('{"method": "medusa"}', "method='medusa' is not known; allowed: ngram"),
        ('{"method": "ngram", "tree": 1}', "tree is not supported; allowed: method, model"),
        (
            '{"method": "ngram", "num_speculative_tokens": 0}',
            "num_speculative_tokens=0 is out of range; allowed: 1..32",
        ),
        ('{"method": "ngram", "num_speculative_tokens": "5"}', "num_speculative_tokens"),
        ('{"method": "ngram", "prompt_lookup_min": 6}', "prompt_lookup_min=6 is out of range; allowed: 1..5"),
        ('{"method": "ngram", "model": "x"}', "model='x' has no use in ngram"),
        ('{"method": "ngram", "quantization": "fp8"}', "quantization='fp8' has no use in ngram"),
        ('{"method": "ngram", "suffix_cached_tokens": 9}', "suffix_cached_tokens=9 has no use in ngram"),
        ('{"model": "x", "prompt_lookup_max": 3}', "prompt_lookup_max=3 has no use in draft_model"),
        ('{"method": "eagle3", "model": "x", "quantization": "fp8"}', "quantization='fp8' has no use in eagle3"),
        ('{"method": "draft_model"}', "method=draft_model needs a model"),
        ('{"model": "x", "quantization": "int3"}', "quantization='int3' is not supported; allowed: fp8"),
        (
            '{"model": "x", "draft_sample_method": "lucky"}',
            "draft_sample_method='lucky' is not supported; allowed: greedy, probabilistic",
        ),
        ('{"method": "suffix", "draft_sample_method": "greedy"}', "draft_sample_method='greedy' has no use in suffix"),
        ('{"model": "x", "synthetic_acceptance": 1.5}', "synthetic_acceptance=1.5 is out of range; allowed: 0..1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text, says):
    with pytest.raises(ValueError, match="speculative_config") as refusal:
        speculation_config(text)
    assert says in str(refusal.value)


def test_options_that_disagree_are_both_named():
    with pytest.raises(ValueError, match="num_speculative_tokens=3 and speculative_config's num_speculative_tokens=4"):
        speculation_config('{"method": "ngram", "num_speculative_tokens": 4}', None, 3)
