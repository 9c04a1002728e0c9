"""Weights in the model's own dtype; on a CPU, in the blocked layout that oneDNN multiplies fastest; on a GPU, read by
a kernel of their own where the tokens are few."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton as device_kernels
from octavo.quantization.launches import skinny_launches
from octavo.quantization.scheme import Fp8Tokens, LinearLayer, LinearScheme, LinearShape, TensorSpec

_CPU_DTYPES = (torch.bfloat16, torch.float32)
_SKINNY_DTYPES = (torch.bfloat16, torch.float16)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN can hold such a weight packed, and multiply by it, on this machine."""
    if device.type != "cpu" or dtype not in _CPU_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    if not hasattr(operators, "_linear_pointwise") or not hasattr(operators, "_reorder_linear_weight"):
        return False
    return dtype != torch.bfloat16 or operators._is_mkldnn_bf16_supported()


def is_skinny(x: Tensor | Fp8Tokens) -> bool:
    """Whether the kernels for few tokens take these."""
    kernels = device_kernels.get()
    if kernels is None or isinstance(x, Fp8Tokens) or not x.is_cuda:
        return False
    return 0 < len(x) <= kernels.SKINNY_MAX_M and x.dtype in _SKINNY_DTYPES


class UnquantizedScheme:
    """Holds `weight` as a parameter; once packed, `packed_weight` and `packed_bias` in its place.

    Invariant: one of `weight` and `packed_weight` is None, and the latter is opaque. It is no parameter, so that
    nothing that wants a plain tensor (state_dict, parameters, to) meets it.
    """

    fuses = True

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(shape=(num_rows, in_features))}

    def create_weights(self, layer: LinearLayer) -> None:
        weight = torch.empty(layer.out_features, layer.in_features, dtype=layer.dtype, device=layer.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)

    def load(self, layer: LinearLayer, row: int, num_rows: int, tensors: Mapping[str, Tensor]) -> None:
        assert layer.weight is not None
        layer.weight[row : row + num_rows].copy_(tensors["weight"])

    def finish(self, layer: LinearLayer) -> None:
        weight = layer.weight
        if weight is not None and can_pack(weight.dtype, weight.device):
            layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight.data)
            layer.packed_bias = None if layer.bias is None else layer.bias.data
            layer.weight = None

    def num_bytes(self, layer: LinearLayer) -> int:
        packed = layer.packed_weight is not None
        return layer.out_features * layer.in_features * layer.dtype.itemsize if packed else 0

    def launches(self, shape: LinearShape) -> dict[Hashable, Callable[[], object]]:
        kernels = device_kernels.get()
        return skinny_launches(
            shape, 2, lambda x, weight, plan, gated: kernels.skinny_linear(x, weight, plan=plan, gated=gated)
        )

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:  # noqa: ARG002
        return False

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        assert isinstance(x, Tensor)
        packed = layer.packed_weight
        if packed is None:
            assert layer.weight is not None
            if is_skinny(x):
                few: Tensor = device_kernels.get().skinny_linear(x, layer.weight, layer.bias)
                return few
            return F.linear(x, layer.weight, layer.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, layer.packed_bias, "none", [], "")
        return product

    def apply_gated(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor | None:
        if layer.weight is None or not is_skinny(x):
            return None
        product: Tensor = device_kernels.get().skinny_linear(x, layer.weight, layer.bias, gated=True)
        return product


UNQUANTIZED = UnquantizedScheme()


class EveryLayer:
    """A QuantizationMethod: one scheme for the projections of all layers; the head keeps the model's dtype."""

    def __init__(self, scheme: LinearScheme, skipped: Sequence[str] = ()) -> None:
        """skipped: modules whose projections keep the model's dtype too, as `is_within` matches them."""
        self._scheme, self._skipped = scheme, tuple(skipped)

    def scheme_of(self, name: str) -> LinearScheme:
        is_plain = name == "lm_head" or any(is_within(name, module) for module in self._skipped)
        return UNQUANTIZED if is_plain else self._scheme


def is_within(name: str, module: str) -> bool:
    """Whether a part is the module, or lies in it. module: a path from the model's root, or any run of whole
    components of one ("model.layers.0", "mlp.down_proj", "o_proj")."""
    return f".{module}." in f".{name}."


PLAIN = EveryLayer(UNQUANTIZED)
