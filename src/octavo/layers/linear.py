"""Linear layers, fused or not: the rows of one matrix may come from several checkpoint tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from octavo.layers.slot import WeightSlot
from octavo.quantization.scheme import Fp8Tokens, LinearLayer, LinearScheme
from octavo.quantization.unquantized import UNQUANTIZED


class Linear(LinearLayer):
    """y = x Wᵀ + b, where W stacks the rows of its parts: {"q_proj": 64, "k_proj": 32, "v_proj": 32}.

    A part's checkpoint tensors lie beside the layer: `self_attn.qkv_proj` is filled from
    `self_attn.q_proj.weight`, `self_attn.k_proj.weight` and so on.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        scheme: LinearScheme = UNQUANTIZED,
    ) -> None:
        """parts: rows of each, in order. The weights are uninitialised until loaded."""
        super().__init__()
        self.in_features, self.out_features = in_features, sum(parts.values())
        self._parts = dict(parts)
        self._has_bias = bias
        self._scheme = scheme
        scheme.create_weights(self, in_features, self.out_features, bias, dtype, device)
        self._num_unloaded = len(parts) * (2 if bias else 1)
        self.weight_nbytes = self.out_features * in_features * dtype.itemsize

    def takes_fp8(self, like: Tensor) -> bool:
        """Whether activations with the tokens, dtype and device of `like` may as well come quantised."""
        return self._scheme.takes_fp8(self, like)

    def forward(self, x: Tensor | Fp8Tokens) -> Tensor:
        """x: [T, in_features], quantised only if `takes_fp8`. Returns [T, out_features]."""
        return self._scheme.apply(self, x)

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        parent = path.rpartition(".")[0]
        slots = {}
        row = 0
        for part, num_rows in self._parts.items():
            prefix = f"{parent}.{part}" if parent else part
            slots[f"{prefix}.weight"] = WeightSlot((num_rows, self.in_features), partial(self._load, "weight", row))
            if self._has_bias:
                slots[f"{prefix}.bias"] = WeightSlot((num_rows,), partial(self._load, "bias", row))
            row += num_rows
        return slots

    def tie(self, weight: nn.Parameter) -> None:
        """Use another layer's loaded weight [out_features, in_features], unquantized, as this one's."""
        self.weight = weight
        self._scheme.load(self, "weight", 0, weight, last=True)

    def _load(self, name: str, row: int, tensor: Tensor) -> None:
        self._num_unloaded -= 1
        self._scheme.load(self, name, row, tensor, last=self._num_unloaded == 0)
