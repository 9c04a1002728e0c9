"""A CpuAttention beside the oracle, both fed the same steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from octavo.attention.backend import AttentionBatch
from octavo.attention.cpu import CpuAttention
from octavo.kernels.reference.attention import paged_attention, write_kv

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NUM_BLOCKS = 160


@dataclass(frozen=True)
class Shape:
    """Of one attention layer, and of the cache behind it."""

    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 16
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    num_layers: int = 1
    layer_index: int = 0
    sliding_window: int | None = None

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group_size

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Rig:
    """A backend whose whole cache starts as NaN, the oracle's cache beside it, and sequences' block tables."""

    shape: Shape
    backend: CpuAttention = field(init=False)
    oracle: list[Tensor] = field(init=False)
    tables: Tensor = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        self.backend = CpuAttention(s.num_layers, NUM_BLOCKS, s.block_size, s.num_kv_heads, s.head_dim, s.dtype)
        self.poison(torch.arange(NUM_BLOCKS))
        self.oracle = [
            torch.full((NUM_BLOCKS * s.block_size, 2, s.num_kv_heads, s.head_dim), torch.nan, dtype=s.dtype)
            for _ in range(s.num_layers)
        ]
        self.tables = torch.zeros(0, 0, dtype=torch.int64)

    def poison(self, blocks: Tensor) -> None:
        """As if requests with NaN keys and values had used these blocks and gone."""
        self.backend._cache[:, blocks] = torch.nan

    def allocate(self, num_tokens: list[int], seed: int = 0) -> None:
        """Scattered blocks for sequences of these lengths; entries past a sequence's last block are -1."""
        counts = [-(-n // self.shape.block_size) for n in num_tokens]
        free = (torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
        self.tables = torch.full((len(counts), max(counts)), -1)
        for row, count in enumerate(counts):
            self.tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])

    def batch(self, starts: list[int], lengths: list[int], sequences: list[int] | None = None) -> AttentionBatch:
        tables = self.tables if sequences is None else self.tables[sequences]
        size = self.shape.block_size
        slots = [
            int(tables[row, position // size]) * size + position % size
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
            for position in range(start, start + length)
        ]
        return AttentionBatch(starts, lengths, tables, torch.tensor(slots))

    def step(self, batch: AttentionBatch, qkv: tuple[Tensor, Tensor, Tensor], layer: Shape | None = None) -> Tensor:
        """One layer's forward (after `prepare`), checked against the oracle."""
        layer = layer or self.shape
        query, key, value = qkv
        write_kv(self.oracle[layer.layer_index], key, value, batch.slot_mapping)
        expected = paged_attention(
            query,
            self.oracle[layer.layer_index],
            batch.starts,
            batch.lengths,
            batch.block_tables,
            layer.block_size,
            layer.scale,
            layer.sliding_window,
        )
        actual = self.backend.forward(layer, query, key, value)
        tolerance = TOLERANCE[layer.dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        return actual

    def fill(self, starts: list[int], seed: int = 7) -> None:
        """Compute the first `starts[i]` tokens of sequence i, whose starts are not 0."""
        rows = [row for row, start in enumerate(starts) if start]
        if not rows:
            return
        lengths = [starts[row] for row in rows]
        batch = self.batch([0] * len(rows), lengths, rows)
        query, key, value = random_qkv(self.shape, sum(lengths), seed)
        self.backend.prepare(batch)
        for index in range(self.shape.num_layers):
            write_kv(self.oracle[index], key + index, value - index, batch.slot_mapping)
            self.backend.forward(replace(self.shape, layer_index=index), query, key + index, value - index)


def random_qkv(shape: Shape, num_tokens: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    query, key, value = (torch.randn(num_tokens, n, shape.head_dim, generator=generator).to(shape.dtype) for n in sizes)
    return query, key, value
