"""Sampling kernels on a GPU: right first (oracles, chi-square), then microseconds a call.

    PYTHONPATH=src python benchmarks/gpu/kernel_sampling.py [--out FILE]

Device time is that of a replayed CUDA graph over as many copies of the logits as overflow the L2 cache; host time is
that of the Python call alone. Exits with 1 when a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.kernels.reference import sampling as reference
from octavo.kernels.triton.sampling import draw_tokens, redraw_tokens
from octavo.kernels.triton.sampling_rows import penalize, top_logprobs
from octavo.kernels.triton.sampling_truncation import truncation_cuts
from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.device_sampler import DeviceSampler
from octavo.worker.sampler.random import stream_of

DEVICE = torch.device("cuda")
VOCABULARIES = (128256, 151936)
ROWS = (1, 8, 64, 256, 1024)
OVERFLOWS_L2_BYTES = 160 << 20
MOST_COPIES = 32
WISHES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "T=1": {},
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 50},
    "min_p": {"min_p": 0.05},
    "penalty": {"frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logprobs": {"logprobs": 5},
}


def ints(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """bfloat16 [R, V], normal with a spread of 3, and a few tokens far above."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator, device=DEVICE) * 3
    peaks = torch.randint(0, vocab_size, (num_rows, 8), generator=generator, device=DEVICE)
    return logits.scatter_add_(1, peaks, torch.full_like(peaks, 10.0, dtype=torch.float32)).bfloat16()


class Batch:
    """R sequences in as many slots that all wish the same, and the runner's tables."""

    def __init__(self, num_rows: int, vocab_size: int, wish: dict[str, float]) -> None:
        self.sampler = DeviceSampler(num_rows, vocab_size, DEVICE)
        sampling = [SamplingParams(seed=slot, max_tokens=100, **wish) for slot in range(num_rows)]  # type: ignore[arg-type]
        prompt = list(range(100, 116))
        records = [self.sampler.set_slot(slot, s, (2,), prompt, 16) for slot, s in enumerate(sampling)]
        self.params = ints(np.stack(records))
        self.token_ids = torch.zeros(num_rows, 64, dtype=torch.int32, device=DEVICE)
        self.token_ids[:, :16] = ints(prompt)
        self.slots, self.positions = list(range(num_rows)), [16] * num_rows
        self.row_slots, self.at = ints(self.slots), ints(self.positions)
        self.samples = torch.ones_like(self.row_slots)
        self.out = torch.full((num_rows, 2), -7, dtype=torch.int32, device=DEVICE)
        num_counted = num_rows if "frequency_penalty" in wish else 0
        self.seen = torch.zeros(num_counted, vocab_size, dtype=torch.int32, device=DEVICE)

    def draw(self, logits: Tensor, **more: int) -> None:
        draw_tokens(logits, self.row_slots, self.at, self.params, self.samples, self.token_ids, self.out, **more)

    def redraw(self, logits: Tensor, cuts: tuple[Tensor, Tensor] | None) -> None:
        rows = self.row_slots
        redraw_tokens(logits, rows, rows, rows, self.at, self.params, cuts, self.seen, self.token_ids, self.out)

    def draw_more(self, logits: Tensor) -> Any:
        rows = self.sampler.needs_more(self.slots, self.positions)
        return self.sampler.draw_more(logits, rows, self.slots, self.positions, self.params, self.token_ids, self.out)


def check_draws(vocab_size: int) -> list[str]:
    """Every wish in one batch of 6 rows, against the oracles: errors, one a line."""
    wrong = []
    logits = random_logits(6, vocab_size, seed=1)
    for name, wish in WISHES.items():
        batch = Batch(6, vocab_size, wish)
        batch.draw(logits)
        more = batch.draw_more(logits)
        host = batch.sampler.pack_more(batch.out, more).cpu().numpy()
        results = batch.sampler.rows_from_host(host, [True] * 6, more)
        seen = reference.count_tokens(list(range(100, 116)), 16, vocab_size)
        temperature = wish.get("temperature", 1.0)
        for row, result in enumerate(results):
            values = logits[row].float().cpu()
            if name == "penalty":
                values = reference.penalize(values, seen, 1.1, 0.5, 0.0)
            kept = torch.ones_like(values, dtype=torch.bool)
            if temperature:
                limits = (int(wish.get("top_k", 0)), wish.get("top_p", 1.0), wish.get("min_p", 0.0))
                kept = reference.truncation_cuts(values, 1.0, *limits)
            scores = reference.gumbel_scores(values, temperature, stream_of(row), 16).masked_fill(~kept, -torch.inf)
            token = result.token_ids[0] if result.token_ids else -1
            if token < 0 or not scores.max() - scores[token] <= 1e-4:
                wrong.append(f"{name} V={vocab_size} row {row}: drew {token}, the oracle {int(scores.argmax())}")
            if name == "logprobs" and result.logprobs:
                ranks, ids, logprobs = reference.top_logprobs(values[None], torch.tensor([token]), 5)
                entry = result.logprobs[0]
                error = (torch.tensor(entry.logprobs).double() - logprobs[0]).abs().max().item()
                if entry.token_ids != ids[0].tolist() or entry.rank != int(ranks[0]) or error > 1e-4:
                    wrong.append(f"logprobs V={vocab_size} row {row}: off by {error:.1e}")
    return wrong


