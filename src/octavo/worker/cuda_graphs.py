"""Steps recorded as CUDA graphs: one launch in place of some three hundred.

Recording a size takes tens of milliseconds, during which everybody waits. So as many as a second allows are recorded
when the engine starts, the most useful first; a server records the others before it answers, and `LLM` while the device
is busy with long prompts, or each at its first use: launched one by one, a step of a small model takes 16 ms of the
host's time, so that to wait for a better moment costs more (docs/performance.md).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from octavo.worker.graph_sizes import GraphSize, GraphSizes
from octavo.worker.step_buffers import StepShape

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Prompts in a mixed step, whatever its rows: each program that attends and finds no prompt takes its turn all the same.
_MIXED_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step leaves on the device. last: the last hidden state of each row's last token, [R, hidden_size]; hidden:
    those of all tokens, [T, hidden_size], where they are wanted; logits: [R, vocab_size]; features: [T, F], where there
    is a draft head. Of a graph, they are overwritten by the next replay of any."""

    last: Tensor
    hidden: Tensor | None
    logits: Tensor
    features: Tensor | None = None


class _Address:
    """Device memory as CUDA Array Interface 3 describes it, without owning it."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": None,
            "typestr": f"<i{tensor.element_size()}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def borrowed(tensor: Tensor) -> Tensor:
    """The same contiguous device memory, which is free for later graphs of the pool once `tensor` is gone."""
    return torch.as_tensor(_Address(tensor), device=tensor.device).view(tensor.dtype)


class Compute(Protocol):
    def __call__(self, shape: StepShape) -> Computed:
        """Launch a step of this shape on what the buffers hold."""
        ...


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A recorded step. Replaying it computes what the buffers hold, padded to `shape`."""

    shape: StepShape
    graph: torch.cuda.CUDAGraph
    computed: Computed

    def replay(self) -> Computed:
        self.graph.replay()
        return self.computed


class StepGraphs:
    """Graphs by size, all in one memory pool: they run one after the other, so the largest one's memory serves all.

    compute: launches a step. clear: puts the buffers into a state in which a step changes nothing.
    max_items: for (rows, tokens), how many decode and prefill items there may be. limits: most rows, and tokens, of a
    step. adapters: record each size once more, for steps in which rows have adapters.
    """

    def __init__(
        self,
        compute: Compute,
        clear: Callable[[], None],
        max_items: Callable[[int, int], tuple[int, int]],
        limits: tuple[int, int],
        adapters: bool,
    ) -> None:
        self._compute = compute
        self._clear = clear
        self._max_items = max_items
        self._sizes = GraphSizes(*limits, adapters)
        self._graphs: dict[GraphSize, StepGraph] = {}
        self._ran: set[tuple[bool, bool]] = set()  # StepShape.decodes and .adapters of steps that were launched here
        self._left = self._sizes.order()[::-1]  # yet to record, the next one last; `record_next` takes from it
        self._records = True  # False once memory ran out
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    @property
    def num_recorded(self) -> int:
        return len(self._graphs)

    def size_of(self, num_tokens: int, num_rows: int, adapters: bool = False) -> GraphSize | None:
        """The smallest size that holds such a step. None if none is that large, or memory ran out before its graph was
        recorded."""
        size = self._sizes.find(num_tokens, num_rows, adapters)
        return size if self._records or size in self._graphs else None

    def find(self, size: GraphSize, num_prefill_items: int) -> StepGraph | None:
        """The graph of a size, recorded now if it was not. None if it has no room for so many items, or memory ran
        out."""
        graph = self._graphs.get(size)
        shape = self._shape(size) if graph is None else graph.shape
        if num_prefill_items > shape.num_prefill_items:
            return None
        if graph is None:
            self._try_record(size)
        return self._graphs.get(size)

    def record_next(self) -> bool:
        """Record one more of the sizes, those that serve most first. False: none is left."""
        while self._left:
            size = self._left.pop()
            if size not in self._graphs:
                self._try_record(size)
                return True
        return False

    def record_for(self, seconds: float) -> int:
        """Record until the time is up; returns how many there are."""
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline and self.record_next():
            pass
        return self.num_recorded

    def _shape(self, size: GraphSize) -> StepShape:
        num_tokens, num_rows, adapters = size
        decodes = size.decodes
        num_decode_items, _ = self._max_items(num_rows, num_tokens)
        num_prefill_items = 0 if decodes else self._max_items(min(num_rows, _MIXED_PROMPTS), num_tokens)[1]
        return StepShape(num_tokens, num_rows, num_decode_items, num_prefill_items, decodes, adapters)

    def _try_record(self, size: GraphSize) -> None:
        """Record, unless memory ran out in doing so before, or does now: steps run without a graph, too."""
        if not self._records:
            return
        try:
            self._record(size)
        except torch.OutOfMemoryError:
            self._records = False
            self._left.clear()
            torch.cuda.empty_cache()
            _log.warning("no memory for the CUDA graph of %d tokens, %d rows: no more are recorded", *size[:2])

    def _record(self, size: GraphSize) -> None:
        began = time.perf_counter()
        shape = self._shape(size)
        kind = shape.decodes, shape.adapters
        if kind not in self._ran:
            self._run(shape)  # compiles, and sets up libraries: neither may happen while recording
            self._ran.add(kind)
        try:
            graph, computed = self._capture(shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # this size needs what no other of its kind did
            self._run(shape)
            graph, computed = self._capture(shape)
        left = (computed.last, computed.hidden, computed.logits, computed.features)
        kept = Computed(*(None if tensor is None else borrowed(tensor) for tensor in left))
        self._graphs[size] = StepGraph(shape, graph, kept)
        _log.debug("recorded a graph of %d tokens, %d rows in %.3f s", *size[:2], time.perf_counter() - began)

    def _run(self, shape: StepShape) -> None:
        self._clear()
        self._compute(shape)

    def _capture(self, shape: StepShape) -> tuple[torch.cuda.CUDAGraph, Computed]:
        return record_graph(lambda: self._compute(shape), self._pool, self._stream)


def record_graph(
    compute: Callable[[], _Result], pool: tuple[int, int], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A graph of what `compute` launches, and what it returned, which lies in the pool. stream: to record in, not the
    current one. Nothing is launched on the device, which may be busy."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            result = compute()
        finally:
            graph.capture_end()
    return graph, result
