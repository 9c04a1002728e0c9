"""A small random model of every family through the whole engine, against transformers and against itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from octavo import LLM, SamplingParams

VOCAB = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # far from uniform, so that a wrong neighbour would show
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=32)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=11)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "no prefix cache": {"enable_prefix_caching": False},
    "chunks of 5": {"max_num_seqs": 3, "max_num_batched_tokens": 5},
    "prompts whole": {"enable_chunked_prefill": False},
    # 3 layers * 2 * 2 heads * 16 or 32 dims * 4 bytes * 4 tokens = 3 or 6 KiB a block: 17 blocks for 64 tokens each.
    "few blocks": {"kv_cache_memory": "54KiB", "async_scheduling": True},
    "few blocks, large heads": {"kv_cache_memory": "108KiB", "async_scheduling": True},
    "depth 2": {"async_scheduling": True},
}
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False, logprobs=0)


def prompts() -> list[list[int]]:
    """Random ones of 1 to 40 tokens; every other shares a prefix."""
    rng = random.Random(1)
    prefix = [rng.randrange(VOCAB) for _ in range(21)]
    lengths = (1, 3, 19, 4, 40, 16, 8, 12)
    return [(prefix if i % 2 else []) + [rng.randrange(VOCAB) for _ in range(n)] for i, n in enumerate(lengths)]


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def score(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_output_is_transformers(reference: tuple[Any, Path], variant: str) -> None:
    model, folder = reference
    large_heads = model.config.model_type == "qwen3"
    if variant.startswith("few blocks") and large_heads != (variant != "few blocks"):
        pytest.skip("sized for models of the other head size")
    options = {"max_model_len": 64, "block_size": 4, "kv_cache_memory": "4MiB", **VARIANTS[variant]}
    llm = LLM(str(folder), dtype="float32", skip_tokenizer_init=True, **options)
    outputs = llm.generate(prompts(), PARAMS, use_tqdm=False)
    for output in outputs:
        completion = output.outputs[0]
        assert completion.logprobs is not None
        scores = score(model, output.prompt_token_ids + completion.token_ids)[len(output.prompt_token_ids) - 1 :]
        for position, token_id in enumerate(completion.token_ids):
            assert scores[position].max() - scores[position, token_id] < 1e-4, (variant, position)
            assert completion.logprobs[position][token_id].logprob == pytest.approx(
                scores[position, token_id].item(), abs=1e-3
            )
    stats = llm.stats()
    assert (stats.num_preemptions_total > 0) == variant.startswith("few blocks")
    assert (stats.prefix_cache_hits_total > 0) == (variant != "no prefix cache")
    llm.audit()
    alone = [llm.generate([p], PARAMS, use_tqdm=False)[0].outputs[0].token_ids for p in prompts()]
    assert alone == [o.outputs[0].token_ids for o in outputs]
