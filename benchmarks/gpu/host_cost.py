#!/usr/bin/env python3
"""What the host does for a decode step, and how long the GPU waits for it.

    python benchmarks/gpu/host_cost.py --model FOLDER [--seqs 1,64,256,1024] [--steps 200] [--kwargs JSON] [--out FILE]

All sequences decode; weights are random. Host times are medians over the steps, in microseconds: schedule and
commit of the scheduler, submit (launching the step), wait (until its result is there), and the whole of Engine.step().
At depth 2, schedule, submit and commit overlap the GPU's work: it waits for the host only where their sum exceeds
the step's. idle: the share of the time in which no kernel ran (gaps above 1 us), and the part at step boundaries (the
largest gaps, one a boundary), from torch's profiler over 32 steps; the profiler itself slows launches down somewhat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stepping
import torch
import traces

from octavo import LLM

PROFILED_STEPS = 32
PARTS = ("schedule", "submit", "wait", "commit", "step")
Samples = dict[str, list[float]]


class TimedHandle:
    """A step's handle; waiting for its result is timed."""

    def __init__(self, handle: Any, samples: list[float]) -> None:
        self._handle = handle
        self._samples = samples

    def result(self) -> Any:
        began = time.perf_counter()
        try:
            return self._handle.result()
        finally:
            self._samples.append((time.perf_counter() - began) * 1e6)


class Timed:
    """Stands for `target`; the methods named are timed, all else is passed through."""

    def __init__(self, target: Any, names: tuple[str, ...], samples: Samples) -> None:
        self._target = target
        for name in names:
            setattr(self, name, self._timed(getattr(target, name), name, samples))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    @staticmethod
    def _timed(method: Callable[..., Any], name: str, samples: Samples) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            found = method(*arguments, **named)
            samples[name].append((time.perf_counter() - began) * 1e6)
            return TimedHandle(found, samples["wait"]) if name == "submit" else found

        return call


@contextmanager
def watched(llm: LLM) -> Iterator[Samples]:
    """The engine's parts are timed inside."""
    engine: Any = stepping.engine_of(llm)
    samples: Samples = {name: [] for name in PARTS}
    scheduler, executor = engine._scheduler, engine._executor
    engine._scheduler = Timed(scheduler, ("schedule", "commit"), samples)
    engine._executor = Timed(executor, ("submit",), samples)
    try:
        yield samples
    finally:
        engine._scheduler, engine._executor = scheduler, executor


def host_times(llm: LLM, num_steps: int) -> dict[str, float]:
    """Medians over `num_steps` steps, in microseconds; "period" is the mean from step to step."""
    engine = stepping.engine_of(llm)
    with watched(llm) as samples:
        began = time.perf_counter()
        for _ in range(num_steps):
            start = time.perf_counter()
            engine.step()
            samples["step"].append((time.perf_counter() - start) * 1e6)
        period = (time.perf_counter() - began) / num_steps * 1e6
        # A handle of a step in flight outlives this block: its result may be taken after the samples were read.
        return {name: round(statistics.median(values), 1) for name, values in samples.items() if values} | {
            "period": round(period, 1)
        }


def idle_shares(llm: LLM) -> dict[str, float]:
    """Percent of the time in which the GPU idles: in all, and at the boundaries between steps."""
    engine = stepping.engine_of(llm)

    def work() -> None:
        for _ in range(PROFILED_STEPS):
            engine.step()

    found = traces.idle_of(traces.record(work), PROFILED_STEPS)
    return {
        "idle_percent": round(100 * found.idle / found.total, 2),
        "boundary_percent": round(100 * found.between_steps / found.total, 2),
        "boundary_us": round(found.between_steps / (PROFILED_STEPS - 1), 1),
    }


def measure(llm: LLM, num_seqs: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the host's times at this many sequences, and the GPU's idle shares where it can be recorded."""
    row: dict[str, Any] = {"workload": "host_cost", "num_seqs": num_seqs}
    num_tokens = args.steps + 2 * PROFILED_STEPS + 32
    ids = stepping.start_decoding(llm, num_seqs, args.prompt_tokens, num_tokens, settle=16)
    row |= host_times(llm, args.steps)
    try:
        row |= idle_shares(llm)
    except RuntimeError as error:
        print(f"host_cost: no idle time for {num_seqs} sequences: {error}", file=sys.stderr)
    stepping.finish(llm, ids)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line for each number of sequences."""
    names = [*PARTS, "period", "idle_percent", "boundary_percent", "boundary_us"]
    titles = [*(f"{name} us" for name in (*PARTS, "period")), "GPU idle %", "at boundaries %", "boundary us"]
    lines = [f"| sequences | {' | '.join(titles)} |", "|" + "---|" * (len(titles) + 1)]
    lines += [f"| {row['num_seqs']} | {' | '.join(str(row.get(name, '-')) for name in names)} |" for row in rows]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True)
    made.add_argument("--load-format", default="dummy")
    made.add_argument("--seqs", default="1,64,256,1024")
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--prompt-tokens", type=int, default=64)
    made.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    made.add_argument("--out", type=Path, help="rows as JSON lines")
    return made


def main() -> int:
    args = parser().parse_args()
    options = {"load_format": args.load_format, "skip_tokenizer_init": True, **stepping.parse_options(args.kwargs)}
    llm = stepping.open_llm(args.model, **options)
    rows = []
    for num_seqs in map(int, args.seqs.split(",")):
        try:
            rows.append(measure(llm, num_seqs, args))
        except RuntimeError as error:
            print(f"host_cost: {num_seqs} sequences: {error}", file=sys.stderr)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{Path(args.model).name} on {device}, depth {llm.config.pipeline_depth}")
    print(table(rows))
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0 if len(rows) == len(args.seqs.split(",")) else 1


if __name__ == "__main__":
    sys.exit(main())
