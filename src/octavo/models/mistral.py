"""Mistral (Jiang et al., 2023): Llama with a sliding window in every layer, where the config has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.config import ConfigFields, DecoderConfig
from octavo.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Llama's layers without biases."""

    @staticmethod
    def read_config(values: Mapping[str, Any]) -> DecoderConfig:
        fields = ConfigFields(values)
        window = None if values.get("sliding_window") is None else fields.integer("sliding_window")
        return fields.decoder(layer_windows=(window,) * fields.integer("num_hidden_layers"))