def check_cuts() -> list[str]:
    """How many tokens are kept, on 64 rows of each dtype, against sorting; 2 tokens of slack for float32's sums."""
    wrong = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for wish in ({"top_k": 50}, {"top_p": 0.95}, {"min_p": 0.01}, {"top_k": 1000, "top_p": 0.9}):
            logits = torch.randn(64, 32000, device=DEVICE).mul_(3).to(dtype)
            batch = Batch(64, 32000, wish)
            keys, ids = truncation_cuts(logits, batch.row_slots, batch.row_slots, batch.params)
            bits = (logits.float() + 0.0).view(torch.int32)
            ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
            cut = ((keys.long() & 0xFFFFFFFF) - 2**31)[:, None]
            at_cut = (ordered == cut) & (torch.arange(32000, device=DEVICE) < ids[:, None])
            counts = ((ordered > cut) | at_cut).sum(-1).cpu()
            limits = (int(wish.get("top_k", 0)), wish.get("top_p", 1.0), wish.get("min_p", 0.0))
            wanted = torch.stack([reference.truncation_cuts(row, 1.0, *limits).sum() for row in logits.cpu()])
            off = (counts - wanted).abs().max().item()
            if off > (0 if "top_p" not in wish else 2):
                wrong.append(f"cuts {dtype} {wish}: {off} tokens off")
    return wrong


def check_distribution() -> list[str]:
    """Chi-square of 2e6 draws from 1,000 tokens: the plain draw at three temperatures, and a truncated one."""
    wrong, vocab_size, num_rows, num_calls = [], 1000, 65536, 31
    logits = torch.randn(1, vocab_size, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE).bfloat16()
    table = torch.zeros(1, num_rows * num_calls, dtype=torch.int32, device=DEVICE)
    rows, ones = ints([0] * num_rows), ints([1] * num_rows)
    out = torch.zeros(num_rows, 2, dtype=torch.int32, device=DEVICE)
    for temperature, top_k in ((0.5, 0), (1.0, 0), (1.7, 0), (1.0, 200)):
        batch = Batch(1, vocab_size, {"temperature": temperature, "top_k": top_k})
        cuts = truncation_cuts(logits, rows, rows, batch.params) if top_k else None
        for call in range(num_calls):
            at = torch.arange(num_rows, dtype=torch.int32, device=DEVICE) + num_rows * call
            if top_k:
                every = ints(range(num_rows))
                redraw_tokens(logits, rows, every, rows, at, batch.params, cuts, batch.seen, table, out)
            else:
                draw_tokens(logits.expand(num_rows, -1), rows, at, batch.params, ones, table, out)
        values = logits[0].cpu()
        kept = reference.truncation_cuts(values, temperature, top_k, 1.0, 0.0)
        weights = (values.double() / temperature).masked_fill(~kept, -torch.inf).softmax(-1)
        expected = weights * table.numel()
        counts = torch.bincount(table[0].long(), minlength=vocab_size).cpu()
        common = expected >= 5
        found = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
        degrees = int(common.sum()) - 1
        print(f"chi-square, T={temperature} top_k={top_k}: {found:.0f} of {degrees} +- {(2 * degrees) ** 0.5:.0f}")
        if abs(found - degrees) > 5 * (2 * degrees) ** 0.5 or counts[~kept].sum():
            wrong.append(f"chi-square at T={temperature} top_k={top_k}: {found:.0f} with {degrees} degrees of freedom")
    return wrong


