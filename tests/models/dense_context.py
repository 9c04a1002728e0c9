"""A dense causal attention context: one sequence, run from position 0, nothing cached."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention.backend import AttentionLayer


class DenseContext:
    """Attention over the tokens of one call, which are positions 0, 1, 2 and so on."""

    def forward(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        distance = torch.arange(len(query))[:, None] - torch.arange(len(key))
        visible = distance >= 0
        if layer.sliding_window is not None:
            visible &= distance < layer.sliding_window
        heads = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        out = F.scaled_dot_product_attention(*heads, attn_mask=visible, scale=layer.scale, enable_gqa=True)
        return out[0].transpose(0, 1)
