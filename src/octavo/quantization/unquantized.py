"""Weights in the model's own dtype; on a CPU, in the blocked layout that oneDNN multiplies fastest; on a GPU, read by
a kernel of their own where the tokens are few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton as device_kernels
from octavo.quantization.scheme import Fp8Tokens, LinearLayer

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


class UnquantizedScheme:
    """Holds `weight` and `bias` as parameters; once packed, `packed_weight` and `packed_bias` in their place.

    Invariant: one of `weight` and `packed_weight` is None, and the latter is opaque. It is no parameter, so that
    nothing that wants a plain tensor (state_dict, parameters, to) meets it.
    """

    def create_weights(
        self,
        layer: LinearLayer,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = None
        if bias:
            layer.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        layer.packed_weight = None
        layer.packed_bias = None

    def load(self, layer: LinearLayer, name: str, row: int, tensor: Tensor, last: bool) -> None:
        held: Tensor = getattr(layer, name)
        if tensor is not held:  # a tied layer is handed the very tensor that it holds
            held[row : row + len(tensor)].copy_(tensor)
        weight = layer.weight
        if last and weight is not None and can_pack(weight.dtype, weight.device):
            layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight.data)
            layer.packed_bias = None if layer.bias is None else layer.bias.data
            layer.weight = None

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:  # noqa: ARG002
        return False

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        assert isinstance(x, Tensor)
        packed = layer.packed_weight
        if packed is None:
            assert layer.weight is not None
            kernels = device_kernels.get() if x.is_cuda else None
            if kernels is not None and 0 < len(x) <= kernels.SKINNY_MAX_M and x.dtype in _SKINNY_DTYPES:
                few: Tensor = kernels.skinny_linear(x, layer.weight, layer.bias)
                return few
            return F.linear(x, layer.weight, layer.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, layer.packed_bias, "none", [], "")
        return product


UNQUANTIZED = UnquantizedScheme()
