"""Weights in the model's own dtype; on a CPU, in the blocked layout that oneDNN multiplies fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CPU_DTYPES = (torch.bfloat16, torch.float32)


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

    Invariant: `packed_weight` is None or opaque. It is no parameter, so that nothing that wants a plain tensor
    (state_dict, parameters, to) meets it.
    """

    def create_weights(
        self, layer: nn.Module, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = None
        if bias:
            layer.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        layer.packed_weight = None
        layer.packed_bias = None

    def load(self, layer: nn.Module, name: str, row: int, tensor: Tensor, last: bool) -> None:
        held = getattr(layer, name)
        if tensor is not held:  # a tied layer is handed the very tensor that it holds
            held[row : row + len(tensor)].copy_(tensor)
        if last and can_pack(layer.weight.dtype, layer.weight.device):
            layer.packed_weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.data)
            layer.packed_bias = None if layer.bias is None else layer.bias.data
            layer.weight = None

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        packed = layer.packed_weight
        if packed is None:
            return F.linear(x, layer.weight, layer.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, packed, layer.packed_bias, "none", [], "")
