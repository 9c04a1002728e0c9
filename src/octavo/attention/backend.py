"""The attention contract: what a backend is told once a step, and the verbs that a model calls.

A backend owns the paged KV cache of all layers. The worker calls `prepare` once a step with where
the step's tokens stand, then every attention layer calls `forward` in order of depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionCapability:
    """One row of the table that backends are chosen by."""

    dtypes: frozenset[torch.dtype]
    head_dims: frozenset[int] | None
    """Head dimensions that are served; None for any."""
    sliding_window: bool
    supports_graphs: bool
    """Whether the backend is a GraphAttentionBackend too."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How the KV cache lies in memory."""

    shape: tuple[int, ...]
    dimensions: tuple[str, ...]
    """A name for each dimension of `shape`, in the field's words."""
    dtype: torch.dtype
    bytes_per_block: int
    """Bytes that one block takes in all layers together, keys and values."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the R rows of a flat batch of T tokens stand. Tokens are ordered by row, then by position.

    starts: R counts of tokens whose KV the cache holds before the step, each >= 0.
    lengths: R counts of new tokens, each >= 1; they sum to T.
    block_tables: int32 or int64 [R, >= blocks of the longest row]; row r's entry i names the block of
        its positions [i * block_size, (i + 1) * block_size). Entries past its last block are not read.
    slot_mapping: int64 [T]; block * block_size + offset of every new token.
    """

    starts: list[int]
    lengths: list[int]
    block_tables: Tensor
    slot_mapping: Tensor


class AttentionLayer(Protocol):
    """What a backend asks of a layer: its place and its shape.

    sliding_window: query i sees key j if and only if i - sliding_window < j <= i; None for j <= i.
    scale: what query-key products are multiplied by before the softmax.
    """

    @property
    def layer_index(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def sliding_window(self) -> int | None: ...


class AttentionBackend(Protocol):
    """Paged attention over a KV cache that the backend owns.

    Every position of a row below its start must have been written by an earlier `forward` of the
    same layer (or be written by another row of this step that shares the block).
    """

    @property
    def capability(self) -> AttentionCapability: ...

    def kv_layout(self) -> KVLayout:
        """The layout of the KV cache; constant for the life of the backend."""
        ...

    def prepare(self, batch: AttentionBatch) -> None:
        """Compute what the layers of one step share. Holds until the next `prepare`; may write to blocks
        that the step opens. Raises ValueError if the batch contradicts itself."""
        ...

    def forward(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the new tokens' KV of all rows, then attend.

        query: [T, num_heads, head_dim], positions already encoded; key, value: [T, num_kv_heads, head_dim].
        All of the cache's dtype, the last dimension contiguous. Returns a new tensor [T, num_heads, head_dim].
        """
        ...


class GraphAttentionBackend(AttentionBackend, Protocol):
    """A backend whose `forward` can be recorded in a device graph (capability.supports_graphs)."""

    def capture(self, num_rows: int) -> None:
        """Point `forward` at static buffers for `num_rows` decode rows, for the recording that follows."""
        ...

    def replay(self, batch: AttentionBatch) -> None:
        """In place of `prepare`: fill the buffers of the graph captured for this many rows."""
        ...
