"""What LLM generates of a tiny random model, and its log-probabilities, are those of transformers' `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, save, token_ids
from transformers import LlamaConfig, PreTrainedModel

from octavo import LLM, SamplingParams

NUM_OUTPUT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return save(LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None), folder)


@pytest.fixture(scope="module")
def llm(folder: Path, reference: PreTrainedModel) -> LLM:  # noqa: ARG001 (it writes the folder)
    options: dict[str, Any] = {"dtype": "float32", "skip_tokenizer_init": True, "kv_cache_memory": "4MiB", "threads": 1}
    return LLM(str(folder), max_num_seqs=4, **options)


@pytest.mark.parametrize("wish", [{}, {"repetition_penalty": 1.4}, {"repetition_penalty": 0.8}], ids=str)
def test_greedy_tokens_and_their_log_probabilities(llm: LLM, reference: PreTrainedModel, wish: dict[str, Any]) -> None:
    prompt = token_ids(SIZES["vocab_size"]).tolist()
    found = reference.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_OUTPUT, do_sample=False, pad_token_id=0, **wish
    )[0].tolist()
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, logprobs=5, prompt_logprobs=3, **wish)
    [output] = llm.generate([prompt], params, use_tqdm=False)
    assert [*prompt, *output.outputs[0].token_ids] == found
    with torch.inference_mode():
        exact = reference(torch.tensor([found])).logits[0].log_softmax(-1)  # of the raw distribution
    positions = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    assert len(positions) == len(found) - 1
    for at, candidates in enumerate(positions):
        num = 3 if at < len(prompt) - 1 else 5
        assert next(iter(candidates)) == found[at + 1]
        assert set(exact[at].topk(num).indices.tolist()) <= set(candidates)
        for token_id, entry in candidates.items():
            assert entry.logprob == pytest.approx(float(exact[at, token_id]), abs=1e-4)
            assert entry.rank == 1 + int((exact[at] > exact[at, token_id]).sum())
    assert output.outputs[0].cumulative_logprob == pytest.approx(
        sum(float(exact[at, found[at + 1]]) for at in range(len(prompt) - 1, len(found) - 1)), abs=1e-3
    )


def test_what_was_compared_depends_on_the_penalty(reference: PreTrainedModel) -> None:
    prompt = token_ids(SIZES["vocab_size"])[None]
    options = {"max_new_tokens": NUM_OUTPUT, "do_sample": False, "pad_token_id": 0}
    plain, penalized = (reference.generate(prompt, repetition_penalty=p, **options).tolist() for p in (1.0, 1.4))
    assert plain != penalized
