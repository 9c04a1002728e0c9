"""The token embedding table, which a pass begins with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.kernels import triton
from octavo.layers.lora import EmbeddingAdapters
from octavo.layers.rotary import RotaryEmbedding, Rotation
from octavo.layers.slot import WeightSlot, copied_into


class Embedding(nn.Module):
    """A row of the table for every token id, and the rotation of its position: on a GPU one kernel makes both."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(vocab_size, hidden_size, dtype=dtype, device=device), requires_grad=False
        )
        self.adapters: EmbeddingAdapters | None = None  # of an engine that serves LoRA
        self._fused = triton.get() if device.type == "cuda" else None

    def forward(self, input_ids: Tensor, positions: Tensor, rotary: RotaryEmbedding) -> tuple[Tensor, Rotation]:
        """input_ids: int32 or int64 [T], each in [0, vocab_size). positions: int64 [T]. rotary: of the table's dtype.
        Returns the tokens' rows, a new tensor [T, hidden_size], and rotary(positions)."""
        if self._fused is not None:
            factors = rotary.frequencies, rotary.signed_amplitude, rotary.amplitude
            embedded, cos, sin = self._fused.embed_and_rotate(input_ids, positions, self.weight, *factors)
            rotation = cos, sin
        else:
            embedded, rotation = F.embedding(input_ids, self.weight), rotary(positions)
        return embedded if self.adapters is None else self.adapters.add(embedded, input_ids), rotation

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        return {f"{path}.weight": copied_into(self.weight.data)}
