"""Linear layers, fused or not: the rows of one matrix may come from several checkpoint tensors, in several formats."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from octavo.layers.lora import LinearAdapters
from octavo.layers.slot import WeightSlot
from octavo.quantization.scheme import Fp8Tokens, LinearLayer, QuantizationMethod, TensorSpec, layers_of
from octavo.quantization.unquantized import UNQUANTIZED


class Linear(nn.Module):
    """y = x Wᵀ + b, where W stacks the rows of its parts: {"q_proj": 64, "k_proj": 32, "v_proj": 32}.

    A part's checkpoint tensors lie beside the layer: `self_attn.qkv_proj` is filled from
    `self_attn.q_proj.weight`, `self_attn.k_proj.weight` and so on. Neighbouring parts in one format share a
    LinearLayer, and so one product.
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        """parts: rows of each, in order. There are no weights before `create_weights`."""
        super().__init__()
        self.in_features, self.out_features = in_features, sum(parts.values())
        self._parts, self._bias = dict(parts), bias
        self._dtype, self._device = dtype, device
        self.layers = nn.ModuleList()
        self._loaders: list[_Loader] = []
        self.adapters: LinearAdapters | None = None  # of an engine that serves LoRA

    def create_weights(self, path: str, method: QuantizationMethod) -> None:
        """path: the layer's own in the model. The weights are uninitialised until loaded.

        Raises ValueError naming a part whose size its format cannot have.
        """
        parts = self.part_rows(path)
        for scheme, sizes in layers_of(parts, method):
            num_rows = sum(sizes.values())
            layer = LinearLayer(scheme, self.in_features, num_rows, self._bias, self._dtype, self._device)
            self.layers.append(layer)
            self._loaders.append(_Loader(layer, sizes))

    def part_rows(self, path: str) -> dict[str, int]:
        """Rows of each part, by its name in a checkpoint. path: the layer's own in the model."""
        parent = path.rpartition(".")[0]
        return {f"{parent}.{part}" if parent else part: num_rows for part, num_rows in self._parts.items()}

    def takes_fp8(self, like: Tensor) -> bool:
        """Whether activations with the tokens, dtype and device of `like` may as well come quantised."""
        if self.adapters is not None and self.adapters.are_active:
            return False
        return all(layer.scheme.takes_fp8(layer, like) for layer in self.layers)

    def forward(self, x: Tensor | Fp8Tokens) -> Tensor:
        """x: [T, in_features], quantised only if `takes_fp8`. Returns [T, out_features]."""
        if self.adapters is None or not self.adapters.are_active:
            return self._product(x)
        assert isinstance(x, Tensor)
        return self.adapters.add(self._product, x)

    def gated(self, x: Tensor | Fp8Tokens) -> Tensor | None:
        """silu(gate) * up, [T, out_features / 2], of parts that are gates and as many ups, where one kernel makes it of
        such tokens; else None. The same numbers as `forward` and `silu_and_mul`."""
        if len(self.layers) > 1 or (self.adapters is not None and self.adapters.are_active):
            return None
        (layer,) = self.layers
        product: Tensor | None = layer.scheme.apply_gated(layer, x)
        return product

    def _product(self, x: Tensor | Fp8Tokens) -> Tensor:
        products = [layer.scheme.apply(layer, x) for layer in self.layers]
        return products[0] if len(products) == 1 else torch.cat(products, -1)

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:  # noqa: ARG002
        return {name: slot for loader in self._loaders for name, slot in loader.slots().items()}

    def tie(self, weight: nn.Parameter) -> None:
        """Use another layer's loaded weight [out_features, in_features], unquantized, as this one's."""
        (layer,) = self.layers
        assert layer.scheme is UNQUANTIZED
        layer.weight = weight
        UNQUANTIZED.finish(layer)

    def num_bytes(self) -> int:
        """Memory of the weights that are no parameters."""
        return sum(layer.scheme.num_bytes(layer) for layer in self.layers)


class _Loader:
    """Brings the tensors of a layer's parts together: a format makes its rows of all that a part has."""

    def __init__(self, layer: LinearLayer, parts: Mapping[str, int]) -> None:
        """parts: rows of each, in order. Raises ValueError naming a part whose size its format cannot have."""
        self._layer = layer
        self._specs: dict[str, dict[str, TensorSpec]] = {}
        self._rows: dict[str, tuple[int, int]] = {}  # first row and number of rows of each part
        self._taken: dict[str, dict[str, Tensor | None]] = {name: {} for name in parts}  # parts not complete yet
        row = 0
        for name, num_rows in parts.items():
            try:
                self._specs[name] = layer.scheme.tensors(layer.in_features, num_rows)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            if layer.bias is not None:
                self._specs[name]["bias"] = TensorSpec(shape=(num_rows,))
            self._rows[name] = row, num_rows
            row += num_rows

    def slots(self) -> dict[str, WeightSlot]:
        return {
            f"{name}.{end}": WeightSlot(spec, partial(self._take, name, end))
            for name, specs in self._specs.items()
            for end, spec in specs.items()
        }

    def _take(self, name: str, end: str, tensor: Tensor | None) -> None:
        taken = self._taken[name]
        taken[end] = tensor
        if len(taken) < len(self._specs[name]):
            return
        layer, (row, num_rows) = self._layer, self._rows[name]
        if layer.bias is not None:
            bias = taken.pop("bias")
            assert bias is not None
            layer.bias[row : row + num_rows].copy_(bias)
        tensors = {end: tensor for end, tensor in taken.items() if tensor is not None}
        try:
            layer.scheme.load(layer, row, num_rows, tensors)
            del self._taken[name]
            if not self._taken:
                layer.scheme.finish(layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
