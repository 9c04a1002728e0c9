"""Steps recorded as CUDA graphs: one launch in place of some three hundred."""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.worker.step_buffers import StepShape

_log = logging.getLogger(__name__)

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
_MIXED_ROWS = (32, 128, 256)


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step leaves on the device. hidden: [T, hidden_size]; logits: [R, vocab_size]. Of a graph, they are
    overwritten by the next replay of any."""

    hidden: Tensor
    logits: Tensor


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
    """Graphs by size, all in one memory pool: they run one after the other. A size is recorded at its first use, or
    before that, while there is time.

    compute: launches a step. clear: puts the buffers into a state in which a step changes nothing.
    max_items: for (rows, tokens), how many decode and prefill items there may be.
    """

    def __init__(
        self,
        compute: Compute,
        clear: Callable[[], None],
        max_items: Callable[[int, int], tuple[int, int]],
        max_rows: int,
        max_tokens: int,
    ) -> None:
        self._compute = compute
        self._clear = clear
        self._max_items = max_items
        self._decode_sizes = [n for n in _DECODE_SIZES if n < max_rows] + [min(max_rows, _DECODE_SIZES[-1])]
        self._mixed_tokens = [n for n in _MIXED_TOKENS if n <= max_tokens]
        self._mixed_rows = [n for n in _MIXED_ROWS if n < max_rows] + [min(max_rows, _MIXED_ROWS[-1])]
        self._graphs: dict[tuple[int, int], StepGraph] = {}  # by tokens and rows
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    @property
    def largest_decode(self) -> StepShape:
        """The largest decode step that is ever recorded."""
        return self._shape(self._decode_sizes[-1], self._decode_sizes[-1], True)

    def find(self, num_tokens: int, num_rows: int, decodes: bool) -> StepGraph | None:
        """The smallest graph that holds such a step, recorded now if it was not; None if none is that large."""
        key = self._key(num_tokens, num_rows, decodes)
        if key is None:
            return None
        graph = self._graphs.get(key)
        return graph if graph is not None else self._record(*key, decodes)

    def record_next(self) -> bool:
        """Record one more of the decode sizes, those that serve most first. False: none is left."""
        for size in sorted(self._decode_sizes, key=lambda n: (n.bit_count(), n)):
            if (size, size) not in self._graphs:
                self._record(size, size, True)
                return True
        return False

    def record_for(self, seconds: float) -> int:
        """Record until the time is up; returns how many there are."""
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline and self.record_next():
            pass
        return len(self._graphs)

    def _key(self, num_tokens: int, num_rows: int, decodes: bool) -> tuple[int, int] | None:
        if decodes:
            at = bisect.bisect_left(self._decode_sizes, num_rows)
            return (self._decode_sizes[at],) * 2 if at < len(self._decode_sizes) else None
        tokens = bisect.bisect_left(self._mixed_tokens, num_tokens)
        rows = bisect.bisect_left(self._mixed_rows, num_rows)
        if tokens == len(self._mixed_tokens) or rows == len(self._mixed_rows):
            return None
        # One token more than rows, so that a mixed step never shares its key with a decode step.
        return self._mixed_tokens[tokens], min(self._mixed_rows[rows], self._mixed_tokens[tokens] - 1)

    def _shape(self, num_tokens: int, num_rows: int, decodes: bool) -> StepShape:
        num_decode_items, num_prefill_items = self._max_items(num_rows, num_tokens)
        return StepShape(num_tokens, num_rows, num_decode_items, 0 if decodes else num_prefill_items, decodes)

    def _record(self, num_tokens: int, num_rows: int, decodes: bool) -> StepGraph:
        began = time.perf_counter()
        shape = self._shape(num_tokens, num_rows, decodes)
        graph = torch.cuda.CUDAGraph()
        self._clear()
        self._compute(shape)  # compiles, and sets up libraries: neither may happen while recording
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                computed = self._compute(shape)
            finally:
                graph.capture_end()
        recorded = self._graphs[(num_tokens, num_rows)] = StepGraph(shape, graph, computed)
        _log.debug(
            "recorded a graph of %d tokens, %d rows in %.3f s", num_tokens, num_rows, time.perf_counter() - began
        )
        return recorded
