"""The oracle itself, against torch's attention over contiguous keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from octavo.kernels.reference.attention import paged_attention, write_kv


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("start", [0, 4])
def test_the_oracle_is_attention(start: int, window: int | None) -> None:
    torch.manual_seed(0)
    total, block_size, num_heads, num_kv_heads, head_dim = 10, 4, 4, 2, 8
    query = torch.randn(total, num_heads, head_dim, dtype=torch.float64)
    key, value = torch.randn(2, total, num_kv_heads, head_dim, dtype=torch.float64)
    table = torch.tensor([[3, 1, 2]])
    slots = torch.tensor([int(table[0, p // block_size]) * block_size + p % block_size for p in range(total)])
    cache = torch.full((16, 2, num_kv_heads, head_dim), torch.nan, dtype=torch.float64)
    write_kv(cache, key, value, slots)
    distance = torch.arange(total)[:, None] - torch.arange(total)
    visible = (distance >= 0) & (distance < (window or total))
    expected = F.scaled_dot_product_attention(
        *(part.transpose(0, 1)[None] for part in (query, key, value)), attn_mask=visible, scale=0.3, enable_gqa=True
    )[0].transpose(0, 1)
    actual = paged_attention(query[start:], cache, [start], [total - start], table, block_size, 0.3, window)
    torch.testing.assert_close(actual, expected[start:])
