"""A checkpoint's config.json, read field by field: every value is checked, and what is not supported is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.config import OutputHead
from octavo.layers.rotary import ROPE_TYPES, RopeParameters

_ACTIVATIONS = ("silu",)
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The facts of a decoder of the Llama kind.

    layer_windows: the sliding window of each layer, None for a layer that sees everything before it.
    head: what the last hidden states become. classifier_token_ids: of a model that scores texts by its language head:
    (no, yes), or (yes,).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeParameters
    layer_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    head: OutputHead = "tokens"
    classifier_token_ids: tuple[int, ...] = ()

    @property
    def sliding_window(self) -> int | None:
        """The farthest that any layer looks back, None if one of them sees everything."""
        windows = [window for window in self.layer_windows if window is not None]
        return max(windows) if len(windows) == self.num_layers else None


class ConfigFields:
    """Typed access to config.json. Every method raises ValueError naming the field, its value and what is allowed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config field {name}={value!r} is out of range; allowed: an integer >= 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"config field {name}={value!r} is out of range; allowed: a number > 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config field {name}={value!r} is not supported; allowed: true, false")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"config field {name} is missing")
        return value

    def rope(self) -> RopeParameters:
        """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
        name = "rope_parameters" if self.values.get("rope_parameters") else "rope_scaling"
        scaling = dict(self.values.get(name) or {})
        theta = ConfigFields({"rope_theta": scaling.pop("rope_theta", None) or self.values.get("rope_theta")})
        legacy_type = scaling.pop("type", "default")
        rope_type = scaling.pop("rope_type", legacy_type)
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"config field {name}.rope_type={rope_type!r} is not supported; allowed: {', '.join(ROPE_TYPES)}"
            )
        for holder in (self.values, scaling):
            if holder.get("partial_rotary_factor", 1.0) != 1.0:
                value = holder["partial_rotary_factor"]
                raise ValueError(f"config field partial_rotary_factor={value!r} is not supported; allowed: 1.0")
        if self.values.get("original_max_position_embeddings") is not None:
            scaling["original_max_position_embeddings"] = self.values["original_max_position_embeddings"]
        return RopeParameters(theta=theta.number("rope_theta", 10000.0), rope_type=rope_type, scaling=scaling)

    def windows(self) -> tuple[int | None, ...]:
        """Each layer's sliding window, as the Qwen families write it: `use_sliding_window` and either `layer_types`
        or `max_window_layers`, the number of first layers that have none."""
        num_layers = self.integer("num_hidden_layers")
        if not self.flag("use_sliding_window", False):
            return (None,) * num_layers
        window = self.integer("sliding_window")
        types = self.values.get("layer_types")
        if types is None:
            first = int(self._get("max_window_layers", 28))
            types = [_LAYER_TYPES[layer >= first] for layer in range(num_layers)]
        if len(types) != num_layers or not set(types) <= set(_LAYER_TYPES):
            raise ValueError(
                f"config field layer_types={types!r} is not supported; "
                f"allowed: {num_layers} of {', '.join(_LAYER_TYPES)}"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in types)

    def decoder(self, **family: Any) -> DecoderConfig:
        """What every family shares, completed by the family's own facts."""
        self._refuse_what_is_unsupported()
        hidden_size, num_heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        num_kv_heads = self.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"config field num_key_value_heads={num_kv_heads} is out of range; "
                f"allowed: a divisor of num_attention_heads={num_heads}"
            )
        head_dim = self.integer("head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise ValueError(f"config field head_dim={head_dim} is out of range; allowed: an even number")
        num_layers, rope = self.integer("num_hidden_layers"), self.rope()
        facts: dict[str, Any] = {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": hidden_size,
            "intermediate_size": self.integer("intermediate_size"),
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self._context_length(rope),
            "rms_norm_eps": self.number("rms_norm_eps", 1e-6),
            "tie_word_embeddings": self.flag("tie_word_embeddings", False),
            "rope": rope,
            "layer_windows": (None,) * num_layers,
        }
        return DecoderConfig(**(facts | family))

    def _context_length(self, rope: RopeParameters) -> int:
        """Tokens that the model can follow. A config that asks for YaRN may still give the length before it."""
        given = self.integer("max_position_embeddings")
        original, factor = rope.scaling.get("original_max_position_embeddings"), rope.scaling.get("factor")
        if rope.rope_type == "yarn" and original and factor:
            return max(given, int(original * factor))
        return given

    def _refuse_what_is_unsupported(self) -> None:
        activation = self.values.get("hidden_act", "silu")
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"config field hidden_act={activation!r} is not supported; allowed: {', '.join(_ACTIVATIONS)}"
            )
