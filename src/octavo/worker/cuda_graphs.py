"""Steps recorded as CUDA graphs: one launch in place of some three hundred.

Recording a size takes tens of milliseconds, during which everybody waits. So as many as a second allows are recorded
when the engine starts, the most useful first; a server records the others before it answers, and `LLM` while the device
is busy with long prompts, or each at its first use: launched one by one, a step of a small model takes 16 ms of the
host's time, so that to wait for a better moment costs more (docs/performance.md).
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from octavo.worker.step_buffers import StepShape

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Numbers of rows that decode steps are padded to: close together where a row costs most.
_DECODE_SIZES = (
    1,
    2,
    4,
    8,
    12,
    16,
    *range(24, 64, 8),
    *range(64, 256, 16),
    *range(256, 512, 32),
    *range(512, 1025, 64),
)
# Numbers of tokens that mixed steps are padded to, and of rows.
_MIXED_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_MIXED_ROWS = (64, 128, 256, 384, 512)
# Those that batches take whose prompts are spread over decode steps (scheduler/leveling.py).
_LEVEL_TOKENS = (256, 384, 512)
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


class _Key(NamedTuple):
    """Sizes of a graph, and whether its rows may have adapters."""

    num_tokens: int
    num_rows: int
    adapters: bool


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
        max_rows, max_tokens = limits
        self._compute = compute
        self._clear = clear
        self._max_items = max_items
        decode_sizes = [n for n in _DECODE_SIZES if n < max_rows] + [min(max_rows, _DECODE_SIZES[-1])]
        mixed_tokens = [n for n in _MIXED_TOKENS if n <= max_tokens]
        # With adapters every other size: their graphs take twice as long to record.
        self._decode_sizes = {False: decode_sizes, True: sorted({1, *decode_sizes[::-2]})}
        self._mixed_tokens = {False: mixed_tokens, True: mixed_tokens[::-2][::-1]}
        self._mixed_rows = sorted({min(n, max_rows) for n in _MIXED_ROWS})
        self._adapters = adapters
        # A mixed step has more tokens than rows, so it never shares its key with a decode step.
        self._graphs: dict[_Key, StepGraph] = {}
        self._ran: set[tuple[bool, bool]] = set()  # StepShape.decodes and .adapters of steps that were launched here
        self._left = self._order()  # keys yet to record, the last one first; `record_next` takes from it
        self._records = True  # False once memory ran out
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    @property
    def num_recorded(self) -> int:
        return len(self._graphs)

    def find(self, num_tokens: int, num_rows: int, decodes: bool, adapters: bool = False) -> StepGraph | None:
        """The smallest graph that holds such a step, recorded now if it was not. None if none is that large, or
        memory ran out."""
        key = self._key(num_tokens, num_rows, decodes, adapters)
        if key is None:
            return None
        if key not in self._graphs:
            self._try_record(key)
        return self._graphs.get(key)

    def record_next(self) -> bool:
        """Record one more of the sizes, those that serve most first. False: none is left."""
        while self._left:
            key = self._left.pop()
            if key not in self._graphs:
                self._try_record(key)
                return True
        return False

    def record_for(self, seconds: float) -> int:
        """Record until the time is up; returns how many there are."""
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline and self.record_next():
            pass
        return self.num_recorded

    def _order(self) -> list[_Key]:
        """All keys, the first one last; those with adapters and those without in turn."""
        kinds = [self._order_of(adapters) for adapters in ((False, True) if self._adapters else (False,))]
        pairs = zip_longest(*kinds)
        return [key for pair in pairs for key in pair if key is not None][::-1]

    def _order_of(self, adapters: bool) -> list[_Key]:
        """The largest, in whose memory all others then find room; decode steps of round sizes, and mixed steps of few
        rows and such sizes; those of level steps; then what lies between."""
        sizes = self._decode_sizes[adapters]
        largest, tokens = sizes[-1], self._mixed_tokens[adapters]
        decodes = sorted(sizes, key=lambda n: (n != largest, n.bit_count(), n))
        num_round = sum(n == largest or n.bit_count() == 1 for n in decodes)
        keys = [_Key(n, n, adapters) for n in decodes]
        mixed = [self._mixed(n, rows, adapters) for rows in self._mixed_rows for n in tokens]
        few = [key for key in mixed[: len(tokens)] if key.num_tokens.bit_count() == 1]
        level = [key for key in mixed if key.num_tokens in _LEVEL_TOKENS]
        return list(dict.fromkeys(keys[:num_round] + few + level + keys[num_round:] + mixed))

    def _key(self, num_tokens: int, num_rows: int, decodes: bool, adapters: bool) -> _Key | None:
        if decodes:
            sizes = self._decode_sizes[adapters]
            at = bisect.bisect_left(sizes, num_rows)
            return _Key(sizes[at], sizes[at], adapters) if at < len(sizes) else None
        tokens = bisect.bisect_left(self._mixed_tokens[adapters], num_tokens)
        rows = bisect.bisect_left(self._mixed_rows, num_rows)
        if tokens == len(self._mixed_tokens[adapters]) or rows == len(self._mixed_rows):
            return None
        return self._mixed(self._mixed_tokens[adapters][tokens], self._mixed_rows[rows], adapters)

    @staticmethod
    def _mixed(num_tokens: int, num_rows: int, adapters: bool) -> _Key:
        return _Key(num_tokens, min(num_rows, num_tokens - 1), adapters)

    def _shape(self, key: _Key) -> StepShape:
        num_tokens, num_rows, adapters = key
        decodes = num_tokens == num_rows
        num_decode_items, _ = self._max_items(num_rows, num_tokens)
        num_prefill_items = 0 if decodes else self._max_items(min(num_rows, _MIXED_PROMPTS), num_tokens)[1]
        return StepShape(num_tokens, num_rows, num_decode_items, num_prefill_items, decodes, adapters)

    def _try_record(self, key: _Key) -> None:
        """Record, unless memory ran out in doing so before, or does now: steps run without a graph, too."""
        if not self._records:
            return
        try:
            self._record(key)
        except torch.OutOfMemoryError:
            self._records = False
            self._left.clear()
            torch.cuda.empty_cache()
            _log.warning("no memory for the CUDA graph of %d tokens, %d rows: no more are recorded", *key[:2])

    def _record(self, key: _Key) -> None:
        began = time.perf_counter()
        shape = self._shape(key)
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
        self._graphs[key] = StepGraph(shape, graph, kept)
        _log.debug("recorded a graph of %d tokens, %d rows in %.3f s", *key[:2], time.perf_counter() - began)

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
