"""What rate the library's matrix products keep up, beside a short burst: what the GPU's power allows.

    python benchmarks/gpu/sustained_rate.py [--seconds 1.3] [--tokens 128 256 ...]

The products of four layers of llama3-8b's shape in a graph, random weights, bfloat16 and FP8 with a scale a row. Burst:
one replay after a pause; sustained: the second half of so many seconds. Power and clock are nvidia-smi's medians, and
why it throttles, as it says it (4: the power limit).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from kernel_gemm import DEVICE, LLAMA
from torch import Tensor

LAYERS = 4
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 9216)
FP8 = torch.float8_e4m3fn
QUERY = "power.draw,clocks.sm,clocks_event_reasons.active"


class Monitor:
    """What nvidia-smi says every 50 ms, until it is closed."""

    def __init__(self) -> None:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-lms", "50"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._seen: list[tuple[float, list[str]]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._seen.append((time.monotonic(), line.strip().split(", ")))

    def between(self, begin: float, end: float) -> str:
        """Medians of the time from 0.3 s after the begin on: its figures are averages themselves."""
        seen = [fields for at, fields in self._seen if begin + 0.3 < at < end]
        if not seen:
            return "not seen"
        watts, clock = (statistics.median(float(fields[index]) for fields in seen) for index in (0, 1))
        return f"{watts:.0f} W, {clock:.0f} MHz, reasons {seen[-1][2]}"

    def close(self) -> None:
        self._process.terminate()


def graph(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    work()
    torch.cuda.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        work()
    return made


def products(m: int, weights: list[Tensor], fp8: bool) -> Callable[[], None]:
    """What multiplies the same tokens by each of the weights."""
    inputs = {size: torch.randn(m, size, device=DEVICE, dtype=torch.bfloat16) for size in {w.shape[1] for w in weights}}
    one = torch.ones(max(m, *(len(w) for w in weights)), device=DEVICE)
    if fp8:
        inputs = {size: x.to(FP8) for size, x in inputs.items()}

    def multiply() -> None:
        for weight in weights:
            x = inputs[weight.shape[1]]
            if fp8:
                scales = {"scale_a": one[:m, None], "scale_b": one[None, : len(weight)]}
                torch._scaled_mm(x, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
            else:
                F.linear(x, weight)

    return multiply


def measure(m: int, weights: list[Tensor], fp8: bool, seconds: float, monitor: Monitor) -> str:
    made = graph(products(m, weights, fp8))
    flop = 2 * m * sum(weight.numel() for weight in weights)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    time.sleep(0.4)
    made.replay()
    events[0].record()
    made.replay()
    events[1].record()
    torch.cuda.synchronize()
    once = events[0].elapsed_time(events[1]) / 1e3
    count, began = max(2, int(seconds / once)), time.monotonic()
    for index in range(count):
        if index == count // 2:
            events[1].record()
        made.replay()
    events[2].record()
    torch.cuda.synchronize()
    kept = flop * (count - count // 2) / events[1].elapsed_time(events[2]) / 1e9
    said = monitor.between(began, time.monotonic())
    name = "fp8 " if fp8 else "bf16"
    return f"{name} {m:5} tokens: burst {flop / once / 1e12:5.0f} TFLOP/s, kept up {kept:5.0f}; {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.3)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    args = parser.parse_args()
    monitor = Monitor()
    shapes = [shape for _ in range(LAYERS) for shape in LLAMA.values()]
    weights = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.02 for shape in shapes]
    for fp8 in (False, True):
        if fp8:
            weights = [(weight * 50).to(FP8) for weight in weights]
        for m in args.tokens:
            print(measure(m, weights, fp8, args.seconds, monitor), flush=True)
    monitor.close()


if __name__ == "__main__":
    main()
