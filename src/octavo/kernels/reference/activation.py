"""SwiGLU in plain torch: the oracle of the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.reference.fp8 import quantize_fp8


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in float64, rounded once. gate_up: [T, 2 * size], gate first. Returns [T, size]."""
    gate, up = gate_up.double().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def silu_and_mul_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu_and_mul` as (float8_e4m3fn [T, size], float32 scale [T, 1])."""
    return quantize_fp8(silu_and_mul(gate_up))
