#!/usr/bin/env python3
"""What it brings to spread prompts over decode steps: workloads with prompts at once, and spread, in one process.

    python benchmarks/gpu/leveling.py --model FOLDER [--workloads uniform,mixed] [--repeat 2] [--kwargs JSON]

The workloads are those of gpu_workloads.py, whose output lengths are known. At once: as requests are served that may
end by themselves. The first round records CUDA graphs.
"""

from __future__ import annotations

import argparse
import random
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import PropertyMock, patch

import stepping

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpu_workloads

from octavo import SamplingParams


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--workloads", default="uniform,mixed")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    args = parser.parse_args()
    options = stepping.parse_options(args.kwargs)
    llm = stepping.open_llm(str(args.model), **{"load_format": "dummy", "skip_tokenizer_init": True, **options})
    print("| model | workload | round | at once, s (steps) | spread, s (steps) |\n|---|---|---|---|---|")
    for index in range(args.repeat):
        for name in args.workloads.split(","):
            cells = []
            for spread in (False, True):
                unknown = patch.object(SamplingParams, "has_fixed_length", PropertyMock(return_value=False))
                before = llm.stats().num_steps_total
                prompts, outs = gpu_workloads.WORKLOADS[name](random.Random(1000 + index))
                with nullcontext() if spread else unknown:
                    seconds = gpu_workloads.run(llm, SamplingParams, prompts, outs)
                cells.append(f"{seconds:.2f} ({llm.stats().num_steps_total - before})")
                llm.reset_prefix_cache()
            print(f"| {args.model.name} {args.kwargs} | {name} | {index} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
