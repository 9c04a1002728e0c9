"""Rotary position embedding (RoFormer: Su et al., 2021) and the ways to stretch it to longer contexts.

Heads are rotated in halves (the NeoX layout): element i turns with element i + head_dim / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """theta: base of the frequencies; rope_type: a key of ROPE_TYPES; scaling: that type's own parameters."""

    theta: float
    rope_type: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)


class RotaryEmbedding(nn.Module):
    """Turns positions into rotations, once a step; every layer applies the same ones.

    There is no table: a step computes the angles of its own positions in float32, so any position is exact.
    """

    def __init__(
        self,
        rope: RopeParameters,
        head_dim: int,
        max_position_embeddings: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises ValueError naming a rope parameter that is missing or of the wrong size."""
        super().__init__()
        frequencies, self.amplitude = ROPE_TYPES[rope.rope_type](rope, head_dim, max_position_embeddings)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.cat((frequencies, frequencies)).to(device), persistent=False)
        sign = torch.ones(head_dim, device=device)
        sign[: head_dim // 2] = -1
        self.signed_amplitude: Tensor
        self.register_buffer("signed_amplitude", sign * self.amplitude, persistent=False)
        self._dtype = dtype

    def forward(self, positions: Tensor) -> Rotation:
        """positions: int64 [T]. Returns what `rotate` takes: cosines and signed sines, [T, 1, head_dim] each."""
        angles = positions[:, None, None] * self.frequencies
        return (angles.cos() * self.amplitude).to(self._dtype), (angles.sin() * self.signed_amplitude).to(self._dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head by its token's angles. heads: [T, H, head_dim]. Returns a new tensor like it."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _default(rope: RopeParameters, head_dim: int, _max_position_embeddings: int) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [head_dim / 2], and the factor of the cosines and sines."""
    return 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim), 1.0


def _linear(rope: RopeParameters, head_dim: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al., 2023)."""
    frequencies, amplitude = _default(rope, head_dim, max_position_embeddings)
    return frequencies / _number(rope, "factor"), amplitude


def _dynamic(rope: RopeParameters, head_dim: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    """Dynamic NTK scaling. It raises theta for a sequence of more than max_position_embeddings tokens only
    (as in transformers); max_model_len never lets one grow so long, so what is left is plain RoPE."""
    _number(rope, "factor")
    return _default(rope, head_dim, max_position_embeddings)


def _llama3(rope: RopeParameters, head_dim: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    frequencies, amplitude = _default(rope, head_dim, max_position_embeddings)
    factor = _number(rope, "factor")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    original = _number(rope, "original_max_position_embeddings", max_position_embeddings)
    # Turns that a frequency makes over the original context: below `low` stretched, above `high` kept.
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies, amplitude


def _yarn(rope: RopeParameters, head_dim: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023), with DeepSeek's mscale parameters where they are given."""
    frequencies, _ = _default(rope, head_dim, max_position_embeddings)
    original = _number(rope, "original_max_position_embeddings", max_position_embeddings)
    factor = _number(rope, "factor", max_position_embeddings / original)

    def dimension(turns: float) -> float:
        """The (fractional) dimension whose frequency makes so many turns over the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(_number(rope, "beta_fast", 32)), dimension(_number(rope, "beta_slow", 1))
    if rope.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # no division by zero: the ramp becomes a step
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = mscale(1.0)
    if rope.scaling.get("mscale") and rope.scaling.get("mscale_all_dim"):
        amplitude = mscale(_number(rope, "mscale")) / mscale(_number(rope, "mscale_all_dim"))
    amplitude = _number(rope, "attention_factor", amplitude)
    return frequencies / factor * stretched + frequencies * (1 - stretched), amplitude


def _factors(rope: RopeParameters, head_dim: int, max_position_embeddings: int) -> tuple[Tensor, float]:
    """One divisor for each frequency: what a GGUF file's tensor rope_freqs.weight holds."""
    frequencies, amplitude = _default(rope, head_dim, max_position_embeddings)
    factors = torch.tensor(rope.scaling["factors"], dtype=torch.float32)
    if factors.shape != frequencies.shape:
        raise ValueError(f"rope factors: there are {len(factors)}; expected head_dim / 2 = {len(frequencies)}")
    return frequencies / factors, amplitude


def _number(rope: RopeParameters, name: str, default: float | None = None) -> float:
    value = rope.scaling.get(name)
    if value is None:
        value = default
    if not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"rope_parameters.{name}={value!r}: rope_type {rope.rope_type!r} needs a positive number")
    return value


ROPE_TYPES: dict[str, Callable[[RopeParameters, int, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": _factors,
}
