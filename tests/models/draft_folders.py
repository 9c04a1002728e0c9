"""Folders of tiny random draft heads, in the published layouts, and what such heads compute, written down plainly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_models import SIZES
from torch import Tensor

HIDDEN, VOCAB, DRAFT_VOCAB = SIZES["hidden_size"], SIZES["vocab_size"], 37
EAGLE: dict[str, Any] = SIZES | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "rms_norm_eps": 1e-5}
EAGLE3: dict[str, Any] = EAGLE | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": DRAFT_VOCAB,
    "eagle_aux_hidden_state_layer_ids": [0, 2, 3],
}


def _random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1) for name, shape in shapes.items()}


def _layer(prefix: str, config: Mapping[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    size, inner, heads, kv_heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    dim = size // heads
    return {
        f"{prefix}.self_attn.q_proj.weight": (heads * dim, width),
        f"{prefix}.self_attn.k_proj.weight": (kv_heads * dim, width),
        f"{prefix}.self_attn.v_proj.weight": (kv_heads * dim, width),
        f"{prefix}.self_attn.o_proj.weight": (size, heads * dim),
        f"{prefix}.mlp.gate_proj.weight": (inner, size),
        f"{prefix}.mlp.up_proj.weight": (inner, size),
        f"{prefix}.mlp.down_proj.weight": (size, inner),
        f"{prefix}.post_attention_layernorm.weight": (size,),
    }


def eagle_tensors() -> dict[str, Tensor]:
    return _random({"fc.weight": (HIDDEN, 2 * HIDDEN)} | _layer("layers.0", EAGLE, HIDDEN))


def eagle3_tensors(config: Mapping[str, Any] = EAGLE3) -> dict[str, Tensor]:
    size = config["hidden_size"]
    shapes = {
        "fc.weight": (size, 3 * HIDDEN),
        "midlayer.input_layernorm.weight": (size,),
        "midlayer.hidden_norm.weight": (size,),
        "norm.weight": (size,),
        "lm_head.weight": (DRAFT_VOCAB, size),
    }
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))[:DRAFT_VOCAB].sort().values
    tables = {"d2t": ids - torch.arange(DRAFT_VOCAB), "t2d": torch.zeros(VOCAB, dtype=torch.bool)}
    tables["t2d"][ids] = True
    return _random(shapes | _layer("midlayer", config, 2 * size)) | tables


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def _attended(x: Tensor, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Causal attention, with rotary positions 0, 1, 2 and so on."""
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (F.linear(x, weights[f"self_attn.{name}_proj.weight"]) for name in "qkv")
    dim = q.shape[1] // num_heads
    angles = torch.arange(len(x))[:, None] / 10000.0 ** (torch.arange(0, dim, 2) / dim)

    def turned(heads: Tensor) -> Tensor:
        pairs = torch.complex(heads[..., : dim // 2], heads[..., dim // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((pairs.real, pairs.imag), -1)

    q, k, v = turned(q.view(len(x), -1, dim)), turned(k.view(len(x), -1, dim)), v.view(len(x), -1, dim)
    out = torch.empty_like(q)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        scores = q[:, head] @ k[:, kv_head].T / dim**0.5
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
        out[:, head] = scores.softmax(-1) @ v[:, kv_head]
    return F.linear(out.flatten(1), weights["self_attn.o_proj.weight"])


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def _fed_forward(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    normed = _norm(x, weights["post_attention_layernorm.weight"])
    gate, up = (F.linear(normed, weights[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    return x + F.linear(F.silu(gate) * up, weights["mlp.down_proj.weight"])


def eagle_reference(embedded: Tensor, features: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The next features, [T, HIDDEN]: EAGLE's autoregression head."""
    layer = {name.removeprefix("layers.0."): tensor for name, tensor in tensors.items()}
    x = F.linear(torch.cat((embedded, features), 1), tensors["fc.weight"], tensors.get("fc.bias"))
    return _fed_forward(x + _attended(x, layer, EAGLE), layer)


def eagle3_reference(
    embedded: Tensor, features: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any] = EAGLE3
) -> tuple[Tensor, Tensor]:
    """The next features, and the logits [T, DRAFT_VOCAB], from features that the fc has made."""
    layer = {name.removeprefix("midlayer."): tensor for name, tensor in tensors.items()}
    normed = _norm(features, layer["hidden_norm.weight"])
    both = torch.cat((_norm(embedded, layer["input_layernorm.weight"]), normed), 1)
    residual = normed if config.get("norm_before_residual") else features
    out = _fed_forward(residual + _attended(both, layer, config), layer)
    return out, _norm(out, tensors["norm.weight"]) @ tensors["lm_head.weight"].T
