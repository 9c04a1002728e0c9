"""Attention on a CPU: a few batched matrix products a layer, whatever the mix of rows.

Rows of like size are padded to a group, so that one gather and three operators serve all of them; a
long row is a group alone, cut into tiles of queries that each see only the keys up to their last.
Measured on two Zen 4 cores (bfloat16, oneDNN), batched products take half the time of torch's flash
kernel for CPUs, which stays ahead only for one short decode row. Products accumulate in float32; in
bfloat16 the scores are rounded once before the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.attention.backend import AttentionBatch, AttentionCapability, AttentionLayer, KVLayout
from octavo.kernels.cpu import library
from octavo.kernels.cpu.library import DecodeRows

_TILE_QUERIES = 128  # queries of a row that are attended at once
_FLASH_KEYS = 640  # a lone decode row with at most so many keys goes to the flash kernel

# The cost of a row in a group, in the time of one query-key pair: its keys are gathered and read
# (_KEY_COST each), and every pair is computed. A group costs _GROUP_COST on top, however small.
_KEY_COST = 3
_GROUP_COST = 6000
_GROUP_SLOTS = 1 << 14  # most KV slots that one group gathers, unless a single row has more


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries that are attended at once, the same number for each row of their group.

    tokens: where they stand in the flat batch, [R * num_queries].
    keys: the columns of the group's keys that any of them sees.
    bias: 0 or -inf, [R, 1, num_queries, 1, <= keys], for the last columns of `keys`; None: the tile is one
        query that sees them all, for the flash kernel.
    """

    tokens: slice | Tensor
    num_queries: int
    keys: slice
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows whose keys are gathered together. chunks: int64 [2 * R * num_kv_heads * blocks per row]."""

    chunks: Tensor
    num_rows: int
    tiles: list[_Tile]


class _Scratch:
    """Memory that is kept between calls: the allocator would give large buffers back to the system."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(0, dtype=dtype)

    def take(self, *shape: int) -> Tensor:
        """An uninitialised tensor, valid until the next `take`."""
        size = 1
        for extent in shape:
            size *= extent
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size + size // 4, dtype=self._buffer.dtype)
        return self._buffer[:size].view(shape)


