"""The names of a GGUF file's tensors (GGUF specification, ggml project), and what Hugging Face calls them."""

from __future__ import annotations

import re

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


def part_of(name: str) -> str | None:
    """What of a layer a tensor belongs to ("attn_q"); None for an unknown name."""
    match = _NAME.fullmatch(name)
    return match["part"] if match else None


def checkpoint_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one comes back as it is."""
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    block, part, kind = match["block"], match["part"], match["kind"]
    if block is None:
        return f"{_TOP[part]}.{kind}" if part in _TOP else name
    return f"model.layers.{block}.{_IN_BLOCK[part]}.{kind}" if part in _IN_BLOCK else name
