"""Gated activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU: Shazeer, 2020). gate_up: [T, 2 * size], gate first. Returns a new [T, size]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
