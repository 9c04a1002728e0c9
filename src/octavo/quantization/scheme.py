"""LinearScheme: how a linear layer's weights lie in a checkpoint and in memory, and how they are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DUMMY_STD = 0.02  # the initializer_range of most families


class Fp8Tokens(NamedTuple):
    """Activations quantised token by token, where the operation that made them did so: x ~ values * scale.

    values: float8_e4m3fn [T, features]; scale: float32 [T, 1].
    """

    values: Tensor
    scale: Tensor


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a tensor of a checkpoint may look like.

    shape: -1 stands for any size; other_shapes: allowed as well; required: whether a checkpoint must have it;
    dummy: random values of the shape for a model without a checkpoint. None for normal ones, or for none at all of a
    tensor that is not required.
    """

    shape: tuple[int, ...]
    other_shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    required: bool = True
    dummy: Callable[[torch.Generator], Tensor] | None = None

    def problem(self, name: str, tensor: Tensor) -> str | None:
        """What is wrong with a checkpoint's tensor, in words."""
        shapes = (self.shape, *self.other_shapes)
        if not any(_fits(tuple(tensor.shape), shape) for shape in shapes):
            return (
                f"{name} has shape {list(tensor.shape)}, expected {' or '.join(str(list(shape)) for shape in shapes)}"
            )
        if tensor.dtype not in self.dtypes:
            expected = "a floating-point type" if self.dtypes == FLOATS else ", ".join(map(str, self.dtypes))
            return f"{name} has dtype {tensor.dtype}, expected {expected}"
        return None

    def make_dummy(self, generator: torch.Generator) -> Tensor:
        """Values that a model can run with, on the generator's device: the same from a generator in the same state."""
        if self.dummy is not None:
            return self.dummy(generator)
        values = torch.empty(self.shape, device=generator.device)
        return values.normal_(0, _DUMMY_STD, generator=generator)


def _fits(shape: tuple[int, ...], allowed: tuple[int, ...]) -> bool:
    return len(shape) == len(allowed) and all(size in (-1, given) for given, size in zip(shape, allowed))


class LinearShape(NamedTuple):
    """dtype: of the activations. is_gated: whether `apply_gated` is what the layer is for."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device
    is_gated: bool = False


class LinearLayer(nn.Module):
    """Consecutive rows of a linear layer's matrix under one scheme, which decides what of this is None.

    held: what a scheme keeps that has no name here, of a type of its own.
    """

    weight: nn.Parameter | None
    weight_scale: nn.Parameter | None
    bias: nn.Parameter | None
    packed_weight: Tensor | None
    packed_bias: Tensor | None
    held: Any

    def __init__(
        self,
        scheme: LinearScheme,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """The weights are uninitialised until loaded. dtype: of the activations, and of the bias."""
        super().__init__()
        self.scheme, self.in_features, self.out_features = scheme, in_features, out_features
        self.dtype, self.device = dtype, device
        self.weight = self.weight_scale = self.bias = self.packed_weight = self.packed_bias = self.held = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        scheme.create_weights(self)


class LinearScheme(Protocol):
    """Three verbs on a linear layer, and what a checkpoint holds for them. A scheme knows one format with its numbers
    (bits, group size); what it makes it keeps on the layer."""

    @property
    def fuses(self) -> bool:
        """Whether parts of one matrix that share the scheme may lie in one layer."""
        ...

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        """A checkpoint's tensors for a part [num_rows, in_features] of a layer, by the end of their names
        ("weight"), the bias left out. Raises ValueError for sizes that the format cannot have."""
        ...

    def create_weights(self, layer: LinearLayer) -> None:
        """Give the layer room for its weight [out_features, in_features]."""
        ...

    def load(self, layer: LinearLayer, row: int, num_rows: int, tensors: Mapping[str, Tensor]) -> None:
        """Take a part's tensors into rows [row, row + num_rows); those that are not required may be missing.

        Raises ValueError, in words, for values that cannot be.
        """
        ...

    def finish(self, layer: LinearLayer) -> None:
        """All is loaded, the bias included: make the layer ready for `apply`. Raises as `load`, for parts that do not
        go together."""
        ...

    def num_bytes(self, layer: LinearLayer) -> int:
        """Memory that the layer holds besides its parameters."""
        ...

    def launches(self, shape: LinearShape) -> dict[Hashable, Callable[[], object]]:
        """The kernels that `apply` and `apply_gated` launch on a GPU for a layer of this shape, by what they are
        compiled for: each call compiles one. What a library brings compiled is left out."""
        ...

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:
        """Whether `apply` would quantise activations that have the tokens, dtype and device of `like`: then they may
        as well come as Fp8Tokens."""
        ...

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        """x: [T, in_features] in the layer's dtype, or Fp8Tokens if `takes_fp8`. Returns a new tensor
        [T, out_features] of the layer's dtype."""
        ...

    def apply_gated(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor | None:
        """silu(gate) * up of what `apply` makes, gates in its first half: [T, out_features / 2], where one kernel makes
        that of such tokens; else None."""
        ...


class QuantizationMethod(Protocol):
    """What a checkpoint, or an option, says of every linear layer's format."""

    def scheme_of(self, name: str) -> LinearScheme:
        """name: of a part, as the checkpoint's tensors carry it ("model.layers.0.self_attn.q_proj")."""
        ...


def layers_of(parts: Mapping[str, int], method: QuantizationMethod) -> list[tuple[LinearScheme, dict[str, int]]]:
    """The LinearLayers that a matrix is cut into: neighbouring parts in one format share one, where it fuses.

    parts: rows of each by name, in order, as for `scheme_of`. Returns the scheme and the parts of each layer.
    """
    schemes = {name: method.scheme_of(name) for name in parts}
    groups = groupby(parts, key=lambda name: schemes[name] if schemes[name].fuses else name)
    runs = [list(names) for _, names in groups]
    return [(schemes[run[0]], {name: parts[name] for name in run}) for run in runs]
