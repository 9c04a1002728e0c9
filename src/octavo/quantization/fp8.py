"""FP8 weights with one scale a row, or one for all rows (formats: Micikevicius et al., 2022, "FP8 Formats").

Where a checkpoint has one scale for a tensor, every row of the part gets it: so parts of a fused matrix that differ in
their scale lie in one matrix as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton as device_kernels
from octavo.quantization.launches import skinny_launches
from octavo.quantization.scheme import Fp8Tokens, LinearLayer, LinearShape, TensorSpec
from octavo.quantization.unquantized import UNQUANTIZED, is_skinny
from octavo.quantization.values import DUMMY_STD, TINY, check_scales, full, normal_fp8, pieces

FP8_MAX = 448.0  # the largest finite float8_e4m3fn
SCALE_MIN = 1e-12  # a channel of zeros gets a tiny scale, not none
_FULL_MAX_M = 8  # tokens that are multiplied as they are, where there is a kernel for more
# AutoFP8's and compressed-tensors' names, and those of transformers.
_SCALE_NAMES = "weight_scale", "weight_scale_inv"
_INPUT_SCALE_NAMES = "input_scale", "activation_scale"


class Fp8Format(Protocol):
    """Where such weights come from. Equal formats compare equal.

    is_stored: a checkpoint holds them so. On a CPU these are dequantized once, when they are loaded; weights that were
    quantized to save memory stay as they are.
    """

    @property
    def is_stored(self) -> bool: ...

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        """As LinearScheme.tensors."""
        ...

    def rows(self, tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """A part's rows, some at a time: float8_e4m3fn [R, in_features] and its scales, floating-point [R].

        tensors: as LinearScheme.load has them. Raises ValueError, in words, for values that cannot be."""
        ...


@dataclass(frozen=True)
class Fp8Scheme:
    """Holds `weight` float8_e4m3fn [N, K], `weight_scale` float32 [N] and `bias` in the model's dtype, as parameters;
    where it was dequantized, what UNQUANTIZED holds.

    The weight is taken as its parts arrive, so that it never lies in memory whole in another dtype. Few tokens are
    multiplied as they are, for then the weight's bytes are what costs (W8A16); more are quantised too, one scale a
    token, for the FP8 tensor cores (W8A8), unless the format keeps activations in full (quantizes_tokens).
    """

    format: Fp8Format
    quantizes_tokens: bool = True

    fuses = True

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        return self.format.tensors(in_features, num_rows)

    def create_weights(self, layer: LinearLayer) -> None:
        rows, columns = layer.out_features, layer.in_features
        weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=layer.device)
        scale = torch.empty(rows, dtype=torch.float32, device=layer.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    def load(self, layer: LinearLayer, row: int, num_rows: int, tensors: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        assert layer.weight is not None
        assert layer.weight_scale is not None
        for weight, scale in self.format.rows(tensors, layer.device):
            rows = slice(row, row + len(weight))
            layer.weight[rows], layer.weight_scale[rows] = weight, scale
            row = rows.stop

    def finish(self, layer: LinearLayer) -> None:
        if layer.device.type == "cpu" and self.format.is_stored:
            assert layer.weight is not None
            assert layer.weight_scale is not None
            plain = dequantize_rows(layer.weight, layer.weight_scale, layer.dtype)
            layer.weight, layer.weight_scale = nn.Parameter(plain, requires_grad=False), None
            UNQUANTIZED.finish(layer)

    def num_bytes(self, layer: LinearLayer) -> int:
        return UNQUANTIZED.num_bytes(layer)

    def launches(self, shape: LinearShape) -> dict[Hashable, Callable[[], object]]:
        kernels = device_kernels.get()

        def multiply(x: Tensor, weight: Tensor, plan: Any, gated: bool) -> None:
            scale = torch.zeros(len(weight), device=weight.device)
            kernels.skinny_linear_fp8(x, weight.to(torch.float8_e4m3fn), scale, plan=plan, gated=gated)

        found = skinny_launches(shape, 1, multiply)
        if self.quantizes_tokens and shape.dtype == torch.bfloat16:
            tokens = torch.zeros(1, shape.in_features, dtype=shape.dtype, device=shape.device)
            found["quantize", shape.in_features] = lambda: kernels.quantize_fp8(tokens)
            for m in range(_FULL_MAX_M + 1, kernels.FP8_MAX_M + 1):
                plan = kernels.Fp8Plan.of(m, shape.out_features, shape.in_features, shape.device)
                if plan is not None:
                    found["fp8", plan] = partial(_launch_fp8, shape, plan)
        return found

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:
        """Row-wise scales: cuBLAS and CUTLASS write bfloat16 and want whole blocks of 16."""
        if layer.weight is None or layer.weight_scale is None or not self.quantizes_tokens:
            return False
        kernels = device_kernels.get()
        if kernels is None or not like.is_cuda or like.dtype != torch.bfloat16 or len(like) <= _FULL_MAX_M:
            return False
        rows, columns = layer.weight.shape
        if len(like) <= kernels.SKINNY_MAX_M and kernels.Fp8Plan.of(len(like), rows, columns, like.device) is None:
            return False
        return rows % 16 == 0 and columns % 16 == 0

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        """On a CPU, or where a shape or dtype suits no FP8 kernel, by the dequantised weight: right, and slow."""
        weight, scale, bias = layer.weight, layer.weight_scale, layer.bias
        if weight is None or scale is None:
            return UNQUANTIZED.apply(layer, x)
        kernels = device_kernels.get()
        if isinstance(x, Tensor) and self.takes_fp8(layer, x):
            x = Fp8Tokens(*kernels.quantize_fp8(x.contiguous()))
        if isinstance(x, Fp8Tokens):
            plan = kernels.Fp8Plan.of(len(x.values), *weight.shape, weight.device)
            if plan is not None:
                made: Tensor = kernels.linear_fp8(x.values, x.scale, weight, scale, bias, plan=plan)
                return made
            return torch._scaled_mm(
                x.values,
                weight.t(),
                scale_a=x.scale,
                scale_b=scale[None, :],
                bias=bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        if is_skinny(x):
            product: Tensor = kernels.skinny_linear_fp8(x, weight, scale, bias)
            return product
        if not self.quantizes_tokens:
            return F.linear(x, dequantize_rows(weight, scale, x.dtype), bias)
        wide = F.linear(x.float(), weight.float() * scale[:, None], None if bias is None else bias.float())
        return wide.to(x.dtype)

    def apply_gated(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor | None:
        if layer.weight is None or layer.weight_scale is None:
            return UNQUANTIZED.apply_gated(layer, x)
        if not is_skinny(x) or self.takes_fp8(layer, x):
            return None
        kernels = device_kernels.get()
        product: Tensor = kernels.skinny_linear_fp8(x, layer.weight, layer.weight_scale, layer.bias, gated=True)
        return product


def _launch_fp8(shape: LinearShape, plan: Any) -> None:
    """A tile of a product that is cut up by this plan."""
    k = plan.block_k * plan.split_k
    x = torch.zeros(plan.tokens, k, dtype=torch.float8_e4m3fn, device=shape.device)
    weight = torch.zeros(plan.rows, k, dtype=torch.float8_e4m3fn, device=shape.device)
    x_scale, scale = (torch.zeros(size, device=shape.device) for size in (plan.tokens, plan.rows))
    device_kernels.get().linear_fp8(x, x_scale, weight, scale, plan=plan)


@dataclass(frozen=True)
class OnlineFp8:
    """A Fp8Format: a plain checkpoint's weights, quantized while they are loaded.

    scales: "channel": one for every row; "tensor": one for a checkpoint's tensor.
    """

    scales: Literal["channel", "tensor"]

    is_stored = False

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(shape=(num_rows, in_features))}

    def rows(self, tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        weight = tensors["weight"]
        amax = weight.abs().amax().to(device).float() if self.scales == "tensor" else None
        for rows in pieces(weight):
            yield quantize_channels(weight[rows].to(device), amax)


@dataclass(frozen=True)
class StoredFp8:
    """A Fp8Format: the checkpoint holds FP8 weights and their scales, one for a tensor or one for every row. Both may
    go by two names.

    has_input_scale: and a static scale of the activations, which must make sense and is not needed: a token's own
    scale is at least as fine as one for all tokens, and is what `apply` takes.
    """

    has_input_scale: bool = False

    is_stored = True

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        shape = num_rows, in_features
        scales = ((1,), (1, 1), (num_rows,), (num_rows, 1))
        scale = partial(TensorSpec, shape=(), other_shapes=scales, required=False)
        return {
            "weight": TensorSpec(shape=shape, dtypes=(torch.float8_e4m3fn,), dummy=normal_fp8(*shape)),
            _SCALE_NAMES[0]: scale(dummy=full(DUMMY_STD)),
            _SCALE_NAMES[1]: scale(),
            _INPUT_SCALE_NAMES[0]: scale(other_shapes=scales[:2], dummy=full(DUMMY_STD)),
            _INPUT_SCALE_NAMES[1]: scale(other_shapes=scales[:2]),
        }

    def rows(self, tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        weight, scale = tensors["weight"], _under(_SCALE_NAMES, tensors)
        if scale is None:
            raise ValueError(f"{_SCALE_NAMES[0]} is missing")
        check_scales(_SCALE_NAMES[0], scale)
        input_scale = _under(_INPUT_SCALE_NAMES, tensors)
        if input_scale is not None:
            check_scales(_INPUT_SCALE_NAMES[0], input_scale, TINY)
        elif self.has_input_scale:
            raise ValueError(f"{_INPUT_SCALE_NAMES[0]} is missing, and activation_scheme is static")
        yield weight.to(device), scale.to(device).float().flatten().expand(len(weight))


def _under(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Raises ValueError where several of the names are there."""
    found = [name for name in names if name in tensors]
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} say the same; expected one of them")
    return tensors[found[0]] if found else None


def quantize_channels(weight: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight: floating-point [N, K]. Returns (float8_e4m3fn [N, K], float32 scale [N]): weight ~ quantised * scale,
    where scale = max(largest magnitude of the channel / 448, 1e-12); amax: that magnitude, where it is not the
    channel's own."""
    wide = weight.float()
    largest = wide.abs().amax(1) if amax is None else amax.expand(len(wide))
    scale = largest.div(FP8_MAX).clamp_(min=SCALE_MIN)
    # Clamped: rounding may carry the largest value past the range, where the conversion need not saturate.
    return (wide / scale[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def dequantize_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight: float8_e4m3fn [N, K]; scale: float32 [N]. Returns their product [N, K], rounded once."""
    plain = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in pieces(weight):
        plain[rows] = weight[rows].float() * scale[rows, None]
    return plain


FP8 = Fp8Scheme(OnlineFp8("channel"))
FP8_PER_TENSOR = Fp8Scheme(OnlineFp8("tensor"))
