"""Prefill attention on a GPU: paged Triton kernels, cuDNN in dense pieces, FlashInfer; at the shape of Llama 3 8B.

    PYTHONPATH=src python benchmarks/gpu/kernel_prefill.py [--flashinfer] [--out FILE]

It checks every variant against float64 first and exits with 1 if one is wrong. FLOPs are those of the two products
over the keys that are seen: 4 * heads * head_dim * (query, key) pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from octavo.attention.long_prefill import (
    CudnnPrefill,
    FlashInferPrefill,
    LongPrefill,
    LongPrefillShape,
    Thresholds,
    cudnn_attention,
)
from octavo.attention.prefill_items import prefill_items
from octavo.kernels.reference import prefill_attention as reference
from octavo.kernels.triton.prefill_attention import PrefillTuning, gather_kv, merge_attention, paged_prefill

VARIANTS = {
    "128x64 w8 s2": PrefillTuning(128, 64, 8, 2),
    "128x64 w8 s3": PrefillTuning(128, 64, 8, 3),
    "128x64 w8 s4": PrefillTuning(128, 64, 8, 4),
    "128x128 w8 s2": PrefillTuning(128, 128, 8, 2),
    "128x128 w8 s3": PrefillTuning(128, 128, 8, 3),
    "128x32 w8 s4": PrefillTuning(128, 32, 8, 4),
    "128x32 r128": PrefillTuning(128, 32, 8, 3, 128),
    "64x64 w4 s2": PrefillTuning(64, 64, 4, 2),
    "64x64 w4 s3": PrefillTuning(64, 64, 4, 3),
}
CASES = {
    "32,000 causal": [(0, 32_000)],
    "last 8,192 of 32,000": [(32_000 - 8192, 8192)],
    "8,192 causal": [(0, 8192)],
    "16 x 512": [(0, 512)] * 16,
    "64 x 128": [(0, 128)] * 64,
}
PIECES = (1024, 2048, 4096)


class NothingTaken(Exception):
    """The strategy leaves all of the problem to the Triton kernel."""


@dataclass(frozen=True)
class Row:
    slot: int
    start: int
    length: int


@dataclass
class Problem:
    """Rows in scattered blocks of a random cache of two layers, which take turns so that L2 does not help."""

    spans: list[tuple[int, int]]
    block_size: int = 64
    heads: int = 32
    kv_heads: int = 8
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    window: int | None = None
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [Row(i, *span) for i, span in enumerate(self.spans)]
        blocks = [-(-(row.start + row.length) // self.block_size) for row in self.rows]
        free = (torch.randperm(sum(blocks)) + 1).tolist()
        tables = torch.zeros(len(blocks), -(-max(blocks) // 16) * 16, dtype=torch.int32)
        for slot, count in enumerate(blocks):
            tables[slot, :count] = torch.tensor([free.pop() for _ in range(count)])
        shape = (2, sum(blocks) + 1, 2, self.kv_heads, self.block_size, self.head_dim)
        self.caches = torch.empty(shape, dtype=self.kv_dtype, device="cuda")
        for layer in self.caches:
            layer.copy_(torch.randn(shape[1:], dtype=torch.bfloat16, device="cuda"))
        self.starts = np.array([row.start for row in self.rows], np.int32)
        self.lengths = np.array([row.length for row in self.rows], np.int32)
        self.tables = tables.cuda()
        self.slots = torch.arange(len(blocks), dtype=torch.int32, device="cuda")
        self.device_starts = torch.from_numpy(self.starts).cuda()
        self.cu_q = torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int32, device="cuda")
        width = self.heads + 2 * self.kv_heads
        wide = torch.randn(int(self.lengths.sum()), width, self.head_dim, device="cuda").to(self.dtype)
        self.query = wide[:, : self.heads]
        self.out = torch.empty(self.query.shape, dtype=self.dtype, device="cuda")
        self.scale = self.head_dim**-0.5

    @property
    def flops(self) -> float:
        pairs = sum(length * start + length * (length + 1) / 2 for start, length in self.spans)
        return 4 * self.heads * self.head_dim * pairs

    def shape(self) -> LongPrefillShape:
        context = max(start + length for start, length in self.spans)
        sizes = (self.heads, self.kv_heads, self.head_dim, self.dtype, self.kv_dtype, self.block_size, context)
        return LongPrefillShape(*sizes, self.window, torch.device("cuda"))

    def triton(
        self, tuning: PrefillTuning | None, taken: dict[int, tuple[int, int]] | None = None
    ) -> Callable[[int], None]:
        planned = prefill_items(self.starts, self.lengths, self.heads // self.kv_heads, taken=taken)
        items = torch.from_numpy(planned).cuda()
        places = (self.tables, self.slots, self.device_starts, self.cu_q, items)

        def call(layer: int) -> None:
            cache = self.caches[layer % 2]
            paged_prefill(self.query, cache, *places, self.out, self.scale, self.window, tuning=tuning)

        return call

    def library(self, strategy: LongPrefill) -> Callable[[int], None]:
        """The strategy, and the Triton kernel for what it leaves."""
        taken = strategy.prepare(self.rows, self.tables)
        if not taken:
            raise NothingTaken
        rest = self.triton(None, taken)

        def call(layer: int) -> None:
            strategy.forward(layer, self.query, self.caches[layer % 2], self.out, self.scale)
            rest(layer)

        return call

    def error(self, call: Callable[[int], None]) -> float:
        """The largest difference from float64, in parts of 1 + |value|, after the outputs were poisoned."""
        self.out.fill_(torch.nan)
        call(0)
        expected = torch.empty_like(self.out)
        rows = [(row.slot, row.start, row.length) for row in self.rows]
        reference.paged_prefill(self.query, self.caches[0], self.tables, rows, expected, self.scale, self.window)
        difference = (self.out.double() - expected.double()).abs() / (1 + expected.double().abs())
        return float(difference.nan_to_num(torch.inf).max())


def milliseconds(call: Callable[[int], None]) -> float:
    """Median of five batches of calls back to back, each batch of about 15 ms (or one call)."""
    call(0)
    count = 1
    times: list[float] = []
    while len(times) < 5:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for layer in range(count):
            call(layer)
        end.record()
        end.synchronize()
        elapsed = begin.elapsed_time(end) / count
        if count == 1 and elapsed < 7:
            count = max(2, int(15 / elapsed))
            continue
        times.append(elapsed)
    return statistics.median(times)


def replayed(call: Callable[[int], None]) -> Callable[[int], None]:
    """The same for both layers as one CUDA graph, so that the host's part does not count; call with layer 0 only."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(2):
            call(layer)
    return lambda _: graph.replay()


