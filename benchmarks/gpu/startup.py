#!/usr/bin/env python3
"""Seconds from the start of a process to an LLM that is ready, and to its first token; cold, then warm.

    python benchmarks/gpu/startup.py --model FOLDER --out FILE.jsonl [--kwargs JSON]

cold: a fresh process with empty kernel caches (Triton's, the CUDA driver's and Octavo's own). warm: another one with
the caches that the first left behind. Weights are random. The files of Python and torch stay in the page cache, as
they do on a machine that has run either before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT_S = 300

# What the measured process runs: its arguments are the model, the moment it was started and LLM's arguments.
_CHILD = """
import json, sys, time
model, born, options = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
from octavo import LLM, SamplingParams
imported = time.time()
llm = LLM(model=model, load_format="dummy", skip_tokenizer_init=True, **options)
ready = time.time()
params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
out = llm.generate([{"prompt_token_ids": list(range(1000, 1064))}], [params], use_tqdm=False)
first = time.time()
assert len(out[0].outputs[0].token_ids) == 1
seconds = {"import_s": imported - born, "ready_s": ready - born, "first_token_s": first - born}
print(json.dumps({name: round(value, 3) for name, value in seconds.items()}))
"""


def start(model: str, kwargs: str, caches: Path) -> dict[str, Any]:
    """Run one process. Raises RuntimeError with what it printed if it fails."""
    folders = {"TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda", "OCTAVO_HOME": "octavo"}
    environment = {**os.environ, **{name: str(caches / folder) for name, folder in folders.items()}}
    command = [sys.executable, "-c", _CHILD, model, str(time.time()), kwargs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"the process ended with {done.returncode}:\n{done.stderr[-3000:]}")
    seconds: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as caches, args.out.open("a") as file:
        for name in ("cold", "warm"):
            row = {"workload": name, "model": Path(args.model).name, **start(args.model, args.kwargs, Path(caches))}
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
