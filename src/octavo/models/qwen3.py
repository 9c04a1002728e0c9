"""Qwen3 (Qwen team, 2025), dense: Llama with RMSNorm on every query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.config import ConfigFields, DecoderConfig
from octavo.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    """head_dim stands on its own: num_heads * head_dim need not be hidden_size."""

    @staticmethod
    def read_config(values: Mapping[str, Any]) -> DecoderConfig:
        fields = ConfigFields({"head_dim": 128} | dict(values))
        bias = fields.flag("attention_bias", False)
        return fields.decoder(qkv_bias=bias, output_bias=bias, qk_norm=True, layer_windows=fields.windows())