class CpuAttention:
    """The AttentionBackend of CPUs. The cache is [layers, blocks, 2 (K, V), KV heads, block_size, head_dim]:
    a block's keys of one head are contiguous, and so is what a gather of blocks makes of them.

    The cache's memory is not touched before it is used. Invariant: in a block whose first slot was
    written by `forward`, every slot holds finite numbers (if the keys and values were finite), because
    `prepare` zeroes a block that the step opens and does not fill. Padding reads such slots with weight 0.
    """

    capability = AttentionCapability(
        dtypes=frozenset({torch.float32, torch.bfloat16}), head_dims=None, sliding_window=True
    )

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        """Reserve the cache; block 0 is the null block. Raises ValueError for a dtype that is not served."""
        if dtype not in self.capability.dtypes:
            raise ValueError(f"dtype={dtype} is not served on a CPU; allowed: torch.float32, torch.bfloat16")
        self._block_size, self._num_kv_heads, self._head_dim = block_size, num_kv_heads, head_dim
        self._cache = torch.empty(num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim, dtype=dtype)
        # Views of each layer: single slots of one head, to write; their runs in one block, to gather.
        self._slots = [layer.view(-1, head_dim) for layer in self._cache]
        self._chunks = [layer.view(-1, block_size * head_dim) for layer in self._cache]
        self._gathered, self._scores, self._weights = (_Scratch(dtype) for _ in range(3))
        self._kernels = library.get()
        self._batch = AttentionBatch([], [], torch.empty(0, 0), torch.empty(0))
        self._write_index = torch.empty(0)  # of this step, where no native kernel writes
        # Of this step, by sliding window: the rows that a native kernel decodes, and the groups of all others.
        self._plans: dict[int | None, tuple[DecodeRows | None, list[_Group]]] = {}

    def kv_layout(self) -> KVLayout:
        names = ("layer", "block", "key_or_value", "kv_head", "offset", "head_dim")
        num_bytes = self._cache[:, 0].numel() * self._cache.element_size()
        return KVLayout(tuple(self._cache.shape), names, self._cache.dtype, num_bytes)

    def prepare(self, batch: AttentionBatch) -> None:
        num_tokens = sum(batch.lengths)
        if not len(batch.starts) == len(batch.lengths) == len(batch.block_tables):
            raise ValueError("starts, lengths and block_tables differ in their number of rows")
        if len(batch.slot_mapping) != num_tokens:
            raise ValueError(f"slot_mapping has {len(batch.slot_mapping)} slots for {num_tokens} tokens")
        self._batch = batch
        self._plans = {}
        if self._kernels is None:
            size, num_chunks = self._block_size, 2 * self._num_kv_heads
            slots = batch.slot_mapping[:, None]
            chunks = slots // size * num_chunks + torch.arange(num_chunks)
            self._write_index = (chunks * size + slots % size).view(-1)
        self._zero_opened_blocks()

    def _zero_opened_blocks(self) -> None:
        """Zero, in all layers, the last block of each row if this step starts but does not fill it.

        Nobody else reads such a block yet: only full blocks are shared.
        """
        ends = [start + length for start, length in zip(self._batch.starts, self._batch.lengths)]
        opened = [
            (row, end // self._block_size)
            for row, (start, end) in enumerate(zip(self._batch.starts, ends))
            if end % self._block_size and start <= end // self._block_size * self._block_size
        ]
        if opened:
            rows, columns = torch.tensor(opened).unbind(1)
            self._cache.index_fill_(1, self._batch.block_tables[rows, columns].long(), 0)

    def forward(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._write(layer.layer_index, key, value)
        plan = self._plans.get(layer.sliding_window)
        if plan is None:
            plan = self._plans[layer.sliding_window] = self._plan(layer)
        decodes, groups = plan
        out = torch.empty(query.shape, dtype=query.dtype)
        if decodes is not None and self._kernels is not None:
            self._kernels.paged_attention(query, out, self._cache[layer.layer_index], decodes, layer.scale)
        for group in groups:
            keys, values = self._gather(layer.layer_index, group)
            for tile in group.tiles:
                heads = self._attend(tile, query[tile.tokens], keys[:, tile.keys], values[:, tile.keys], layer.scale)
                if isinstance(tile.tokens, slice) and len(heads) == len(query):
                    return heads  # the tile is the batch
                out[tile.tokens] = heads
        return out

    def _write(self, layer_index: int, key: Tensor, value: Tensor) -> None:
        if self._kernels is not None:
            self._kernels.write_kv(key, value, self._cache[layer_index], self._batch.slot_mapping)
            return
        new = torch.cat((key, value), 1).view(-1, self._head_dim)
        self._slots[layer_index].index_copy_(0, self._write_index, new)

    def _gather(self, layer_index: int, group: _Group) -> Tensor:
        """Keys and values of a group, [2, R * KV heads, block_size * blocks per row, head_dim]."""
        chunks = self._chunks[layer_index]
        out = self._gathered.take(len(group.chunks), chunks.shape[1])
        torch.index_select(chunks, 0, group.chunks, out=out)
        return out.view(2, group.num_rows * self._num_kv_heads, -1, self._head_dim)

    def _attend(self, tile: _Tile, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """query: [R * num_queries, num_heads, head_dim]; keys, values: [R * KV heads, keys, head_dim]."""
        num_kv_heads, head_dim, num_keys = self._num_kv_heads, self._head_dim, keys.shape[1]
        group_size = query.shape[1] // num_kv_heads  # query heads that share a KV head
        by_head = query.view(-1, tile.num_queries, num_kv_heads, group_size, head_dim).transpose(1, 2)
        flat = by_head.reshape(-1, tile.num_queries * group_size, head_dim)
        if tile.bias is None:
            heads = F.scaled_dot_product_attention(flat[None], keys[None], values[None], scale=scale)
        else:
            shape = (flat.shape[0], flat.shape[1], num_keys)
            scores = torch.bmm(flat * scale, keys.transpose(1, 2), out=self._scores.take(*shape))
            pairs = scores.view(-1, num_kv_heads, tile.num_queries, group_size, num_keys)
            pairs[..., num_keys - tile.bias.shape[-1] :].add_(tile.bias)
            heads = torch.bmm(torch.softmax(scores, -1, out=self._weights.take(*shape)), values)
        return heads.view(by_head.shape).transpose(1, 2).reshape(query.shape)

    def _plan(self, layer: AttentionLayer) -> tuple[DecodeRows | None, list[_Group]]:
        """How this step's rows are attended in layers of this shape: natively, and in groups."""
        window = layer.sliding_window
        starts, lengths, size = self._batch.starts, self._batch.lengths, self._block_size
        firsts = [0 if window is None else max(0, start - window + 1) // size for start in starts]
        blocks = [-(-(start + length) // size) - first for start, length, first in zip(starts, lengths, firsts)]
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        decodes, others = self._decode_rows(layer, offsets)
        groups = []
        for rows in _group_rows(others, lengths, [count * size for count in blocks]):
            if len(rows) == 1:
                row = rows[0]
                tiles = self._tiles_of_row(starts[row], lengths[row], offsets[row], firsts[row] * size, window)
            else:
                most = max(blocks[row] for row in rows)
                tiles = [self._tile_of_rows(rows, offsets, [firsts[row] * size for row in rows], most * size, window)]
            chunks = self._chunk_index(rows, [firsts[row] for row in rows], [blocks[row] for row in rows])
            groups.append(_Group(chunks, len(rows), tiles))
        return decodes, groups

    def _decode_rows(self, layer: AttentionLayer, offsets: list[int]) -> tuple[DecodeRows | None, list[int]]:
        """The rows of one query, where the native kernel serves their shape; and all other rows."""
        batch, everyone = self._batch, list(range(len(self._batch.starts)))
        if self._kernels is None or not library.serves(layer.num_heads, layer.num_kv_heads, layer.head_dim):
            return None, everyone
        rows = [row for row in everyone if batch.lengths[row] == 1]
        if not rows:
            return None, everyone
        tables = batch.block_tables if len(rows) == len(everyone) else batch.block_tables[rows]
        ends = [batch.starts[row] + 1 for row in rows]
        begins = [0 if layer.sliding_window is None else max(0, end - layer.sliding_window) for end in ends]
        where, first, last = torch.tensor([[offsets[row] for row in rows], begins, ends])
        decodes = DecodeRows(where, tables.long().contiguous(), first, last)
        return decodes, [row for row in everyone if batch.lengths[row] > 1]

    def _chunk_index(self, rows: list[int], firsts: list[int], blocks: list[int]) -> Tensor:
        """The rows of self._chunks that hold the group's keys, then its values. A row with fewer blocks than the
        longest repeats its last one."""
        first, last = torch.tensor(firsts)[:, None], torch.tensor([f + b - 1 for f, b in zip(firsts, blocks)])[:, None]
        columns = torch.minimum(first + torch.arange(max(blocks)), last)
        table = self._batch.block_tables[torch.tensor(rows)[:, None], columns].long()
        chunk = torch.arange(2 * self._num_kv_heads).view(2, 1, self._num_kv_heads, 1)
        return (table[:, None] * (2 * self._num_kv_heads) + chunk).view(-1)

    def _tiles_of_row(self, start: int, length: int, offset: int, base: int, window: int | None) -> list[_Tile]:
        """Tiles of a row that is a group alone, whose gathered keys begin at position `base`."""
        tiles = []
        for begin in range(start, start + length, _TILE_QUERIES):
            end = min(begin + _TILE_QUERIES, start + length)
            seen = base if window is None else max(base, begin - window + 1)
            token = offset + begin - start
            tokens = slice(token, token + end - begin)
            if length == 1 and end - seen <= _FLASH_KEYS:
                tiles.append(_Tile(tokens, 1, slice(seen - base, end - base), None))
                continue
            # Whole blocks: products of odd widths are slow, and oneDNN compiles a kernel for each new shape.
            first, last = seen - seen % self._block_size, -(-end // self._block_size) * self._block_size
            masked = begin if window is None else first  # all queries see the keys before it
            bias = self._bias(torch.arange(begin, end)[None], torch.arange(masked, last)[None], window)
            tiles.append(_Tile(tokens, end - begin, slice(first - base, last - base), bias))
        return tiles

    def _tile_of_rows(
        self, rows: list[int], offsets: list[int], bases: list[int], num_keys: int, window: int | None
    ) -> _Tile:
        """The one tile of several rows. A row with fewer queries than the longest repeats its last one."""
        lengths = [self._batch.lengths[row] for row in rows]
        num_queries = max(lengths)
        lasts = torch.tensor(lengths)[:, None] - 1
        local = torch.minimum(torch.arange(num_queries), lasts)
        positions = torch.tensor([self._batch.starts[row] for row in rows])[:, None] + local
        bias = self._bias(positions, torch.tensor(bases)[:, None] + torch.arange(num_keys), window)
        tokens: slice | Tensor = (torch.tensor([offsets[row] for row in rows])[:, None] + local).view(-1)
        if min(lengths) == num_queries and rows[-1] - rows[0] == len(rows) - 1:
            tokens = slice(offsets[rows[0]], offsets[rows[-1] + 1])
        return _Tile(tokens, num_queries, slice(0, num_keys), bias)

    def _bias(self, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        """0 where a query sees a key, else -inf: [R, 1, Q, 1, K] from positions [R, Q] and [R, K]."""
        distance = queries[:, :, None] - keys[:, None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        bias = torch.zeros(hidden.shape, dtype=self._cache.dtype).masked_fill_(hidden, -torch.inf)
        return bias[:, None, :, None, :]


def _group_rows(rows: list[int], lengths: list[int], num_keys: list[int]) -> list[list[int]]:
    """Split `rows` into groups to be padded together: a group grows, in order of size, while the padding costs
    less than a further group would. Rows of a group are in ascending order."""
    groups: list[list[int]] = []
    most_queries = most_keys = spent = 0
    for row in sorted(rows, key=lambda row: (lengths[row], num_keys[row])):
        queries, keys = lengths[row], num_keys[row]
        cost = keys * (queries + _KEY_COST)
        most_queries, most_keys = max(most_queries, queries), max(most_keys, keys)
        count = len(groups[-1]) + 1 if groups else 1
        padded = count * most_keys * (most_queries + _KEY_COST)
        fits = queries <= _TILE_QUERIES and count * most_keys <= _GROUP_SLOTS
        if groups and fits and padded - spent - cost <= _GROUP_COST:
            groups[-1].append(row)
            spent += cost
        else:
            groups.append([row])
            most_queries, most_keys, spent = queries, keys, cost
    return [sorted(group) for group in groups]
