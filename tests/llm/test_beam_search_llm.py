"""Beam search on the real model: the same outputs as transformers' own, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo import LLM, BeamSearchParams, SamplingParams
from octavo.loading.package import pull

PROMPTS = ["The capital of France is", "Once upon a time, there was a", "Q: What is 2+2?\nA:"]


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return LLM(str(smollm2_path), dtype="float32", max_model_len=128, max_num_seqs=16, kv_cache_memory="64MiB")
