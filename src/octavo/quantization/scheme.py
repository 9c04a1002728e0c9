"""LinearScheme: how a linear layer's weights lie in memory and how they are multiplied."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Fp8Tokens(NamedTuple):
    """Activations quantised token by token, where the operation that made them did so: x ~ values * scale.

    values: float8_e4m3fn [T, features]; scale: float32 [T, 1].
    """

    values: Tensor
    scale: Tensor


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

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:
        """Whether `apply` would quantise activations that have the tokens, dtype and device of `like`: then they may
        as well come as Fp8Tokens."""
        ...

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        """x: [T, in_features] in the layer's dtype, or Fp8Tokens if `takes_fp8`. Returns a new tensor
        [T, out_features] of the layer's dtype."""
        ...
