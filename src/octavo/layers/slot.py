"""Where a checkpoint tensor goes: every layer that owns a shape says which tensors fill it, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One checkpoint tensor. shape: as it stands in the checkpoint; load: copies it in, casting its dtype."""

    shape: tuple[int, ...]
    load: Callable[[Tensor], object]


@runtime_checkable
class HoldsWeights(Protocol):
    """A layer that is filled from a checkpoint."""

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        """By checkpoint name, given the layer's own path in the model ("model.layers.0.mlp.down_proj")."""
        ...
