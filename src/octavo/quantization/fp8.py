"""FP8 weights made at load, one scale an output channel (formats: Micikevicius et al., 2022, "FP8 Formats")."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton as device_kernels
from octavo.quantization.scheme import Fp8Tokens, LinearLayer, TensorSpec

_FP8_MAX = 448.0  # the largest finite float8_e4m3fn
_SCALE_MIN = 1e-12  # a channel of zeros gets a tiny scale, not none
_CHUNK_ELEMENTS = 16 << 20  # quantised at once: 64 MiB a float32 temporary


class Fp8Scheme:
    """Holds `weight` float8_e4m3fn [N, K], `weight_scale` float32 [N] and `bias` in the model's dtype, as parameters.

    The weight is quantised as its parts arrive, so that it never lies in memory whole in another dtype. Few tokens
    are multiplied as they are, for then the weight's bytes are what costs (W8A16); more are quantised too, one scale
    a token, for the FP8 tensor cores (W8A8).
    """

    fuses = True

    def tensors(self, in_features: int, num_rows: int) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(shape=(num_rows, in_features))}

    def create_weights(self, layer: LinearLayer) -> None:
        rows, columns = layer.out_features, layer.in_features
        weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=layer.device)
        scale = torch.empty(rows, dtype=torch.float32, device=layer.device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    def load(self, layer: LinearLayer, row: int, num_rows: int, tensors: Mapping[str, Tensor]) -> None:
        assert layer.weight is not None
        assert layer.weight_scale is not None
        num_at_once = max(1, _CHUNK_ELEMENTS // layer.in_features)
        for begin in range(0, num_rows, num_at_once):
            part = tensors["weight"][begin : begin + num_at_once].to(layer.device)
            rows = slice(row + begin, row + begin + len(part))
            layer.weight[rows], layer.weight_scale[rows] = quantize_channels(part)

    def finish(self, layer: LinearLayer) -> None:
        """Nothing is left to do."""

    def num_bytes(self, layer: LinearLayer) -> int:  # noqa: ARG002
        return 0

    def takes_fp8(self, layer: LinearLayer, like: Tensor) -> bool:
        """Row-wise scales: cuBLAS and CUTLASS write bfloat16 and want whole blocks of 16."""
        assert layer.weight is not None
        kernels = device_kernels.get()
        if kernels is None or not like.is_cuda or like.dtype != torch.bfloat16 or len(like) <= kernels.SKINNY_MAX_M:
            return False
        return all(size % 16 == 0 for size in layer.weight.shape)

    def apply(self, layer: LinearLayer, x: Tensor | Fp8Tokens) -> Tensor:
        """On a CPU, or where a shape or dtype suits no FP8 kernel, by the dequantised weight: right, and slow."""
        weight, scale, bias = layer.weight, layer.weight_scale, layer.bias
        assert weight is not None
        assert scale is not None
        kernels = device_kernels.get()
        if isinstance(x, Tensor) and self.takes_fp8(layer, x):
            x = Fp8Tokens(*kernels.quantize_fp8(x.contiguous()))
        if isinstance(x, Fp8Tokens):
            return torch._scaled_mm(
                x.values,
                weight.t(),
                scale_a=x.scale,
                scale_b=scale[None, :],
                bias=bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        few = x.is_cuda and kernels is not None and 0 < len(x) <= kernels.SKINNY_MAX_M
        if few and x.dtype in (torch.bfloat16, torch.float16):
            product: Tensor = kernels.skinny_linear_fp8(x, weight, scale, bias)
            return product
        wide = F.linear(x.float(), weight.float() * scale[:, None], None if bias is None else bias.float())
        return wide.to(x.dtype)


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: floating-point [N, K]. Returns (float8_e4m3fn [N, K], float32 scale [N]): weight ~ quantised * scale,
    where scale = max(largest magnitude of the channel / 448, 1e-12)."""
    wide = weight.float()
    scale = wide.abs().amax(1).div_(_FP8_MAX).clamp_(min=_SCALE_MIN)
    # Clamped: rounding may carry the largest value past the range, where the conversion need not saturate.
    return (wide / scale[:, None]).clamp_(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale


FP8 = Fp8Scheme()
