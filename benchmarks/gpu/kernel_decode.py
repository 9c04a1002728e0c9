"""Split paged decode attention on a GPU: is it right, and which configuration is fastest for which shape?

    PYTHONPATH=src python3 benchmarks/gpu/kernel_decode.py [--out results.json]

First correctness against float64 torch, over shapes, splits, windows, repeated launches and graph replays; exits 1
where anything is off. Then times every configuration for the shapes below. One launch is one layer's attention of one
step; launches of a graph rotate over a pool far larger than the L2 cache. TB/s counts the KV that must be read.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from octavo.attention.prefill_items import prefill_items
from octavo.attention.work_items import ITEM_FIELDS, DecodePlanner
from octavo.kernels.triton.decode_attention import DecodeConfig, DecodeScratch, decode_scratch, paged_decode
from octavo.kernels.triton.prefill_attention import paged_prefill

POOL_BYTES = 2_300_000_000  # holds the KV of 16 sequences of 32,000 tokens in bfloat16, and never fits the L2 cache
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}
CONFIGS = {
    "bf16": [
        DecodeConfig(32, 4, 4),
        DecodeConfig(32, 2, 4),
        DecodeConfig(64, 2, 3),
        DecodeConfig(64, 4, 2),
        DecodeConfig(64, 4, 3),
        DecodeConfig(64, 4, 4),
        DecodeConfig(64, 4, 3, evict_first=True),
        DecodeConfig(64, 8, 4),
        DecodeConfig(128, 4, 2),
        DecodeConfig(128, 4, 3),
        DecodeConfig(128, 8, 3),
    ],
    "fp8": [
        DecodeConfig(64, 4, 4),
        DecodeConfig(32, 4, 5, value_pairs=True),
        DecodeConfig(64, 2, 4, value_pairs=True),
        DecodeConfig(64, 4, 3, value_pairs=True),
        DecodeConfig(64, 4, 4, value_pairs=True),
        DecodeConfig(64, 4, 5, value_pairs=True),
        DecodeConfig(64, 4, 4, evict_first=True, value_pairs=True),
        DecodeConfig(64, 8, 4, value_pairs=True),
        DecodeConfig(128, 4, 3, value_pairs=True),
        DecodeConfig(128, 8, 3, value_pairs=True),
        DecodeConfig(128, 8, 4, value_pairs=True),
    ],
}
FEW = {"bf16": [DecodeConfig(64, 4, 3), DecodeConfig(128, 8, 3)], "fp8": [DecodeConfig(64, 4, 4, value_pairs=True)]}


@dataclass(frozen=True)
class Heads:
    """Of one attention layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128


@dataclass(frozen=True)
class Batch:
    """The sequences of one step; lengths are drawn from [shortest, longest]."""

    num_rows: int
    shortest: int
    longest: int

    @property
    def name(self) -> str:
        span = f"{self.longest}" if self.shortest == self.longest else f"{self.shortest}-{self.longest}"
        return f"{self.num_rows}x{span}"

    def lengths(self) -> list[int]:
        rng = np.random.default_rng(self.num_rows)
        return rng.integers(self.shortest, self.longest + 1, self.num_rows).tolist()


LLAMA, QWEN, SMOL = Heads("llama3-8b", 32, 8), Heads("qwen3-0.6b", 16, 8), Heads("smollm2", 9, 3, 64)
BATCHES = [
    Batch(1, 512, 512),
    Batch(1, 32000, 32000),
    Batch(16, 32000, 32000),
    Batch(64, 1024, 1024),
    Batch(256, 1024, 1024),
    Batch(256, 100, 2000),
    Batch(1000, 350, 350),
]

Group = tuple[Heads, str, int, list[DecodeConfig]]  # what is timed: layer, KV dtype, block size, configurations


def planner_for(heads: Heads, **options: int | bool) -> DecodePlanner:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return DecodePlanner(processors, heads.num_kv_heads, **options)


