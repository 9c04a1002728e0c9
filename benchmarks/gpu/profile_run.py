#!/usr/bin/env python3
"""Where the time of a whole workload goes on a GPU: its kernels by kind, from the first step to the last.

    python benchmarks/gpu/profile_run.py --model FOLDER [--workload long] [--requests 4] [--kwargs JSON] [--out FILE.md]

The first `requests` of a workload of gpu_workloads.py, after a run of their own that warms up. Kinds are those of
profile_step.py. The profiler slows the host down by some microseconds a launch: idle time is an upper bound.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

import stepping
import traces
from profile_step import ORDER, kind_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_workloads

from octavo import SamplingParams


def markdown(kernels: list[traces.Kernel], num_longest: int) -> str:
    """Milliseconds by kind, the idle time, and the kernels that took longest."""
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel, us in zip(kernels, traces.added(kernels), strict=True):
        by_kind[kind_of(kernel.name)] += us / 1e3
        by_name[kernel.name].append(us / 1e3)
    busy = sum(by_kind.values())
    idle = traces.idle_of(kernels, 1)
    lines = ["| kind | ms | share |", "|---|---|---|"]
    lines += [f"| {kind} | {by_kind[kind]:.1f} | {by_kind[kind] / busy:.1%} |" for kind in ORDER if kind in by_kind]
    lines += [f"| kernels | {busy:.1f} | 100% |", f"| start to end | {idle.total / 1e3:.1f} | |"]
    lines += ["", f"Idle: {idle.idle / 1e3:.1f} ms. Longest kernels:", ""]
    for name, ms in sorted(by_name.items(), key=lambda entry: -sum(entry[1]))[:num_longest]:
        lines.append(f"    {sum(ms):9.1f} ms  {len(ms):6} calls  {kind_of(name):<10} {name[:110]}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--workload", default="long", choices=sorted(gpu_workloads.WORKLOADS))
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--longest", type=int, default=24, help="kernels listed")
    parser.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = stepping.parse_options(args.kwargs)
    llm = stepping.open_llm(str(args.model), **{"load_format": "dummy", "skip_tokenizer_init": True, **options})

    def run(seed: int) -> None:
        prompts, outs = gpu_workloads.WORKLOADS[args.workload](random.Random(seed))
        gpu_workloads.run(llm, SamplingParams, prompts[: args.requests], outs[: args.requests])

    run(1)
    text = f"## {args.workload}, {args.requests} requests, {args.model.name}, {args.kwargs}\n\n"
    text += markdown(traces.record(lambda: run(2)), args.longest)
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