def device_microseconds(call: Callable[[Tensor], object], copies: list[Tensor]) -> float:
    """Of one call, the median of graph replays over all copies."""
    call(copies[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for logits in copies:
            call(logits)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(copies))
    return statistics.median(times[2:])


def host_microseconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[2:])


def measured(what: Callable[[], float], name: str) -> float:
    """NaN, and a line, where a variant fails."""
    try:
        return what()
    except Exception as error:
        print(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return float("nan")


def variants(num_rows: int, vocab_size: int) -> dict[str, Callable[[Tensor], object]]:
    """What is timed, by column."""
    batches = {name: Batch(num_rows, vocab_size, wish) for name, wish in WISHES.items()}
    rows = batches["T=1"].row_slots
    scratch = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=DEVICE)

    def truncated(name: str) -> Callable[[Tensor], None]:
        batch = batches[name]
        return lambda logits: batch.redraw(logits, truncation_cuts(logits, rows, rows, batch.params))

    def penalized(logits: Tensor) -> None:
        batch = batches["penalty"]
        penalize(logits, rows, rows, batch.params, batch.seen, scratch)
        batch.redraw(scratch, None)

    return {
        "greedy": batches["greedy"].draw,
        "T=1": batches["T=1"].draw,
        "T=1/8": lambda logits: batches["T=1"].draw(logits, programs=132 * 8),
        "T=1/16": lambda logits: batches["T=1"].draw(logits, programs=132 * 16),
        "T=1/64": lambda logits: batches["T=1"].draw(logits, programs=132 * 64),
        "top_p": truncated("top_p"),
        "top_k": truncated("top_k"),
        "min_p": truncated("min_p"),
        "penalty": penalized,
        "logprobs": lambda logits: top_logprobs(logits, rows, torch.zeros_like(rows), 5),
    }


def host_calls(num_rows: int, logits: Tensor) -> dict[str, Callable[[], Any]]:
    """Python calls, by column: the plain draw outside a graph, and draw_more with its uploads."""
    vocab_size = logits.shape[1]
    calls: dict[str, Callable[[], Any]] = {}
    plain = Batch(num_rows, vocab_size, {})
    calls["h:draw"] = lambda: plain.draw(logits)
    for name in ("top_p", "penalty", "logprobs"):
        batch = Batch(num_rows, vocab_size, WISHES[name])
        batch.draw(logits)
        calls[f"h:{name}"] = lambda batch=batch: batch.draw_more(logits)
    return calls


def timings() -> list[dict[str, float]]:
    lines = []
    for vocab_size in VOCABULARIES:
        for num_rows in ROWS:
            num_copies = max(1, min(MOST_COPIES, OVERFLOWS_L2_BYTES // (2 * num_rows * vocab_size)))
            copies = [random_logits(num_rows, vocab_size, seed) for seed in range(num_copies)]
            line: dict[str, float] = {"V": vocab_size, "R": num_rows}
            for name, call in variants(num_rows, vocab_size).items():
                line[name] = measured(
                    lambda call=call, copies=copies: device_microseconds(call, copies), f"{name} R={num_rows}"
                )
            for name in ("greedy", "T=1"):
                line[f"{name} TB/s"] = 2 * num_rows * vocab_size / line[name] / 1e6
            for name, host in host_calls(num_rows, copies[0]).items():
                line[name] = measured(lambda host=host: host_microseconds(host), f"{name} R={num_rows}")
            lines.append(line)
    return lines


def print_table(lines: list[dict[str, float]]) -> None:
    """Microseconds, but for V, R and TB/s; T=1/n: n programs for each of 132 processors (else 32); h: on the host."""
    print(" ".join(f"{name:>8}"[:11] for name in lines[0]))
    for line in lines:
        cells = (f"{value:>{max(8, min(11, len(name)))}.{2 if 'TB/s' in name else 0 if value >= 1000 else 1}f}"
                 for name, value in line.items())  # fmt: skip
        print(" ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    wrong: list[str] = []
    for check in (lambda: check_draws(128256), lambda: check_draws(50257), check_cuts, check_distribution):
        try:
            wrong += check()
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; checks took {time.perf_counter() - begin:.1f} s")
    for line in wrong[:12]:
        print("WRONG:", line)
    lines = timings()
    print_table(lines)
    print(f"{time.perf_counter() - begin:.1f} s in all")
    if arguments.out:
        device = torch.cuda.get_device_name()
        arguments.out.write_text(json.dumps({"device": device, "wrong": wrong, "microseconds": lines}, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