def attempt(name: str, work: Callable[[], float]) -> float | None:
    """The result, or None after one line that says why not."""
    try:
        return work()
    except NothingTaken:
        return None
    except Exception as error:
        print(f"  {name}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
        return None


def check(flashinfer: bool) -> bool:
    """Every variant beside float64."""
    spans = [(70, 300), (0, 2), (1000, 3), (513, 190), (0, 129)]
    small: list[tuple[str, Problem, PrefillTuning | None, float]] = []
    for size in (16, 64, 128):
        problem = Problem(spans, size)
        small += [(f"{name} block {size}", problem, tuning, 0.02) for name, tuning in VARIANTS.items()]
    small += [
        ("float32", Problem(spans, heads=8, kv_heads=2, dtype=torch.float32, kv_dtype=torch.float32), None, 1e-4),
        ("float16", Problem(spans, dtype=torch.float16, kv_dtype=torch.float16), None, 0.005),
        ("float8 KV", Problem(spans, kv_dtype=torch.float8_e4m3fn), None, 0.02),
        ("window", Problem(spans, window=100), None, 0.03),
        ("window, block 16", Problem(spans, 16, window=100), None, 0.03),
        ("group of 3, head_dim 64", Problem(spans, 16, heads=9, kv_heads=3, head_dim=64), None, 0.02),
        ("group of 2", Problem(spans, heads=16), None, 0.02),
        ("head_dim 80", Problem(spans, heads=8, kv_heads=2, head_dim=80), None, 0.02),
        ("head_dim 256", Problem(spans, heads=8, kv_heads=2, head_dim=256), None, 0.02),
    ]
    with ThreadPoolExecutor(12) as pool:  # compiles; each problem's output may be overwritten by its neighbours
        list(pool.map(lambda each: attempt("compile", lambda: each[1].triton(each[2])(0) or 0.0), small))
    torch.cuda.synchronize()
    good, worst = True, 0.0
    for name, problem, tuning, allowed in small:
        error = attempt(name, lambda p=problem, t=tuning: p.error(p.triton(t)))
        worst = max(worst, error or 0.0)
        if error is not None and error > allowed:
            print(f"  WRONG {name}: {error:.2e}")
            good = False
    long = Problem([(5, 3), (3000, 5000), (0, 40), (0, 4300)], heads=8, kv_heads=2)
    strategies: list[tuple[str, Callable[[], LongPrefill]]] = [
        (f"cuDNN {piece}", lambda piece=piece: CudnnPrefill(long.shape(), Thresholds(2, 2), piece)) for piece in PIECES
    ]
    if flashinfer:
        strategies.append(("FlashInfer", lambda: FlashInferPrefill(long.shape(), Thresholds(2, 2))))
    for name, make in strategies:
        error = attempt(name, lambda make=make: long.error(long.library(make())))
        worst = max(worst, error or 0.0)
        if error is not None and error > 0.02:
            print(f"  WRONG {name}: {error:.2e}")
            good = False
    print(f"checked {len(small) + len(strategies)} variants, largest error {worst:.1e}")
    return good


def time_triton(results: list[dict[str, object]]) -> None:
    print(f"Triton, TFLOP/s {'':27}" + " ".join(f"{name:>13}" for name in VARIANTS))
    cases = [(name, Problem(spans, size)) for name, spans in CASES.items() for size in (16, 64, 128)]
    cases.append(("8,192 causal, fp8 KV", Problem(CASES["8,192 causal"], 64, kv_dtype=torch.float8_e4m3fn)))
    for case, problem in cases:
        cells = []
        for name, tuning in VARIANTS.items():
            speed = attempt(name, lambda t=tuning, p=problem: p.flops / milliseconds(replayed(p.triton(t))) * 2 / 1e9)
            cells.append(f"{speed:13.0f}" if speed else f"{'-':>13}")
            results.append({"kernel": "triton", "case": case, "block": problem.block_size, "variant": name, "v": speed})
        print(f"  {case:22} block {problem.block_size:>4}        " + " ".join(cells))


def time_libraries(flashinfer: bool, results: list[dict[str, object]]) -> None:
    """Strategies from end to end, the Triton kernel's part included; contexts for the threshold."""
    cases = {name: CASES[name] for name in list(CASES)[:3]}
    spans = ((1024, 0), (2048, 0), (4096, 0), (2048, 2048), (2048, 6144), (1024, 7168))
    cases |= {f"{length:,} after {start:,}": [(start, length)] for length, start in spans}
    names = [*(f"cuDNN {piece}" for piece in PIECES), *(["FlashInfer"] if flashinfer else [])]
    print(f"end to end, TFLOP/s (block 64) {'Triton':>9} " + " ".join(f"{name:>11}" for name in names))
    for case, spans in cases.items():
        problem = Problem(spans)
        makes: list[Callable[[], LongPrefill]] = [
            lambda piece=piece, p=problem: CudnnPrefill(p.shape(), Thresholds(2, 2), piece) for piece in PIECES
        ]
        if flashinfer:
            makes.append(lambda p=problem: FlashInferPrefill(p.shape(), Thresholds(2, 2)))
        calls = [lambda p=problem: p.triton(None), *(lambda m=make, p=problem: p.library(m()) for make in makes)]
        cells = []
        for name, make_call in zip(("Triton", *names), calls, strict=True):
            run = lambda m=make_call, p=problem: p.flops / milliseconds(m()) / 1e9  # noqa: E731
            speed = attempt(name, run)
            cells.append(f"{speed:11.0f}" if speed else f"{'-':>11}")
            results.append({"kernel": name, "case": case, "block": 64, "v": speed})
        print(f"  {case:26} " + " ".join(cells))


def time_parts(results: list[dict[str, object]]) -> None:
    """What cuDNN's calls, the gather and the merge cost on their own."""
    problem = Problem(CASES["32,000 causal"])
    for piece in PIECES:
        kv = torch.randn(2, 1, 8, 32_000, 128, dtype=torch.bfloat16, device="cuda")
        query = problem.query[:piece].transpose(0, 1)[None]
        speeds = []
        for keys, causal in ((piece, True), (4096, False), (16_384, False)):
            key, value = kv[:, :, :, :keys]
            ms = milliseconds(lambda _, q=query, k=key, v=value, c=causal: cudnn_attention(q, k, v, c, 0.088) and None)
            speeds.append(4 * 32 * 128 * piece * keys / (2 if causal else 1) / ms / 1e9)
        parts, sums = zip(*(cudnn_attention(query, *kv[:, :, :, :piece], False, 0.088) for _ in range(4)), strict=True)
        merged = ([part[0] for part in parts], [lse.view(32, piece) for lse in sums], problem.out[:piece])
        ms = milliseconds(lambda _, args=merged: merge_attention(*args))
        print(
            f"cuDNN {piece}: causal {speeds[0]:.0f}, 4,096 keys {speeds[1]:.0f}, "
            f"16,384 keys {speeds[2]:.0f} TFLOP/s; merging 4 takes {ms * 1e3:.0f} us"
        )
        results.append({"kernel": f"cudnn {piece}", "v": speeds, "merge_ms": ms})
    buffer = torch.empty(2, 8, 32_000, 128, dtype=torch.bfloat16, device="cuda")
    ms = milliseconds(lambda layer: gather_kv(problem.caches[layer % 2], problem.tables[0], 32_000, buffer))
    print(f"gather of 32,000 tokens: {ms * 1e3:.0f} us, {2 * buffer.nbytes / ms / 1e9:.2f} TB/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flashinfer", action="store_true", help="try FlashInfer too; its build takes 80 s")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    good = check(options.flashinfer)
    results: list[dict[str, object]] = []
    for part in (time_triton, lambda r: time_libraries(options.flashinfer, r), time_parts):
        attempt("timing", lambda part=part: part(results) or 0.0)
    print(f"{torch.cuda.get_device_name()}, {time.perf_counter() - began:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
