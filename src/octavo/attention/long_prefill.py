"""Long prompts through libraries: attention whose cost is one large dense problem, outside of CUDA graphs.

A strategy is told once a step which rows stand where, takes the tokens that it serves better than the paged prefill
kernel, and computes them in every layer. What it does not take is the kernel's: see `taken` of `prefill_items`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.attention.backend import PlanRow
from octavo.kernels.triton.prefill_attention import gather_kv, merge_attention

_HALF = (torch.bfloat16, torch.float16)

# (query [1, H, Q, D], key [1, KV, K, D], value, causal, scale) -> attention [1, H, Q, D], log-sum-exp [1, H, Q]
DenseAttention = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class LongPrefillShape:
    """Of the attention layers that a strategy serves, and of the cache behind them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """Of the queries."""
    kv_dtype: torch.dtype
    block_size: int
    max_context: int
    """The most tokens of a sequence."""
    sliding_window: int | None
    device: torch.device


@dataclass(frozen=True, slots=True)
class Thresholds:
    """A row is taken if it has so many new tokens and, with them, so many tokens in all."""

    num_queries: int = 1024
    context: int = 4096

    def admits(self, row: PlanRow) -> bool:
        return row.length >= self.num_queries and row.start + row.length >= self.context


class LongPrefill(Protocol):
    """One way to compute long prefill. Its launches follow the step, so it cannot be recorded in a CUDA graph."""

    def prepare(self, rows: Sequence[PlanRow], block_tables: Tensor) -> dict[int, tuple[int, int]]:
        """Choose among all rows of the step, in their order: row -> the tokens [first, last) within it that `forward`
        will compute. block_tables: int32 [num_slots, max_blocks], on the device. Holds until the next `prepare`."""
        ...

    def forward(self, layer_index: int, query: Tensor, cache: Tensor, out: Tensor, scale: float) -> None:
        """Write `out` for the tokens taken; the step's keys and values must be in the cache already.

        query, out: [T, num_heads, head_dim]. cache: the layer's [num_blocks, 2, num_kv_heads, block_size, head_dim].
        """
        ...


class NoLongPrefill:
    """Everything is left to the paged kernel."""

    def prepare(self, rows: Sequence[PlanRow], block_tables: Tensor) -> dict[int, tuple[int, int]]:  # noqa: ARG002
        return {}

    def forward(self, layer_index: int, query: Tensor, cache: Tensor, out: Tensor, scale: float) -> None:
        """Nothing was taken."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Queries of one row that are attended at once. token: the first one in the flat batch; position: in the row."""

    token: int
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class _DenseRow:
    slot: int
    num_keys: int  # that any piece sees
    pieces: list[_Piece]


