"""FP8 weights made at load, one scale an output channel (formats: Micikevicius et al., 2022, "FP8 Formats")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton as device_kernels
from octavo.quantization.scheme import Fp8Tokens, LinearLayer

_FP8_MAX = 448.0  # the largest finite float8_e4m3fn
_SCALE_MIN = 1e-12  # a channel of zeros gets a tiny scale, not none
_CHUNK_ELEMENTS = 16 << 20  # quantised at once: 64 MiB a float32 temporary


class Fp8Scheme:
    """Holds `weight` float8_e4m3fn [N, K], `weight_scale` float32 [N] and `bias` in the model's dtype, as parameters.

    The weight is quantised as its parts arrive, so that it never lies in memory whole in another dtype. Few tokens
    are multiplied as they are, for then the weight's bytes are what costs (W8A16); more are quantised too, one scale
    a token, for the FP8 tensor cores (W8A8).
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
        weight = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty(out_features, dtype=torch.float32, device=device)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)
        layer.bias = None
        if bias:
            layer.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        layer.packed_weight = None
        layer.packed_bias = None

    def load(self, layer: LinearLayer, name: str, row: int, tensor: Tensor, last: bool) -> None:  # noqa: ARG002
        if name == "bias":
            assert layer.bias is not None
            layer.bias[row : row + len(tensor)].copy_(tensor)
            return
        assert layer.weight is not None
        assert layer.weight_scale is not None
        num_rows = max(1, _CHUNK_ELEMENTS // tensor.shape[1])
        for begin in range(0, len(tensor), num_rows):
            part = tensor[begin : begin + num_rows].to(layer.weight.device)
            rows = slice(row + begin, row + begin + len(part))
            layer.weight[rows], layer.weight_scale[rows] = quantize_channels(part)

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
