"""Time of one layer's paged attention (KV write included) on a CPU, one JSON row for each case.

    python benchmarks/attention_cpu.py --threads 2

The shape is that of SmolLM2-135M. Each step runs `prepare` once and `forward` for every layer, with
block tables drawn at random from a pool much larger than the caches of the processor.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from octavo.attention.backend import AttentionBatch
from octavo.attention.cpu import CpuAttention
from octavo.config import home
from octavo.kernels.cpu import library

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 30, 9, 3, 64, 16, 2048


@dataclass(frozen=True)
class Layer:
    layer_index: int
    num_heads: int = NUM_HEADS
    num_kv_heads: int = NUM_KV_HEADS
    head_dim: int = HEAD_DIM
    scale: float = HEAD_DIM**-0.5
    sliding_window: int | None = None


def cases() -> dict[str, list[tuple[int, int]]]:
    """(start, length) of each row, by case."""
    draw = random.Random(0)
    decodes = [(draw.randint(64, 384) - 1, 1) for _ in range(32)]
    return {
        **{f"1 decode, context {n}": [(n - 1, 1)] for n in (128, 256, 384, 512, 1024, 2048)},
        "8 decodes, contexts 64-384": decodes[:8],
        "32 decodes, contexts 64-384": decodes,
        "32 decodes, context 1024": [(1023, 1)] * 32,
        **{f"prefill {n}": [(0, n)] for n in (128, 256, 512)},
        "16 prompts of 16-32 tokens": [(0, 16 + row) for row in range(16)],
        "chunk of 512 after 512": [(512, 512)],
        "chunk of 256 after 1792": [(1792, 256)],
        "30 decodes and a chunk of 200 after 200": [*decodes[:30], (200, 200)],
        "16 decodes of one prefix of 256": [(256 + draw.randint(0, 63), 1) for _ in range(16)],
    }


def make_batch(rows: list[tuple[int, int]], shared_blocks: int) -> AttentionBatch:
    widest = max(-(-(start + length) // BLOCK_SIZE) for start, length in rows)
    tables = torch.randint(1, NUM_BLOCKS, (len(rows), widest))
    tables[:, :shared_blocks] = tables[0, :shared_blocks]
    slots = [
        int(tables[row, position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        for row, (start, length) in enumerate(rows)
        for position in range(start, start + length)
    ]
    return AttentionBatch([start for start, _ in rows], [length for _, length in rows], tables, torch.tensor(slots))


def measure(backend: CpuAttention, batch: AttentionBatch, dtype: torch.dtype, steps: int) -> dict[str, float]:
    """Microseconds over `steps` steps: `forward` of one layer (median, least), and `prepare` (median)."""
    num_tokens = sum(batch.lengths)
    query = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, dtype=dtype)
    key, value = torch.randn(2, num_tokens, NUM_KV_HEADS, HEAD_DIM, dtype=dtype)
    layers = [Layer(index) for index in range(NUM_LAYERS)]
    forward, prepare = [], []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        backend.prepare(batch)
        prepared = time.perf_counter()
        for layer in layers:
            backend.forward(layer, query, key, value)
        forward.append((time.perf_counter() - prepared) / NUM_LAYERS * 1e6)
        prepare.append((prepared - begin) * 1e6)
    return {
        "us_per_layer": round(statistics.median(forward[1:]), 1),
        "least_us_per_layer": round(min(forward[1:]), 1),
        "us_prepare": round(statistics.median(prepare[1:]), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", choices=("native", "torch"), default="native")
    options = parser.parse_args()
    if options.kernels == "native":
        print(library.load(home() / "kernels"), file=sys.stderr)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    backend = CpuAttention(NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype)
    with torch.inference_mode():
        for name, rows in cases().items():
            batch = make_batch(rows, shared_blocks=16 if "one prefix" in name else 0)
            row = {"case": name, "dtype": options.dtype, "threads": options.threads, "kernels": options.kernels}
            print(json.dumps(row | measure(backend, batch, dtype, options.steps)), flush=True)


if __name__ == "__main__":
    main()
