"""Adapters of a tiny random Llama, saved by PEFT itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.lora.targeting import Target

VOCABULARY, HIDDEN = 64, 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, 8),
    "self_attn.v_proj": (HIDDEN, 8),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, 32),
    "mlp.up_proj": (HIDDEN, 32),
    "mlp.down_proj": (32, HIDDEN),
}
TARGETS = {
    f"model.layers.{layer}.{name}": Target(*shape, "linear") for layer in range(2) for name, shape in SHAPES.items()
} | {
    "model.embed_tokens": Target(VOCABULARY, HIDDEN, "embedding"),
    "lm_head": Target(HIDDEN, VOCABULARY, "linear"),
}


def llama(*, tied: bool = True) -> LlamaForCausalLM:
    """Two layers, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def adapted(base: Any = None, **fields: Any) -> PeftModel:
    """A model with an adapter whose every parameter is random: at first B is zero, and nothing could be told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, above all
        model = get_peft_model(llama() if base is None else base, LoraConfig(**({"task_type": "CAUSAL_LM"} | fields)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


def saved(folder: Path, model: PeftModel | None = None, **fields: Any) -> Path:
    """The folder of such a model's adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (adapted(**fields) if model is None else model).save_pretrained(folder)
    return folder
