"""Tiny Llama checkpoints whose projections are quantized by an encoder, and what models make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from octavo.attention.backend import AttentionLayer
from octavo.loading.source import resolve_source
from octavo.loading.weights import load_model
from octavo.models.base import CausalLM

CPU = torch.device("cpu")
# A weight [N, K] -> its tensors by the end of their names, and what they stand for.
Encoder = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SIZES = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128)}
SIZES |= {"gate": (320, 128), "up": (320, 128), "down": (128, 320)}


def plain_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    state = {"model.embed_tokens.weight": made(64, 128), "lm_head.weight": made(64, 128, std=0.1)}
    state["model.norm.weight"] = 1 + made(128, std=0.1)
    for layer in range(2):
        for name, shape in SIZES.items():
            block = "self_attn" if name in "qkvo" else "mlp"
            state[f"model.layers.{layer}.{block}.{name}_proj.weight"] = made(*shape, std=shape[1] ** -0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{layer}.{name}.weight"] = 1 + made(128, std=0.1)
    return state


def encoded(encode: Encoder, skipped: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a quantized checkpoint, and those of the plain one that it stands for. skipped: parts of names
    of projections that are not quantized."""
    state, plain = _encoded(encode, skipped)
    return dict(state), dict(plain)


@cache
def _encoded(encode: Encoder, skipped: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state, plain = {}, {}
    for name, tensor in plain_tensors().items():
        if name.endswith("_proj.weight") and not any(part in name for part in skipped):
            tensors, stands_for = encode(tensor)
            state |= {f"{name.removesuffix('weight')}{end}": value for end, value in tensors.items()}
            plain[name] = stands_for
        else:
            state[name] = plain[name] = tensor
    return state, plain


def write(folder: Path, state: dict[str, Tensor], quantization: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fields = CONFIG | config | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, load_format: Any = "auto", option: Any = None) -> CausalLM:
    return load_model(resolve_source(str(folder), load_format=load_format), dtype, CPU, 0, option)


class Causal:
    """Attention over the tokens of one call, nothing cached."""

    def forward(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True, scale=layer.scale, enable_gqa=True)
        return attended[0].transpose(0, 1)


@torch.inference_mode()
def logits(model: CausalLM) -> Tensor:
    ids = torch.arange(24) % model.config.vocab_size
    return model.compute_logits(model(ids, torch.arange(24), Causal())).float()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
