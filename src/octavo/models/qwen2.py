"""Qwen2 and Qwen2.5 (Qwen team, 2024): Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.config import ConfigFields, DecoderConfig
from octavo.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Windowed, where the config asks for it, in its later layers only."""

    @staticmethod
    def read_config(values: Mapping[str, Any]) -> DecoderConfig:
        fields = ConfigFields(values)
        return fields.decoder(qkv_bias=True, layer_windows=fields.windows())
