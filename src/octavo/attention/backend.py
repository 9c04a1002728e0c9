"""The attention contract: what a backend is told once a step, and the verbs that a model calls.

A backend owns the paged KV cache of all layers. The worker calls `prepare` once a step with where
the step's tokens stand, then every attention layer calls `forward` in order of depth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionCapability:
    """One row of the table that backends are chosen by."""

    dtypes: frozenset[torch.dtype]
    head_dims: frozenset[int] | None
    """Head dimensions that are served; None for any."""
    sliding_window: bool


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


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A step of T tokens and R rows on a GPU, padded to the sizes of the buffers that it lies in.

    row_slots: int32 [R], -1 for a padding row. starts: int32 [R], tokens in the cache before the step.
    cu_q: int32 [R + 1]; row r has the tokens [cu_q[r], cu_q[r + 1]). slot_mapping: int64 [T].
    block_tables: int32 [num_slots, max_blocks].
    decode_items, prefill_items: int32 [I, fields]; what the planners made of the rows with one query token, and of
        those with more. Unused ones have row -1; where there are none at all, the kernel is not launched.
    rows: the rows themselves, for a step that is not part of a graph; else None.
    """

    row_slots: Tensor
    starts: Tensor
    cu_q: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    decode_items: Tensor
    prefill_items: Tensor
    rows: Sequence[PlanRow] | None


class PlanRow(Protocol):
    """What a backend asks of a row of the step: its slot, the tokens in the cache, and the new ones."""

    @property
    def slot(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def length(self) -> int: ...


class AttentionLayer(Protocol):
    """What a backend asks of a layer: its place and its shape.

    sliding_window: query i sees key j if and only if i - sliding_window < j <= i; None for j <= i.
    scale: what query-key products are multiplied by before the softmax.
    key_scale, value_scale: what a float8 cache's keys and values are to be multiplied by.
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
    def key_scale(self) -> float: ...
    @property
    def value_scale(self) -> float: ...
    @property
    def sliding_window(self) -> int | None: ...


def kv_scales(layer: AttentionLayer, cache: Tensor) -> tuple[float, float]:
    """The scales of keys and values in this cache: 1 in one that is not float8."""
    return (layer.key_scale, layer.value_scale) if cache.dtype == torch.float8_e4m3fn else (1.0, 1.0)


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


class FusedAttentionBackend(ABC):
    """A backend that does all between the projections in few kernels, on a GPU. It may be recorded in a CUDA graph:
    what `prepare` is given lies in buffers that keep their place, and its launches depend on their shapes alone."""

    item_fields: tuple[int, int]
    """Words of a decode item and of a prefill item."""

    @abstractmethod
    def max_items(self, num_rows: int, num_tokens: int) -> tuple[int, int]:
        """The most decode and prefill items that a step of such a size can have."""

    @abstractmethod
    def plan(
        self, rows: Sequence[PlanRow], block_tables: Tensor, whole: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Decode and prefill items of the rows, as DeviceBatch takes them. block_tables: as in DeviceBatch. whole:
        they must cover every row, for `forward_fused` is recorded and cannot do anything beside them."""

    @abstractmethod
    def prepare(self, batch: DeviceBatch) -> None:
        """Take in where the step's tokens stand. Holds until the next `prepare`."""

    @abstractmethod
    def forward_fused(
        self, layer: AttentionLayer, qkv: Tensor, rotation: tuple[Tensor, Tensor], norm: tuple[Tensor, float] | None
    ) -> Tensor:
        """Normalise queries and keys, rotate them, write keys and values to the cache, attend.

        qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; it may be overwritten. rotation: cosines and
        signed sines, [T, 1, head_dim] each. norm: RMSNorm's weight [num_heads + num_kv_heads, head_dim] and epsilon.
        Returns [T, num_heads, head_dim].
        """