class CudnnPrefill:
    """Rows gathered from their blocks and attended densely, by cuDNN, in pieces of few different shapes.

    cuDNN makes a plan for each new shape, in 50 to 100 ms of the host's time, and keeps it for the thread that asked.
    So queries are cut into pieces of `piece` tokens, and what is left of them into pieces of a quarter, a grain, at
    multiples of which all of them begin. A piece sees its own keys causally, and those before it without a mask: whole
    pieces' worth in one run, what is left in runs of two grains and of one. The results are merged by their
    log-sum-exp. Tokens before the first multiple of the grain and after the last piece are not taken.
    """

    def __init__(
        self,
        shape: LongPrefillShape,
        thresholds: Thresholds | None = None,
        piece: int = 4096,
        attend: DenseAttention | None = None,
    ) -> None:
        """Reserve the buffer for one row's keys and values: 2 * num_kv_heads * max_context * head_dim elements.

        piece: a multiple of 4. Raises ValueError for a shape that is not served."""
        _check(shape, head_dims=range(64, 129, 8), kv_dtypes=(*_HALF, torch.float8_e4m3fn))
        if piece % 4:
            raise ValueError(f"piece={piece} must be a multiple of 4")
        self._shape = shape
        self._piece, self._grain = piece, piece // 4
        self._thresholds = thresholds or Thresholds()
        self._attend = attend or cudnn_attention
        size = (2, shape.num_kv_heads, shape.max_context, shape.head_dim)
        self._kv = torch.empty(size, dtype=shape.dtype, device=shape.device)  # of the row at hand; `forward` writes
        self._rows: list[_DenseRow] = []  # of this step; `prepare` writes
        self._block_tables = torch.empty(0)

    def prepare(self, rows: Sequence[PlanRow], block_tables: Tensor) -> dict[int, tuple[int, int]]:
        self._rows, self._block_tables = [], block_tables
        taken = {}
        token = 0
        for index, row in enumerate(rows):
            pieces = self._cut(row, token) if self._thresholds.admits(row) else []
            if pieces:
                first = pieces[0].token - token
                last = first + sum(piece.length for piece in pieces)
                self._rows.append(_DenseRow(row.slot, row.start + last, pieces))
                taken[index] = (first, last)
            token += row.length
        return taken

    def _cut(self, row: PlanRow, token: int) -> list[_Piece]:
        """The row's pieces, one after the other. token: the row's first one in the flat batch."""
        pieces = []
        at = -row.start % self._grain
        for length in (self._piece, self._grain):
            while row.length - at >= length:
                pieces.append(_Piece(token + at, row.start + at, length))
                at += length
        return pieces

    def forward(self, layer_index: int, query: Tensor, cache: Tensor, out: Tensor, scale: float) -> None:  # noqa: ARG002
        for row in self._rows:
            gather_kv(cache, self._block_tables[row.slot], row.num_keys, self._kv)
            for piece in row.pieces:
                tokens = slice(piece.token, piece.token + piece.length)
                self._attend_piece(query[tokens], piece.position, out[tokens], scale)

    def _attend_piece(self, query: Tensor, position: int, out: Tensor, scale: float) -> None:
        """query, out: [length, num_heads, head_dim], from `position` on."""
        results = [self._dense(query, position, len(query), True, scale)]
        first = 0
        for run in self._runs(position):
            results.append(self._dense(query, first, run, False, scale))
            first += run
        if len(results) == 1:
            out.copy_(results[0][0].transpose(0, 1))
            return
        merge_attention([part for part, _ in results], [lse for _, lse in results], out)

    def _runs(self, position: int) -> list[int]:
        """Lengths of the runs that the keys before `position` are seen in."""
        rest = position % self._piece
        runs = (position - rest, rest // self._grain // 2 * 2 * self._grain, rest // self._grain % 2 * self._grain)
        return [run for run in runs if run]

    def _dense(self, query: Tensor, first: int, num_keys: int, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Attention to the keys [first, first + num_keys): [H, Q, D] and its log-sum-exp [H, Q]."""
        key, value = self._kv[:, None, :, first : first + num_keys]
        part, lse = self._attend(query.transpose(0, 1)[None], key, value, causal, scale)
        return part[0], lse.view(part.shape[1:3])


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """A `DenseAttention` by cuDNN: grouped queries without repeated keys, the causal mask aligned to the top left."""
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scale
    )
    return result[0], result[1]


class FlashInferPrefill:
    """Rows attended where they lie, by FlashInfer's FlashAttention-3 kernel for paged caches (Ye et al., 2025)."""

    def __init__(self, shape: LongPrefillShape, thresholds: Thresholds | None = None) -> None:
        """Reserve FlashInfer's workspace. Raises ValueError for a shape that is not served, ImportError without it."""
        _check(shape, head_dims=(64, 128, 256), kv_dtypes=(shape.dtype,))
        self._shape, self._thresholds = shape, thresholds or Thresholds()
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=shape.device)
        wrapper = _flashinfer().BatchPrefillWithPagedKVCacheWrapper
        self._new_wrapper: Callable[[], Any] = lambda: wrapper(workspace, kv_layout="HND", backend="fa3")
        self._wrappers: list[Any] = []  # one for every run of rows that a step had at most; `prepare` makes them
        self._runs: list[tuple[slice, Any]] = []  # of this step: where its tokens lie, who attends; `prepare` writes

    def prepare(self, rows: Sequence[PlanRow], block_tables: Tensor) -> dict[int, tuple[int, int]]:
        runs: list[tuple[int, list[PlanRow]]] = []  # first token, and rows that lie side by side
        taken = {}
        token, adjacent = 0, False
        for index, row in enumerate(rows):
            admitted = self._thresholds.admits(row)
            if admitted:
                taken[index] = (0, row.length)
                if not adjacent:
                    runs.append((token, []))
                runs[-1][1].append(row)
            token, adjacent = token + row.length, admitted
        # A wrapper for each run: all of them hold their plans until the next step, each in its own integer workspace.
        while len(self._wrappers) < len(runs):
            self._wrappers.append(self._new_wrapper())
        self._runs = []
        for wrapper, (first, members) in zip(self._wrappers, runs, strict=False):
            self._plan(wrapper, members, block_tables)
            self._runs.append((slice(first, first + sum(row.length for row in members)), wrapper))
        return taken

    def _plan(self, wrapper: Any, rows: list[PlanRow], block_tables: Tensor) -> None:
        shape, size = self._shape, self._shape.block_size
        ends = [row.start + row.length for row in rows]
        blocks = [-(-end // size) for end in ends]
        indices = torch.cat([block_tables[row.slot, :count] for row, count in zip(rows, blocks, strict=True)])
        wrapper.plan(
            _running([row.length for row in rows]),
            _running(blocks),
            indices,
            torch.tensor([(end - 1) % size + 1 for end in ends], dtype=torch.int32),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            size,
            causal=True,
            q_data_type=shape.dtype,
            kv_data_type=shape.kv_dtype,
        )

    def forward(self, layer_index: int, query: Tensor, cache: Tensor, out: Tensor, scale: float) -> None:  # noqa: ARG002
        factor = scale * self._shape.head_dim**0.5  # planned is the usual scale
        for tokens, wrapper in self._runs:
            wrapper.run(query[tokens], cache, q_scale=factor, out=out[tokens])


def _flashinfer() -> Any:
    """FlashInfer, which is optional and takes seconds to import. Raises ImportError where it is missing."""
    return importlib.import_module("flashinfer")


def _check(shape: LongPrefillShape, head_dims: Sequence[int], kv_dtypes: Sequence[torch.dtype]) -> None:
    """Raises ValueError, which names what is not served."""
    if shape.dtype not in _HALF or shape.kv_dtype not in kv_dtypes:
        raise ValueError(f"dtype={shape.dtype}, kv_dtype={shape.kv_dtype}; allowed: bfloat16 or float16, {kv_dtypes}")
    if shape.head_dim not in head_dims:
        raise ValueError(f"head_dim={shape.head_dim}; allowed: {list(head_dims)}")
    if shape.sliding_window is not None:
        raise ValueError(f"sliding_window={shape.sliding_window} is not served; allowed: none")


def _running(counts: list[int]) -> Tensor:
    """int32 [len + 1]: the sums of the first 0, 1, ... counts, on the host."""
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