@dataclass
class Step:
    """Everything one launch is given, but the cache and the query."""

    heads: Heads
    lengths: list[int]
    block_size: int
    num_blocks: int
    planner: DecodePlanner
    block_tables: Tensor = field(init=False)
    row_slots: Tensor = field(init=False)
    cu_q: Tensor = field(init=False)
    items: Tensor = field(init=False)
    scratch: DecodeScratch = field(init=False)

    def __post_init__(self) -> None:
        rows, counts = len(self.lengths), [-(-n // self.block_size) for n in self.lengths]
        assert sum(counts) < self.num_blocks
        order = torch.randperm(self.num_blocks - 1, dtype=torch.int32) + 1
        tables = torch.zeros(rows, max(counts), dtype=torch.int32)
        at = 0
        for row, count in enumerate(counts):
            tables[row, :count] = order[at : at + count]
            at += count
        self.block_tables = tables.cuda()
        self.row_slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.cu_q = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        bound = self.planner.max_items(rows)
        self.items = torch.full((bound, ITEM_FIELDS), -1, dtype=torch.int32, device="cuda")
        self.plan(self.lengths)
        h = self.heads
        self.scratch = decode_scratch(bound, rows, h.num_heads, h.num_kv_heads, h.head_dim, torch.device("cuda"))

    def plan(self, lengths: list[int]) -> None:
        """New lengths, none longer than before, in the same buffers."""
        self.lengths = lengths
        padded = np.empty(tuple(self.items.shape), np.int32)
        self.planner.plan(lengths, out=padded)
        self.items.copy_(torch.from_numpy(padded))

    def launch(
        self,
        query: Tensor,
        cache: Tensor,
        out: Tensor,
        window: int | None = None,
        config: DecodeConfig | None = None,
        beside: bool = False,
    ) -> None:
        scale = self.heads.head_dim**-0.5
        tables = (self.block_tables, self.row_slots, self.cu_q, self.items)
        paged_decode(query, cache, *tables, out, self.scratch, scale, window, config, beside=beside)


def expected(step: Step, query: Tensor, cache: Tensor, window: int | None) -> Tensor:
    """Float64 attention, row by row."""
    heads, out = step.heads, []
    for row, length in enumerate(step.lengths):
        blocks = step.block_tables[row, : -(-length // step.block_size)].long()
        first = max(0, length - window) if window else 0
        kv = cache[blocks].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, first:length]
        grouped = query[row].double().view(heads.num_kv_heads, -1, heads.head_dim)
        weights = torch.softmax(grouped @ kv[0].transpose(1, 2) * heads.head_dim**-0.5, -1)
        out.append((weights @ kv[1]).view(heads.num_heads, heads.head_dim))
    return torch.stack(out)


def random_cache(step: Step, dtype: torch.dtype) -> Tensor:
    """One layer, NaN wherever no row has a position."""
    heads = step.heads
    cache = torch.randn(step.num_blocks, 2, heads.num_kv_heads, step.block_size, heads.head_dim, device="cuda")
    used = torch.zeros(step.num_blocks, step.block_size, dtype=torch.bool)
    for row, length in enumerate(step.lengths):
        for index, block in enumerate(step.block_tables[row].tolist()):
            used[block, : max(0, length - index * step.block_size)] = length > index * step.block_size
    cache.masked_fill_(~used.cuda()[:, None, None, :, None], torch.nan)
    return cache.to(dtype)


def check_shape(heads: Heads, lengths: list[int], block_size: int, dtypes: str, window: int | None) -> float:
    """Largest error of repeated launches, in units of the tolerance."""
    query_dtype, cache_dtype = (DTYPES[name] for name in dtypes.split("/"))
    num_blocks = sum(-(-n // block_size) for n in lengths) + 7
    step = Step(heads, lengths, block_size, num_blocks, planner_for(heads, min_positions=128))
    cache = random_cache(step, cache_dtype)
    fused = torch.randn(len(lengths), heads.num_heads + 3, heads.head_dim, device="cuda").to(query_dtype)
    query = fused[:, : heads.num_heads]
    want = expected(step, query, cache, window)
    tolerance = 1e-5 if query_dtype == torch.float32 else 8e-3
    worst = 0.0
    for _ in range(3):
        out = torch.full(query.shape, torch.nan, dtype=query_dtype, device="cuda")
        step.launch(query, cache, out, window)
        error = ((out.double() - want).abs() / (1 + want.abs())).max().item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst / tolerance


def check_replays() -> float:
    """A graph replayed over changing lengths, and 300 launches of split rows that must agree bit for bit."""
    lengths = [9000, 700, 33, 5000]
    step = Step(LLAMA, lengths, 64, 300, planner_for(LLAMA, min_positions=128))
    cache = torch.randn(300, 2, 8, 64, 128, device="cuda").bfloat16()
    query = torch.randn(4, 32, 128, device="cuda").bfloat16()
    out = torch.empty_like(query)
    step.launch(query, cache, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.launch(query, cache, out)
    worst = 0.0
    for lengths in ([9000, 700, 33, 5000], [1, 1, 1, 1], [128, 256, 1, 4999], [8999, 2, 33, 130]):
        step.plan(lengths)
        want = expected(step, query, cache, None)
        graph.replay()
        once = out.clone()
        worst = max(worst, ((once.double() - want).abs() / (1 + want.abs())).max().item() / 8e-3)
        for _ in range(75):
            out.fill_(torch.nan)
            graph.replay()
            worst = worst if torch.equal(out, once) else math.inf
    return worst


def check_beside() -> float:
    """180 rows that decode beside three prompts, in 1,600 launches of a graph, must say bit for bit what they say one
    after the other. What stands before and after them in the graph writes their queries and reads their outputs."""
    chunks = [(300, 100), (0, 40), (17, 2)]  # tokens that are there, and new ones
    lengths = np.random.default_rng(0).integers(200, 1900, 180).tolist()
    starts = np.array([n - 1 for n in lengths] + [start for start, _ in chunks], np.int32)
    counts = np.array([1] * len(lengths) + [count for _, count in chunks], np.int32)
    num_blocks = int(sum(-(-(starts + counts) // 64))) + 7
    step = Step(LLAMA, (starts + counts).tolist(), 64, num_blocks, planner_for(LLAMA))
    step.plan(lengths)
    step.cu_q = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device="cuda")
    tiles = prefill_items(starts, counts, 4)
    items = torch.from_numpy(np.concatenate((tiles, np.full((30, 2), -1, np.int32)))).cuda()
    where = step.block_tables, step.row_slots, torch.from_numpy(starts).cuda(), step.cu_q, items
    cache = torch.randn(num_blocks, 2, 8, 64, 128, device="cuda").bfloat16()
    given = torch.randn(8, int(counts.sum()), 32, 128, device="cuda").bfloat16()
    query, out, said = (torch.empty_like(tensor) for tensor in (given[0], given[0], given))

    def launch(beside: bool) -> None:
        paged_prefill(query, cache, *where, out, 128**-0.5)
        step.launch(query, cache, out, beside=beside)

    expected_outputs = []
    for one in given:
        query.copy_(one)
        launch(False)
        expected_outputs.append(out.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one, into in zip(given, said, strict=True):
            query.copy_(one)
            launch(True)
            into.copy_(out)
    want = torch.stack(expected_outputs)
    for _ in range(200):
        out.fill_(torch.nan)
        graph.replay()
        if not torch.equal(said, want):
            return math.inf
    return 0.0


def check_all() -> bool:
    cases = [
        (LLAMA, [1, 16, 17, 512, 1024], 16, "bf16/bf16", None),
        (LLAMA, [32000, 5, 1000], 64, "bf16/bf16", None),
        (LLAMA, [3000, 129, 128], 32, "bf16/fp8", None),
        (LLAMA, [3000, 64, 2000], 128, "bf16/fp8", None),
        (LLAMA, [3000, 64, 2000], 64, "bf16/bf16", 500),
        (QWEN, [700, 1, 90], 64, "bf16/bf16", None),
        (SMOL, [1, 40, 2000], 16, "fp32/fp32", None),
        (SMOL, [1, 40, 2000], 64, "fp32/fp32", 300),
        (SMOL, [900, 40], 32, "fp32/fp8", None),
        (Heads("odd", 20, 1, 80), [300, 40], 48, "bf16/bf16", None),
        (Heads("wide", 8, 4, 256), [300, 40], 16, "bf16/bf16", None),
    ]
    bad, worst = [], 0.0
    jobs = {f"{h.name} {n} bs{b} {t} window {w}": (check_shape, (h, n, b, t, w)) for h, n, b, t, w in cases}
    jobs["replays"] = (check_replays, ())
    jobs["beside prompts"] = (check_beside, ())
    for name, (run, arguments) in jobs.items():
        try:
            error = run(*arguments)
        except Exception as exc:
            bad.append(f"{name}: {type(exc).__name__}: {str(exc).splitlines()[:1]}")
            continue
        worst = max(worst, error)
        if not error <= 1:
            bad.append(f"{name}: {error:.2f} of the tolerance")
    print(f"correctness: {len(jobs) - len(bad)}/{len(jobs)} right, worst error {worst:.2f} of the tolerance")
    print("\n".join(f"  WRONG {line}" for line in bad), end="\n" if bad else "")
    return not bad


@lru_cache(maxsize=1)
def pool() -> Tensor:
    """Bytes; as bfloat16 numbers about 1, as fp8 any."""
    made = torch.empty(POOL_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    return made.normal_().view(torch.uint8)


@dataclass
class Load:
    """What a configuration is timed on: a step, and as many layers as the pool holds."""

    step: Step
    layers: Tensor
    query: Tensor
    out: Tensor
    kv_bytes: int

    @classmethod
    def make(cls, heads: Heads, batch: Batch, kv: str, block_size: int, planner: DecodePlanner) -> Load:
        lengths, dtype = batch.lengths(), DTYPES[kv]
        position_bytes = 2 * heads.num_kv_heads * heads.head_dim * dtype.itemsize
        num_blocks = sum(-(-n // block_size) for n in lengths) + 1
        layer_bytes = num_blocks * block_size * position_bytes
        num_layers = max(1, min(128, POOL_BYTES // layer_bytes))
        shape = (num_layers, num_blocks, 2, heads.num_kv_heads, block_size, heads.head_dim)
        layers = pool()[: num_layers * layer_bytes].view(dtype).view(shape)
        query = torch.randn(len(lengths), heads.num_heads, heads.head_dim, device="cuda").bfloat16()
        step = Step(heads, lengths, block_size, num_blocks, planner)
        return cls(step, layers, query, torch.empty_like(query), sum(lengths) * position_bytes)

    def compile(self, config: DecodeConfig) -> None:
        torch.cuda.set_device(0)  # makes the context current in this thread
        self.step.launch(self.query, self.layers[0], self.out, None, config)

    def microseconds(self, config: DecodeConfig | None) -> float:
        """Median time of one launch in a replayed graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in self.layers:
                self.step.launch(self.query, layer, self.out, None, config)
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(events)]
        return statistics.median(times) * 1000 / len(self.layers)


def label(config: DecodeConfig) -> str:
    return f"{config.tile}/{config.num_warps}/{config.num_stages}{'e' * config.evict_first}{'p' * config.value_pairs}"


def compile_all(
    groups: list[tuple[Heads, str, int, list[DecodeConfig]]],
) -> dict[tuple[str, str, int], list[DecodeConfig]]:
    """Compile every group's configurations in parallel; those that compiled, by (heads, KV dtype, block size)."""
    jobs = []
    with ThreadPoolExecutor(14) as threads:
        for heads, kv, block_size, configs in groups:
            load = Load.make(heads, Batch(2, 300, 300), kv, block_size, planner_for(heads))
            jobs += [(heads, kv, block_size, c, threads.submit(load.compile, c)) for c in configs]
    compiled = defaultdict(list)
    for heads, kv, block_size, config, job in jobs:
        if error := job.exception():
            print(f"  {heads.name} {kv} bs{block_size} {label(config)}: {type(error).__name__} {str(error)[:90]!r}")
        else:
            compiled[heads.name, kv, block_size].append(config)
    torch.cuda.synchronize()
    return compiled


def time_configs(groups: list[Group]) -> list[dict[str, object]]:
    """Every configuration on every batch; a failing one costs a line."""
    compiled, rows = compile_all(groups), []
    for heads, kv, block_size, _ in groups:
        for batch in BATCHES if heads is LLAMA else [b for b in BATCHES if b.name == "256x1024"]:
            load = Load.make(heads, batch, kv, block_size, planner_for(heads))
            for config in compiled[heads.name, kv, block_size]:
                try:
                    took = load.microseconds(config)
                except Exception as exc:
                    print(f"  {heads.name} {kv} bs{block_size} {label(config)}: {str(exc)[:90]!r}")
                    continue
                row = {"heads": heads.name, "batch": batch.name, "kv": kv, "block_size": block_size}
                measured = {"microseconds": took, "tb_per_s": load.kv_bytes / took / 1e6}
                rows.append(row | {"config": label(config)} | measured)
    return rows


def print_configs(rows: list[dict[str, object]]) -> None:
    """The best of each shape, then which configuration loses least over all shapes."""
    shapes = defaultdict(lambda: defaultdict(list))
    for row in rows:
        shapes[row["heads"], row["batch"], row["kv"]][row["block_size"]].append(row)
    print("best by shape (tile/warps/stages, e: evict first, p: value pairs; us; TB/s), by block size")
    losses = defaultdict(lambda: defaultdict(list))
    for (heads, batch, kv), by_size in shapes.items():
        cells = []
        for size, found in sorted(by_size.items()):
            best = min(found, key=lambda r: r["microseconds"])
            cells.append(f"{size}: {best['config']:>9} {best['microseconds']:7.1f} {best['tb_per_s']:.2f}")
            for row in found if heads == LLAMA.name else ():
                losses[kv, size][row["config"]].append(math.log(row["microseconds"] / best["microseconds"]))
        print(f"  {heads:10} {batch:12} {kv:4} | " + " | ".join(cells))
    print("slowdown over the best, geometric mean over llama3-8b's shapes (worst shape)")
    for (kv, size), by_config in sorted(losses.items()):
        mean = {name: statistics.fmean(values) for name, values in by_config.items()}
        top = sorted(mean, key=mean.__getitem__)[:4]
        told = [f"{n} {math.exp(mean[n]):.3f} ({math.exp(max(by_config[n])):.2f})" for n in top]
        print(f"  {kv:4} bs{size:<3} " + ", ".join(told))


def time_planners() -> list[dict[str, object]]:
    """How finely to cut: microseconds with the default configuration, bf16, blocks of 64."""
    rows = []
    print("planner: us at min_positions 128/256/512, by programs per processor; then 4, 256 in the rows' own order")
    for batch in BATCHES[:4] + BATCHES[5:6]:
        cells = []
        for programs, minimum, longest_first in [*product((2, 4, 8, 16), (128, 256, 512), (True,)), (4, 256, False)]:
            options = {"programs_per_processor": programs, "min_positions": minimum, "longest_first": longest_first}
            load = Load.make(LLAMA, batch, "bf16", 64, planner_for(LLAMA, **options))
            took = load.microseconds(None)
            cells.append(took)
            rows.append({"batch": batch.name, **options, "microseconds": took})
        told = [f"{p}: " + "/".join(f"{t:.1f}" for t in cells[3 * i : 3 * i + 3]) for i, p in enumerate((2, 4, 8, 16))]
        print(f"  {batch.name:12} " + "  ".join(told) + f"  unsorted: {cells[-1]:.1f}")
    return rows


def read_bandwidth() -> float:
    """TB/s of torch's sum over the pool: what reading alone reaches."""
    numbers = pool()[: POOL_BYTES // 16 * 16].view(torch.float32)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    numbers.sum()
    start.record()
    for _ in range(3):
        numbers.sum()
    end.record()
    torch.cuda.synchronize()
    return 3 * numbers.nbytes / start.elapsed_time(end) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write every measurement there, as JSON")
    out = parser.parse_args().out
    began = time.perf_counter()
    torch.manual_seed(0)
    if not check_all():
        sys.exit(1)
    print(f"{torch.cuda.get_device_name()}; reading alone: {read_bandwidth():.2f} TB/s")
    groups = [(LLAMA, kv, size, CONFIGS[kv]) for kv in ("bf16", "fp8") for size in (16, 64)]
    groups += [(heads, kv, size, FEW[kv]) for heads, size in ((LLAMA, 32), (QWEN, 64)) for kv in ("bf16", "fp8")]
    configs = time_configs(groups)
    print_configs(configs)
    planners = time_planners()
    print(f"{time.perf_counter() - began:.0f} s in all")
    if out:
        table = {"device": torch.cuda.get_device_name(), "configs": configs, "planners": planners}
        table["tried"] = {kv: [asdict(config) for config in tried] for kv, tried in CONFIGS.items()}
        with open(out, "w") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
