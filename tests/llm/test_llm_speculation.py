"""Speculation through the LLM class: options that are refused, and real heads and drafts in folders."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from octavo import LLM, SamplingParams
from octavo.draft_assembly import find_draft
from octavo.protocol.speculation import SpeculationConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from draft_folders import EAGLE, EAGLE3, eagle3_tensors, eagle_tensors, write
from tiny_models import SIZES, save

PROMPTS = [{"prompt_token_ids": [3, 5, 8, 13, 3, 5, 8, 13, 3, 5]}, {"prompt_token_ids": [7, 7, 7]}]
PARAMS = SamplingParams(max_tokens=20, temperature=0.8, seed=4, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save(LlamaConfig(**SIZES), root / "target")
    save(LlamaConfig(**SIZES | {"num_hidden_layers": 1}), root / "draft")
    save(LlamaConfig(**SIZES | {"vocab_size": 103}), root / "other")
    write(root / "eagle", EAGLE, eagle_tensors())
    write(root / "eagle3", EAGLE3, eagle3_tensors())
    return root


def opened(folder: Path, **options: object) -> LLM:
    fixed = {"skip_tokenizer_init": True, "dtype": "float32", "kv_cache_memory": "4MiB", "threads": 1}
    return LLM(str(folder / "target"), **fixed, **options)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return opened(folder)


def answers(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("method", ["ngram", "suffix", "draft_model", "eagle", "eagle3"])
def test_every_method_says_what_is_said_without(llm: LLM, folder: Path, method: str) -> None:
    names = {"draft_model": "draft", "eagle": "eagle", "eagle3": "eagle3"}
    model = {"model": str(folder / names[method])} if method in names else {"prompt_lookup_min": 1}
    config = {"method": method, "num_speculative_tokens": 3, "adaptive": False, **model}
    guessing = opened(folder, speculative_config=config)
    assert answers(guessing) == answers(llm)
    assert guessing.stats().num_draft_tokens_total > 0
    guessing.audit()


def test_the_short_options(llm: LLM, folder: Path) -> None:
    guessing = opened(folder, speculative_model="[ngram]", num_speculative_tokens=4)
    assert answers(guessing) == answers(llm)
    assert len(guessing.stats().num_accepted_by_position_total) == 4


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model": "draft", "quantization": "fp8"}, "quantization=fp8 needs a GPU"),
        ({"model": "draft", "synthetic_acceptance": 0.5}, "synthetic_acceptance=0.5 needs a GPU"),
        ({"model": "draft", "draft_sample_method": "probabilistic"}, "draft_sample_method=probabilistic needs a GPU"),
        ({"model": "other"}, "vocab_size=103 is not supported of a draft; allowed: 101"),
        ({"method": "eagle3", "model": "draft"}, "missing: fc.weight"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused_by_name(llm: LLM, folder: Path, config: dict, says: str) -> None:  # noqa: ARG001
    given = config | {"model": str(folder / config["model"])}
    with pytest.raises((ValueError, OSError), match=says):
        opened(folder, speculative_config=given)


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_a_gpu_takes_heads(folder: Path, method: str) -> None:
    """What it makes room for, and compiles kernels for, is read off the head's config.json."""
    options = SimpleNamespace(attention_backend="auto", load_format="auto")
    config: Any = SimpleNamespace(device="cuda", dtype="bfloat16", options=options)
    draft = find_draft(SpeculationConfig(method=method, model=str(folder / method), num_speculative_tokens=2), config)
    assert draft.facts is not None
    sizes = EAGLE3 if method == "eagle3" else EAGLE
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    assert draft.kv_bytes_per_token == 2 * sizes["num_key_value_heads"] * head_dim * 2
    assert draft.facts.num_heads == sizes["num_attention_heads"]
    assert draft.facts.vocab_size == sizes.get("draft_vocab_size", sizes["vocab_size"])
