"""LinearScheme: how a linear layer's weights lie in memory and how they are multiplied."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class LinearLayer(nn.Module):
    """What schemes keep on a linear layer; which of it is None, the scheme says."""

    weight: nn.Parameter | None
    weight_scale: nn.Parameter | None
    bias: nn.Parameter | None
    packed_weight: Tensor | None
    packed_bias: Tensor | None


class LinearScheme(Protocol):
    """Three verbs on a linear layer. A scheme has no state of its own: it keeps what it makes on the layer."""

    def create_weights(
        self,
        layer: LinearLayer,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Give the layer room for its weight [out_features, in_features] and, if asked, its bias [out_features]."""
        ...

    def load(self, layer: LinearLayer, name: str, row: int, tensor: Tensor, last: bool) -> None:
        """Take a checkpoint tensor into rows [row, row + len(tensor)) of `name` ("weight" or "bias").

        last: nothing more will be loaded, and the layer must be ready for `apply` on return.
        """
        ...

    def apply(self, layer: LinearLayer, x: Tensor) -> Tensor:
        """x: [T, in_features] in the layer's dtype. Returns a new tensor [T, out_features] of that dtype."""
        ...
