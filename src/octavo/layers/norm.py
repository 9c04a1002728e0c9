"""RMSNorm (Zhang and Sennrich, 2019), over the hidden state or over each attention head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton
from octavo.kernels.cpu import library
from octavo.layers.slot import WeightSlot, copied_into
from octavo.quantization.scheme import Fp8Tokens


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the mean of squares is taken in float32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self._shape = (size,)
        self._eps = eps
        served = device.type == "cpu" and size % 16 == 0 and dtype in (torch.bfloat16, torch.float32)
        self._native = library.get() if served else None
        self._fused = triton.get() if device.type == "cuda" else None

    def forward(self, residual: Tensor, delta: Tensor | None = None, fp8: bool = False) -> Tensor | Fp8Tokens:
        """residual += delta, in place, where there is a delta; returns the norm of residual, a new tensor.

        All [T, size], contiguous, of one dtype. fp8: the norm is quantised, for a layer that takes it so.
        """
        if self._fused is not None:
            if fp8:
                return Fp8Tokens(*self._fused.rms_norm_fp8(residual, delta, self.weight, self._eps))
            normed: Tensor = self._fused.rms_norm(residual, delta, self.weight, self._eps)
            return normed
        if self._native is not None:
            out = torch.empty_like(residual)
            self._native.rms_norm(residual, delta, self.weight, out, self._eps)
            return out
        if delta is not None:
            residual.add_(delta)
        return F.rms_norm(residual, self._shape, self.weight, self._eps)

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        return {f"{path}.weight": copied_into(self.weight.data, dummy=1.0)}


class QueryKeyNorm(nn.Module):
    """RMSNorm of every query and key head at once: the weight's row is the head's, of q_norm or of k_norm."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        weight = torch.empty(num_heads + num_kv_heads, head_dim, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._num_heads = num_heads
        self._shape = (head_dim,)
        self.eps = eps

    def forward(self, heads: Tensor) -> Tensor:
        """heads: [T, num_heads + num_kv_heads, head_dim], queries first. Returns a new tensor like it."""
        return F.rms_norm(heads, self._shape, None, self.eps) * self.weight

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        parent = path.rpartition(".")[0]
        queries, keys = self.weight.data[: self._num_heads], self.weight.data[self._num_heads :]
        return {
            f"{parent}.q_norm.weight": copied_into(queries, self._shape, dummy=1.0),
            f"{parent}.k_norm.weight": copied_into(keys, self._shape, dummy=1.0),
        }
