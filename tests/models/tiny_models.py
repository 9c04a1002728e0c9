"""Tiny random models of transformers, saved to disk, and their log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from octavo.layers.attention import AttentionContext
from octavo.models.base import CausalLM

NUM_TOKENS = 40
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough for attention to be far from uniform
}


def save(config: PretrainedConfig, folder: Path, **options: Any) -> PreTrainedModel:
    """A random causal model of this config, in folder as safetensors."""
    return save_as(AutoModelForCausalLM, config, folder, **options)


def save_as(kind: Any, config: PretrainedConfig, folder: Path, **options: Any) -> PreTrainedModel:
    """A random model of this config, of one of transformers' Auto classes. Norms and biases are random too."""
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
    model.save_pretrained(folder, **options)
    return model


def token_ids(vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def reference_logprobs(model: PreTrainedModel) -> Tensor:
    """float32 [NUM_TOKENS, vocab_size]"""
    ids = token_ids(model.config.vocab_size)
    return model(ids[None]).logits[0].float().log_softmax(-1)


@torch.inference_mode()
def logprobs(model: CausalLM, context: AttentionContext) -> Tensor:
    """float32 [NUM_TOKENS, vocab_size]"""
    ids = token_ids(model.config.vocab_size)
    hidden = model(ids, torch.arange(NUM_TOKENS), context)
    return model.compute_logits(hidden).float().log_softmax(-1)
