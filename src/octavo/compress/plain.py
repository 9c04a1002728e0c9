"""A model as a plain Hugging Face folder, whether it lies in one or in a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.layers.linear import Linear
from octavo.loading.gguf_file import read_gguf
from octavo.loading.gguf_weights import gguf_weights
from octavo.loading.source import ModelSource
from octavo.loading.weights import safetensors_weights
from octavo.models.registry import build_model
from octavo.text.gguf_tokenizer import read_gguf as read_gguf_tokenizer

_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")  # of a folder, beside its weights
_LEFT = ("config.json", "*.index.json")
HEAD = "lm_head"


class PlainModel:
    """Reads a ModelSource of either kind. Raises ValueError for one that is quantized already, has no weights, or says
    what config.json has no words for."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._is_gguf = source.format == "gguf"
        if source.format == "dummy":
            raise ValueError(f"{source.path}: a model without weights cannot be quantized")
        self.config = _config_of_gguf(source) if self._is_gguf else dict(source.config)
        if self.config.get("quantization_config"):
            method = self.config["quantization_config"].get("quant_method")
            raise ValueError(f"{source.path} is quantized already (quant_method={method!r}); give the model it is from")

    @property
    def folder(self) -> Path | None:
        """Where it lies as a plain folder; None if it does not."""
        return None if self._is_gguf else self._source.path

    def linear_sizes(self) -> dict[str, int]:
        """Input features of every linear layer but the head, by the names of their weights.

        Raises ValueError naming a config field that is not supported.
        """
        model = build_model(self.config, torch.bfloat16, torch.device("meta"))
        return {
            name: module.in_features
            for path, module in model.named_modules()
            if isinstance(module, Linear) and path != HEAD
            for name in module.weight_slots(path)
            if name.endswith(".weight")
        }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor: as it is stored, out of a GGUF file in float32."""
        if self._is_gguf:
            return gguf_weights(read_gguf(self._source.files[0]), torch.float32, torch.get_num_threads())
        return safetensors_weights(self._source.files)

    def write_files(self, folder: Path) -> None:
        """All that is no weight and not config.json: tokenizer, generation_config.json and the like."""
        if self._is_gguf:
            _write_tokenizer(self._source.path, folder)
            if self._source.generation_config:
                write_json(folder / "generation_config.json", self._source.generation_config)
            return
        for pattern in _COPIED:
            for path in sorted(self._source.path.glob(pattern)):
                if path.is_file() and not any(path.match(left) for left in _LEFT):
                    shutil.copyfile(path, folder / path.name)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _config_of_gguf(source: ModelSource) -> dict[str, Any]:
    """Raises ValueError for rotation factors, of which config.json has only the formula they came from."""
    config = {name: value for name, value in source.config.items() if name != "quantization_config"}
    rope = config["rope_parameters"]
    if rope["rope_type"] == "factors":
        raise ValueError(
            f"{source.path}: tensor rope_freqs.weight cannot be said in a config.json; "
            "quantize the model's safetensors instead"
        )
    config |= {"model_type": _MODEL_TYPES[config["architectures"][0]], "dtype": "bfloat16"}
    config["rope_theta"] = rope["rope_theta"]  # where transformers before 5 looks
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return config


def _write_tokenizer(path: Path, folder: Path) -> None:
    parts = read_gguf_tokenizer(path)
    parts.backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": parts.bos_token,
        "eos_token": parts.eos_token,
        "chat_template": parts.chat_template,
    }
    write_json(folder / "tokenizer_config.json", {name: value for name, value in config.items() if value is not None})
