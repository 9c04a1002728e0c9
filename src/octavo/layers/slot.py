"""Where a checkpoint tensor goes: every layer that owns a shape says which tensors fill it, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from octavo.quantization.scheme import TensorSpec


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One checkpoint tensor. load: takes one that fits the spec, None where the checkpoint lacks one that is not
    required; it raises ValueError, in words, for values that cannot be."""

    spec: TensorSpec
    load: Callable[[Tensor | None], None]


def copied_into(held: Tensor, shape: tuple[int, ...] | None = None, dummy: float | None = None) -> WeightSlot:
    """The slot of a tensor that is kept as it is, in the dtype of `held`. shape: in the checkpoint, where it is copied
    into every row of `held`; dummy: what it is full of in a model without a checkpoint, None for random values."""
    shape = shape or tuple(held.shape)

    def load(tensor: Tensor | None) -> None:
        assert tensor is not None
        held.copy_(tensor)

    def full(generator: torch.Generator) -> Tensor:
        return torch.full(shape, dummy or 0.0, device=generator.device)

    return WeightSlot(TensorSpec(shape=shape, dummy=None if dummy is None else full), load)


@runtime_checkable
class HoldsWeights(Protocol):
    """A layer that is filled from a checkpoint."""

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        """By checkpoint name, given the layer's own path in the model ("model.layers.0.mlp.down_proj")."""
        ...
