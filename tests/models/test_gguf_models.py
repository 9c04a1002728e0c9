"""Models out of GGUF files: the real small one, and tiny ones of each architecture."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from dense_context import DenseContext
from tiny_models import SIZES, logprobs, reference_logprobs, save
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from octavo.loading.gguf_file import read_gguf
from octavo.loading.gguf_weights import streamed_gguf_weights
from octavo.loading.source import resolve_source
from octavo.loading.weights import load_model
from octavo.models.base import CausalLM
from octavo.models.registry import build_model

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
TO_GGUF = [
    (r"model\.embed_tokens", "token_embd"),
    (r"model\.norm", "output_norm"),
    (r"lm_head", "output"),
    (r"model\.layers\.(\d+)\.", r"blk.\1."),
    (r"self_attn\.([qk])_norm", r"attn_\1_norm"),
    (r"self_attn\.([qkv])_proj", r"attn_\1"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"input_layernorm", "attn_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
    (r"mlp\.(\w+)_proj", r"ffn_\1"),
]
CASES: dict[str, tuple[str, PretrainedConfig]] = {
    "llama": ("llama", LlamaConfig(**SIZES)),
    "llama-biases": ("llama", LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama-3.1": ("llama", LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama-yarn": ("llama", LlamaConfig(**SIZES, rope_parameters=YARN)),
    "llama-linear": ("llama", LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0})),
    "qwen2": ("qwen2", Qwen2Config(**SIZES)),
    "qwen3": ("qwen3", Qwen3Config(**SIZES, head_dim=16)),
}


def interleaved(rows: Tensor, num_heads: int) -> Tensor:
    """What llama.cpp's converter does to query and key rows: (halves of pairs) to (pairs of halves)."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(config: PretrainedConfig) -> np.ndarray:
    """The tensor rope_freqs.weight, by the formula of Llama 3.1's reference code."""
    factors = []
    for exponent in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * 500.0 ** (exponent / config.head_dim)
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        scale = 1.0 if wavelength < 32 / 4.0 else 1 / 8.0 if wavelength > 32 else (1 - smooth) / 8.0 + smooth
        factors.append(1 / scale)
    return np.array(factors, dtype=np.float32)


def gguf_name(name: str) -> str:
    for pattern, replacement in TO_GGUF:
        name = re.sub(pattern, replacement, name)
    return name


def write(path: Path, arch: str, config: PretrainedConfig, state: dict[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_token_list(["a", "b", "ü"])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(1)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    elif rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and re.search(r"[qk]_proj", name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_file_is_its_checkpoint(name: str, tmp_path: Path, dense_context: DenseContext) -> None:
    arch, config = CASES[name]
    reference = save(config, tmp_path / "checkpoint")
    path = tmp_path / "model.gguf"
    write(path, arch, config, reference.state_dict())
    source = resolve_source(str(path))
    assert (source.format, source.files, source.tokenizer_path) == ("gguf", (path,), path)
    assert source.eos_token_ids == (2, 1)
    model = load_model(source, torch.float32, CPU, seed=0)
    torch.testing.assert_close(logprobs(model, dense_context), reference_logprobs(reference), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> CausalLM:
    return load_model(resolve_source(str(smollm2_path)), torch.float32, CPU, seed=0)


def reference_of(path: Path) -> PreTrainedModel:
    """SmolLM2 in transformers, its weights by the gguf package's dequantizer (whose reader takes seconds)."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    tensors, raw = read_gguf(path).tensors, np.memmap(path, mode="r")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {}
    for name in model.state_dict():
        tensor = tensors[gguf_name("model.embed_tokens.weight" if name == "lm_head.weight" else name)]
        kind = gguf.GGMLQuantizationType(tensor.type)
        rows = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        data = raw[tensor.offset : tensor.offset + int(np.prod(rows))].reshape(rows)
        values = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind)))
        heads = 9 if "q_proj" in name else 3 if "k_proj" in name else None
        if heads:  # pairs of halves to halves of pairs
            values = values.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(values.shape)
        state[name] = values
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def test_smollm2_equals_transformers(smollm2_path: Path, smollm2: CausalLM, dense_context: DenseContext) -> None:
    """Against float64: in float32, transformers itself is 1e-4 away from that, on 30 layers and 49152 tokens."""
    reference = reference_of(smollm2_path)
    weight = reference.model.embed_tokens.weight
    assert torch.equal(smollm2.model.embed_tokens.weight, weight)
    exact = reference_logprobs(reference.double())
    torch.testing.assert_close(logprobs(smollm2, dense_context), exact, atol=2.5e-4, rtol=0)


def test_smollm2_packed_equals_dequantized(smollm2_path: Path, smollm2: CausalLM, dense_context: DenseContext) -> None:
    """Kept as on a GPU; a CPU multiplies by what the codes stand for."""
    model = build_model(resolve_source(str(smollm2_path)).config, torch.float32, CPU)
    packed = {name for name, slot in model.weight_slots().items() if torch.uint8 in slot.spec.dtypes}
    assert len(packed) == 7 * 30
    model.load_weights(streamed_gguf_weights(read_gguf(smollm2_path), torch.float32, CPU, packed))
    torch.testing.assert_close(logprobs(model, dense_context), logprobs(smollm2, dense_context), atol=1e-5, rtol=0)


def test_loading_leaves_the_number_of_threads_alone(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during = []
    monkeypatch.setattr("octavo.models.base.CausalLM.load_weights", lambda *_: during.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load_model(resolve_source(str(smollm2_path)), torch.float32, CPU, seed=0)
        assert (during, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
