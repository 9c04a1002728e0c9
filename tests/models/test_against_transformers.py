"""Every family, and every option of its config, gives the log-probabilities that transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_context import DenseContext
from tiny_models import SIZES, logprobs, reference_logprobs, save
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from octavo.loading.source import resolve_source
from octavo.loading.weights import load_model
from octavo.models.base import CausalLM

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(**options: Any) -> LlamaConfig:
    return LlamaConfig(**(SIZES | options))


def rope(**parameters: Any) -> LlamaConfig:
    return llama(rope_parameters={"rope_theta": 500.0} | parameters)


CASES: dict[str, PretrainedConfig] = {
    "llama": llama(),
    "llama-theta": rope(rope_type="default"),
    "llama-multi-head": llama(num_key_value_heads=6),
    "llama-head-dim": llama(head_dim=24),
    "llama-biases": llama(attention_bias=True, mlp_bias=True),
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-eps": llama(rms_norm_eps=0.5),
    "rope-linear": rope(rope_type="linear", factor=3.0),
    "rope-dynamic": rope(rope_type="dynamic", factor=2.0),
    "rope-llama3": rope(**LLAMA3),
    "rope-yarn": rope(**YARN),
    "rope-yarn-options": rope(**YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3),
    "rope-yarn-mscale": rope(**YARN, mscale=0.7, mscale_all_dim=1.2),
    "rope-yarn-untruncated": rope(**YARN, truncate=False),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3-bias": Qwen3Config(**SIZES, head_dim=8, attention_bias=True, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**SIZES, sliding_window=7),
    "mistral-no-window": MistralConfig(**SIZES, sliding_window=None),
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_model(resolve_source(str(folder)), dtype, CPU, seed=0)


@pytest.mark.parametrize("name", CASES)
def test_logprobs_equal_those_of_transformers(name: str, tmp_path: Path, dense_context: DenseContext) -> None:
    reference = save(CASES[name], tmp_path)
    torch.testing.assert_close(
        logprobs(load(tmp_path), dense_context), reference_logprobs(reference), atol=1e-4, rtol=0
    )


def test_options_of_a_case_matter(tmp_path: Path) -> None:
    """The comparison above would notice a scaling, a window or an epsilon that is not applied."""
    plain = reference_logprobs(save(rope(rope_type="default"), tmp_path))
    for config in (rope(rope_type="linear", factor=3.0), rope(**LLAMA3), rope(**YARN), llama(rms_norm_eps=0.5)):
        assert (reference_logprobs(save(config, tmp_path)) - plain).abs().max() > 0.01


def test_a_sharded_checkpoint_is_the_same(tmp_path: Path, dense_context: DenseContext) -> None:
    reference = save(CASES["llama-biases"], tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(
        logprobs(load(tmp_path), dense_context), reference_logprobs(reference), atol=1e-4, rtol=0
    )


def test_rope_fields_of_older_configs(tmp_path: Path, dense_context: DenseContext) -> None:
    reference = save(rope(**LLAMA3), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    path.write_text(json.dumps(config))
    torch.testing.assert_close(
        logprobs(load(tmp_path), dense_context), reference_logprobs(reference), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-bias"])
def test_bfloat16_is_close(name: str, tmp_path: Path, dense_context: DenseContext) -> None:
    """As close to float32 as transformers' own bfloat16 is, within a factor for the luck of rounding."""
    config = CASES[name]
    reference = save(config, tmp_path)
    exact = reference_logprobs(reference)
    theirs = (reference_logprobs(reference.to(torch.bfloat16)) - exact).abs().mean()
    ours = (logprobs(load(tmp_path, torch.bfloat16), dense_context) - exact).abs().mean()
    assert ours < 1.5 * theirs


def test_without_packing_the_result_is_the_same(
    tmp_path: Path, dense_context: DenseContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CASES["llama-tied"], tmp_path)
    packed = load(tmp_path)
    monkeypatch.setattr("octavo.quantization.unquantized.can_pack", lambda *_: False)
    plain = load(tmp_path)
    assert plain.lm_head.layers[0].weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(logprobs(packed, dense_context), logprobs(plain, dense_context), atol=1e-4, rtol=0)
    num_bytes = sum(tensor.nbytes for tensor in plain.parameters())
    assert plain.weight_bytes == num_bytes
    tied = 0 if packed.lm_head.layers[0].packed_weight is None else plain.lm_head.layers[0].weight.nbytes
    assert packed.weight_bytes == num_bytes + tied


@torch.inference_mode()
def test_what_follows_the_last_attention_is_computed_for_the_tokens_that_are_picked(
    tmp_path: Path, dense_context: DenseContext
) -> None:
    save(CASES["qwen3"], tmp_path)
    model: Any = load(tmp_path)
    passed: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _module, inputs: passed.append(len(inputs[0])))
    at = torch.tensor([3, 8, 9])
    given = torch.arange(11), torch.arange(11), dense_context
    whole = model(*given)
    passed.clear()
    picked = model(*given, None, lambda heads, residual: (heads[at], residual[at]))
    torch.testing.assert_close(picked, whole[at])
    assert passed == [11] * (len(passed) - 1) + [3]


def test_a_token_does_not_depend_on_its_neighbours_in_the_batch(tmp_path: Path) -> None:
    """Only attention mixes tokens: rows of a flat batch do not depend on their neighbours."""
    save(CASES["qwen3"], tmp_path)
    model = load(tmp_path)

    class Own:
        """Every token sees itself alone."""

        def forward(self, layer: Any, _query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return value.repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1)

    ids, positions = torch.tensor([3, 1, 4, 1]), torch.tensor([0, 9, 2, 9])
    with torch.inference_mode():
        together = model(ids, positions, Own())
        alone = torch.cat([model(ids[i : i + 1], positions[i : i + 1], Own()) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1], together[3])
