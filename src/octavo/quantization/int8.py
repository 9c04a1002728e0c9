"""8-bit integers on both sides of a product (W8A8): as compressed-tensors' int-quantized has them, after SmoothQuant
(Xiao et al., 2023).

The product of integers is exact, in int32; scales come after it. How activations become integers is part of the
format, so all backends do it alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.quantization.grouped import Codes
from octavo.quantization.scheme import Fp8Tokens, LinearLayer, LinearShape, TensorSpec
from octavo.quantization.values import DUMMY_STD, TINY, check_scales, full, integers, pieces

_LOWEST, _HIGHEST = -128, 127
_STD = 255 / 12**0.5  # of integers that are spread evenly
_SCALE_EPS = torch.finfo(torch.float32).eps  # the scale of a token of zeros
_MIN_ROWS = 32  # a GPU multiplies integers of more than 16 tokens; fewer are filled up to this


def weight_specs(in_features: int, num_rows: int, groups: int = 1) -> dict[str, TensorSpec]:
    """An int8 weight and its scales: one for all, one a row, or if there are several groups, one for each of a row."""
    shape, scales = (num_rows, in_features), (num_rows, groups)
    others = ((), (1,), (num_rows,)) if groups == 1 else ()
    return {
        "weight": TensorSpec(shape=shape, dtypes=(torch.int8,), dummy=integers(-128, 128, torch.int8, *shape)),
        "weight_scale": TensorSpec(shape=scales, other_shapes=others, dummy=full(DUMMY_STD / _STD, *scales)),
    }


@dataclass(frozen=True)
class Int8Groups:
    """A GroupedFormat, for activations that stay in full (W8A16): W = weight * weight_scale. group_size: -1 for one
    scale a row, or one for all."""

    group_size: int

    bits = 8

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        size = in_features if self.group_size == -1 else self.group_size
        return weight_specs(in_features, num_rows, -(-in_features // size))

    def codes(self, in_features: int, num_rows: int, tensors: Mapping[str, Tensor]) -> Codes:  # noqa: ARG002
        scale = tensors["weight_scale"]
        check_scales("weight_scale", scale)
        if scale.dim() < 2:
            scale = scale.flatten().expand(num_rows)[:, None].contiguous()
        return Codes((tensors["weight"].to(torch.int16) - _LOWEST).to(torch.uint8), scale)


class StaticInput(NamedTuple):
    """scale: float32 [1]; zero: float32 [1], a whole number."""

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Int8Scheme:
    """Holds `weight` int8 [N, K] and `weight_scale` float32 [N] as parameters; as `held`, the sums of the weight's
    rows where the format has zeros that are not 0, and a static scale of the activations.

    static: one scale of all activations, and if not symmetric one zero, come with the checkpoint; else every token
    gets its own.
    """

    static: bool
    symmetric: bool

    @property
    def fuses(self) -> bool:
        return not self.static  # parts of one matrix differ in their scale

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        specs = weight_specs(in_features, num_rows)
        if self.static:
            specs["input_scale"] = TensorSpec(shape=(1,), other_shapes=((),), dummy=full(4 / 127, 1))
            if not self.symmetric:
                zero = integers(-8, 9, torch.int8, 1)
                specs["input_zero_point"] = TensorSpec(shape=(1,), other_shapes=((),), dtypes=(torch.int8,), dummy=zero)
        return specs

    def create_weights(self, layer: LinearLayer) -> None:
        weight = torch.empty(layer.out_features, layer.in_features, dtype=torch.int8, device=layer.device)
        scale = torch.empty(layer.out_features, dtype=torch.float32, device=layer.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    def load(self, layer: LinearLayer, row: int, num_rows: int, tensors: Mapping[str, Tensor]) -> None:
        assert layer.weight is not None
        assert layer.weight_scale is not None
        check_scales("weight_scale", tensors["weight_scale"])
        rows = slice(row, row + num_rows)
        layer.weight[rows].copy_(tensors["weight"])
        layer.weight_scale[rows].copy_(tensors["weight_scale"].flatten().expand(num_rows))
        if self.static:
            check_scales("input_scale", tensors["input_scale"], TINY)
            scale = tensors["input_scale"].to(layer.device).float().view(1)
            zero = torch.zeros_like(scale) if self.symmetric else tensors["input_zero_point"].to(scale).view(1)
            layer.held = StaticInput(scale, zero)

    def finish(self, layer: LinearLayer) -> None:
        assert layer.weight is not None
        sums = None if self.symmetric else layer.weight.sum(1, dtype=torch.int32)
        layer.held = layer.held, sums

    def num_bytes(self, layer: LinearLayer) -> int:
        sums: Tensor | None = layer.held[1]
        return 0 if sums is None else sums.nbytes

    def launches(self, shape: LinearShape) -> dict[Hashable, Callable[[], object]]:  # noqa: ARG002
        return {}

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:  # noqa: ARG002
        return False

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        assert isinstance(x, Tensor)
        weight, weight_scale = layer.weight, layer.weight_scale
        assert weight is not None
        assert weight_scale is not None
        if x.is_cuda and any(size % 8 for size in weight.shape):  # what its product of integers cannot take
            plain = (weight.float() * weight_scale[:, None]).to(x.dtype)
            return F.linear(x, plain, layer.bias)
        static, sums = layer.held
        values, scale, zero = quantize_tokens(x, static, self.symmetric)
        scale, zero = scale.expand(len(x), 1), zero.expand(len(x), 1)
        out = torch.empty(len(x), layer.out_features, dtype=x.dtype, device=x.device)
        for tokens in pieces(out):
            product = multiply(values[tokens], weight)
            if sums is not None:
                product -= zero[tokens].int() * sums
            wide = product.float() * scale[tokens] * weight_scale
            out[tokens] = wide if layer.bias is None else wide + layer.bias.float()
        return out

    def apply_gated(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor | None:  # noqa: ARG002
        return None


def quantize_tokens(x: Tensor, static: StaticInput | None, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x: floating-point [T, K]. Returns int8 [T, K], scale and zero float32 [T, 1] or [1]: x ~ (values - zero) * scale.

    A token's scale takes its largest magnitude to 127.5, or if not symmetric, its range with 0 to 255 steps
    (compressed-tensors, calculate_qparams).
    """
    wide = x.float()
    if static is not None:
        scale, zero = static
    elif symmetric:
        scale = wide.abs().amax(1, keepdim=True) / ((_HIGHEST - _LOWEST) / 2)
        scale = torch.where(scale == 0, _SCALE_EPS, scale)
        zero = torch.zeros_like(scale)
    else:
        low, high = wide.amin(1, keepdim=True).clamp(max=0), wide.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / (_HIGHEST - _LOWEST)
        scale = torch.where(scale == 0, _SCALE_EPS, scale)
        zero = (_LOWEST - low / scale).round().clamp(_LOWEST, _HIGHEST)
    values = (wide / scale + zero).round().clamp(_LOWEST, _HIGHEST)
    return values.to(torch.int8), scale, zero


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [T, K] by int8 [N, K]: int32 [T, N], exact."""
    missing = _MIN_ROWS - len(x)
    if x.is_cuda and missing > 0:
        return torch._int_mm(F.pad(x, (0, 0, 0, missing)), weight.t())[: len(x)]
    return torch._int_mm(x, weight.t())
