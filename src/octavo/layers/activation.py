"""Gated activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from octavo.kernels import triton
from octavo.quantization.scheme import Fp8Tokens


def silu_and_mul(gate_up: Tensor, fp8: bool = False) -> Tensor | Fp8Tokens:
    """silu(gate) * up (SwiGLU: Shazeer, 2020). gate_up: [T, 2 * size], gate first. Returns a new [T, size].

    fp8: quantised, for a layer that takes it so.
    """
    kernels = triton.get()
    if fp8:
        return Fp8Tokens(*kernels.silu_and_mul_fp8(gate_up))
    if kernels is not None and gate_up.is_cuda:
        fused: Tensor = kernels.silu_and_mul(gate_up)
        return fused
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
