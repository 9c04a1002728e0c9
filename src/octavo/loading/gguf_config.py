"""The metadata of a GGUF file, said in the words of a Hugging Face config.json."""

from __future__ import annotations

import struct
from typing import Any

from octavo.loading.gguf_file import GgufFile
from octavo.loading.gguf_names import checkpoint_name

_F32 = 0
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ROPE_FACTORS = "rope_freqs.weight"


def config_of(file: GgufFile) -> dict[str, Any]:
    """Raises ValueError naming the file and the key that is missing or not supported."""
    return _Metadata(file).config()


def generation_config_of(file: GgufFile) -> dict[str, Any]:
    """The ids that begin and end a text, as generation_config.json names them."""
    ids = {name: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    config: dict[str, Any] = {}
    if ids["bos"] is not None:
        config["bos_token_id"] = ids["bos"]
    if ends:
        config["eos_token_id"] = list(dict.fromkeys(ends))
    return config


def _types_of(file: GgufFile) -> dict[str, int]:
    """ggml type numbers of the weights, by what Hugging Face calls their holders."""
    names = {name: checkpoint_name(name) for name in file.tensors if name.endswith(".weight")}
    return {known.removesuffix(".weight"): file.tensors[name].type for name, known in names.items()}


class _Metadata:
    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._values = file.metadata
        self._architecture = self._values.get("general.architecture")

    def config(self) -> dict[str, Any]:
        if self._architecture not in _ARCHITECTURES:
            raise self._refused("general.architecture", self._architecture, ", ".join(_ARCHITECTURES))
        if self._values.get("split.count", 1) > 1:
            raise self._refused("split.count", self._values["split.count"], "1 (merge the parts first)")
        if "token_embd.weight" not in self._file.tensors:
            raise ValueError(f"{self._file.path}: tensor token_embd.weight is missing")
        hidden_size, num_heads = self._size("embedding_length"), self._size("attention.head_count")
        config = {
            "architectures": [_ARCHITECTURES[self._architecture]],
            "vocab_size": self._file.tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._get("attention.head_count_kv", num_heads),
            "head_dim": self._get("attention.key_length", hidden_size // num_heads),
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": self._need("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "attention_bias": "blk.0.attn_output.bias" in self._file.tensors,
            "mlp_bias": "blk.0.ffn_down.bias" in self._file.tensors,
            "rope_parameters": self._rope(),
            "quantization_config": {"quant_method": "gguf", "types": _types_of(self._file)},
        }
        rotated = self._get("rope.dimension_count", config["head_dim"])
        if rotated != config["head_dim"]:
            raise self._refused(f"{self._architecture}.rope.dimension_count", rotated, str(config["head_dim"]))
        window = self._get("attention.sliding_window", None)
        if window and self._architecture == "llama":
            config |= {"architectures": ["MistralForCausalLM"], "sliding_window": window}
        return config | generation_config_of(self._file)

    def _rope(self) -> dict[str, Any]:
        theta = {"rope_theta": self._get("rope.freq_base", 10000.0)}
        if _ROPE_FACTORS in self._file.tensors:
            return {"rope_type": "factors", "factors": self._rope_factors()} | theta
        kind = self._get("rope.scaling.type", "none")
        if kind == "none":
            return {"rope_type": "default"} | theta
        given = {
            "factor": self._get("rope.scaling.factor", None),
            "original_max_position_embeddings": self._get("rope.scaling.original_context_length", None),
            "beta_fast": self._get("rope.scaling.yarn_beta_fast", None),
            "beta_slow": self._get("rope.scaling.yarn_beta_slow", None),
        }
        return {"rope_type": kind} | theta | {k: v for k, v in given.items() if v is not None}

    def _rope_factors(self) -> list[float]:
        tensor = self._file.tensors[_ROPE_FACTORS]
        if tensor.type != _F32 or len(tensor.shape) != 1:
            raise ValueError(f"{self._file.path}: tensor {_ROPE_FACTORS} is not a float32 vector")
        with self._file.path.open("rb") as stream:
            stream.seek(tensor.offset)
            raw = stream.read(4 * tensor.shape[0])
        if len(raw) < 4 * tensor.shape[0]:
            raise ValueError(f"{self._file.path} ends inside tensor {_ROPE_FACTORS}")
        return list(struct.unpack(f"<{tensor.shape[0]}f", raw))

    def _get(self, name: str, default: Any) -> Any:
        return self._values.get(f"{self._architecture}.{name}", default)

    def _size(self, name: str) -> int:
        value = self._need(name)
        if not isinstance(value, int) or value < 1:
            raise self._refused(f"{self._architecture}.{name}", value, "an integer >= 1")
        return value

    def _need(self, name: str) -> Any:
        value = self._get(name, None)
        if value is None:
            raise ValueError(f"{self._file.path}: metadata key {self._architecture}.{name} is missing")
        return value

    def _refused(self, key: str, value: Any, allowed: str) -> ValueError:
        return ValueError(f"{self._file.path}: {key}={value!r} is not supported; allowed: {allowed}")
