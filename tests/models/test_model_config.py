"""What a config.json may say, and how the rest is refused: by the field's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.models.registry import ARCHITECTURES, build_model, model_facts

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def facts(**changes: Any) -> Any:
    return model_facts(BASE | changes)


def config(**changes: Any) -> Any:
    return build_model(BASE | changes, torch.float32, torch.device("cpu")).config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures.*GPT2LMHeadModel.*LlamaForCausalLM, Mistral"),
        ({"architectures": ["Qwen3ForCausaLM"]}, "did you mean Qwen3ForCausalLM"),
        ({"architectures": None}, "architectures is missing"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": 0}, "vocab_size=0.*>= 1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2'"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3.*divisor of num_attention_heads=4"),
        ({"head_dim": 5}, "head_dim=5.*even"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type='longrope'.*yarn"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.rope_type='su'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor=None.*'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "rope_parameters.factor='x'"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rope_parameters": {"rope_type": "factors", "factors": [1.0]}}, "rope factors: there are 1; expected.*2"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config.quant_method='hqq'"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window=0"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention", "chunked_attention"],
            },
            "layer_types.*chunked_attention",
        ),
    ],
)
def test_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**changes)


def test_defaults() -> None:
    read = config()
    assert (read.num_kv_heads, read.head_dim, read.rope.theta, read.rms_norm_eps) == (4, 4, 10000.0, 1e-6)
    assert read.sliding_window is None
    assert config(architectures=["Qwen3ForCausalLM"]).head_dim == 128
    assert config(rope_theta=5.0, rope_scaling=None).rope.theta == 5.0


def test_facts_are_those_of_the_model() -> None:
    found = facts(num_key_value_heads=2)
    assert (found.num_layers, found.num_kv_heads, found.head_dim) == (2, 2, 4)
    assert (found.vocab_size, found.max_position_embeddings) == (32, 64)


def test_yarn_stretches_the_context() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert facts(rope_parameters=yarn).max_position_embeddings == 256
    assert facts(rope_parameters=yarn, max_position_embeddings=512).max_position_embeddings == 512


def test_windows_of_layers() -> None:
    windowed = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 4}
    assert config(**windowed, max_window_layers=1).layer_windows == (None, 4)
    assert config(**windowed, max_window_layers=1).sliding_window is None
    assert config(**windowed, max_window_layers=0).sliding_window == 4
    assert config(**windowed | {"use_sliding_window": False}).layer_windows == (None, None)
    assert config(architectures=["MistralForCausalLM"], sliding_window=9).sliding_window == 9


def test_every_architecture_builds() -> None:
    for name in ARCHITECTURES:
        model = build_model(BASE | {"architectures": [name], "num_labels": 1}, torch.bfloat16, torch.device("cpu"))
        kinds = {p.dtype for name, p in model.named_parameters() if name != "score.weight"}
        assert kinds == {torch.bfloat16}
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
