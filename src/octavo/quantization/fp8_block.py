"""FP8 weights with a scale for every 128 x 128 block (DeepSeek-V3: DeepSeek-AI, 2024; also Qwen3-FP8).

Many tokens are quantised as well, with a scale for every 128 features of a token; few are multiplied as they are. A
format's wish that scales be powers of two (scale_fmt "ue8m0") binds the packer: any scale is read, of either dtype,
and those of activations are as fine as float32 has them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton as device_kernels
from octavo.quantization.fp8 import FP8_MAX, SCALE_MIN
from octavo.quantization.scheme import FLOATS, Fp8Tokens, LinearLayer, LinearShape, TensorSpec
from octavo.quantization.unquantized import UNQUANTIZED
from octavo.quantization.values import DUMMY_STD, check_scales, full, normal_fp8, pieces

BLOCK = 128  # rows, and columns, that share a scale
_SCALE_DTYPES = (*FLOATS, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Fp8BlockScheme:
    """Holds `weight` float8_e4m3fn [N, K] and `weight_scale` float32 [ceil(N / 128), ceil(K / 128)], as parameters.

    scale_name: of the scales in a checkpoint; None for a plain checkpoint, whose weights are quantized while they are
    loaded. The others are dequantized at once on a CPU; and where a part does not begin with a block of the fused
    matrix, for then its blocks are not those of the matrix.
    """

    scale_name: str | None
    quantizes_tokens: bool = True

    fuses = True

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        shape = num_rows, in_features
        if self.scale_name is None:
            return {"weight": TensorSpec(shape=shape)}
        grid = -(-num_rows // BLOCK), -(-in_features // BLOCK)
        return {
            "weight": TensorSpec(shape=shape, dtypes=(torch.float8_e4m3fn,), dummy=normal_fp8(*shape)),
            self.scale_name: TensorSpec(shape=grid, dtypes=_SCALE_DTYPES, dummy=full(DUMMY_STD, *grid)),
        }

    def create_weights(self, layer: LinearLayer) -> None:
        weight = torch.empty(layer.out_features, layer.in_features, dtype=torch.float8_e4m3fn, device=layer.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.held = {}  # until `finish`: first row of a part -> its scales

    def load(self, layer: LinearLayer, row: int, num_rows: int, tensors: Mapping[str, Tensor]) -> None:
        assert layer.weight is not None
        weight, into = tensors["weight"], layer.weight[row : row + num_rows]
        if self.scale_name is not None:
            check_scales(self.scale_name, tensors[self.scale_name])
            into.copy_(weight)
            layer.held[row] = tensors[self.scale_name].to(layer.device).float()
            return
        scales = []
        for rows in pieces(weight, BLOCK):
            into[rows], scale = quantize_blocks(weight[rows].to(layer.device))
            scales.append(scale)
        layer.held[row] = torch.cat(scales)

    def finish(self, layer: LinearLayer) -> None:
        assert layer.weight is not None
        parts, layer.held = sorted(layer.held.items()), None
        is_one_grid = all(row % BLOCK == 0 for row, _ in parts)
        if is_one_grid and (layer.device.type != "cpu" or self.scale_name is None):
            layer.weight_scale = nn.Parameter(torch.cat([scale for _, scale in parts]), requires_grad=False)
            return
        ends = [row for row, _ in parts[1:]] + [layer.out_features]
        plain = [dequantize_blocks(layer.weight[row:end], scale, layer.dtype) for (row, scale), end in zip(parts, ends)]
        layer.weight = nn.Parameter(torch.cat(plain), requires_grad=False)
        UNQUANTIZED.finish(layer)

    def num_bytes(self, layer: LinearLayer) -> int:
        return UNQUANTIZED.num_bytes(layer)

    def launches(self, shape: LinearShape) -> dict[Hashable, Callable[[], object]]:
        kernels = device_kernels.get()
        rows, columns = shape.out_features, shape.in_features
        found: dict[Hashable, Callable[[], object]] = {}

        def multiply(num_tokens: int) -> None:
            grid = -(-rows // BLOCK), -(-columns // BLOCK)
            weight = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn, device=shape.device)
            scale = torch.zeros(grid, device=shape.device)
            x = torch.zeros(num_tokens, columns, dtype=shape.dtype, device=shape.device)
            if num_tokens <= kernels.SKINNY_MAX_M:
                kernels.skinny_linear_block_fp8(x, weight, scale, None)
            else:
                kernels.block_fp8_linear(*kernels.quantize_fp8_groups(x), weight, scale, None, shape.dtype)

        if shape.dtype.itemsize == 2:
            for num_tokens in (1, kernels.SKINNY_MAX_M, kernels.SKINNY_MAX_M + 1, 128, 256):
                if num_tokens <= kernels.SKINNY_MAX_M or self.quantizes_tokens:
                    found["block", rows, columns, num_tokens] = partial(multiply, num_tokens)
        return found

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:  # noqa: ARG002
        return False

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        assert isinstance(x, Tensor)
        weight, scale, bias = layer.weight, layer.weight_scale, layer.bias
        if weight is None or scale is None:
            return UNQUANTIZED.apply(layer, x)
        kernels = device_kernels.get()
        if kernels is not None and x.is_cuda and len(x) and x.dtype in (torch.bfloat16, torch.float16):
            if len(x) <= kernels.SKINNY_MAX_M:
                few: Tensor = kernels.skinny_linear_block_fp8(x, weight, scale, bias)
                return few
            if self.quantizes_tokens:
                quantized = kernels.quantize_fp8_groups(x.contiguous())
                many: Tensor = kernels.block_fp8_linear(*quantized, weight, scale, bias, x.dtype)
                return many
        return F.linear(x, dequantize_blocks(weight, scale, x.dtype), bias)

    def apply_gated(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor | None:
        return UNQUANTIZED.apply_gated(layer, x) if layer.weight_scale is None else None


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: floating-point [N, K]. Returns (float8_e4m3fn [N, K], float32 scale [ceil(N / 128), ceil(K / 128)]), as
    `quantize_channels` does for a channel."""
    num_rows, num_columns = weight.shape
    wide = F.pad(weight.float(), (0, -num_columns % BLOCK, 0, -num_rows % BLOCK))
    blocks = wide.view(len(wide) // BLOCK, BLOCK, -1, BLOCK)
    scale = blocks.abs().amax((1, 3)).div_(FP8_MAX).clamp_(min=SCALE_MIN)
    quantized = (blocks / scale[:, None, :, None]).clamp_(-FP8_MAX, FP8_MAX).view(wide.shape)
    return quantized[:num_rows, :num_columns].to(torch.float8_e4m3fn), scale


def dequantize_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight: float8_e4m3fn [N, K]; scale: float32 [ceil(N / 128), ceil(K / 128)]. Returns their product [N, K],
    rounded once."""
    plain = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in pieces(weight, BLOCK):
        part = weight[rows].float()
        factors = scale[rows.start // BLOCK : -(-rows.stop // BLOCK)]
        columns = factors.repeat_interleave(BLOCK, 1)[:, : part.shape[1]]
        plain[rows] = part * columns.repeat_interleave(BLOCK, 0)[: len(part)]
    return plain


FP8_PER_BLOCK = Fp8BlockScheme(None)
