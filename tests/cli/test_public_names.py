"""`import octavo`: the names are there, and only those."""

from __future__ import annotations

import importlib

import pytest

import octavo


def test_names_come_from_where_they_live() -> None:
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    assert octavo.SamplingParams is importlib.import_module("octavo.sampling_params").SamplingParams
    assert octavo.LoRARequest is importlib.import_module("octavo.lora.request").LoRARequest
    assert octavo.LLM is importlib.import_module("octavo.llm").LLM
    assert set(octavo.__all__) <= set(dir(octavo))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'octavo' has no attribute 'LMM'"):
        octavo.LMM  # noqa: B018
