"""Offline workloads that measure an engine with a vLLM-style `LLM` class on one GPU.

The same file measures any engine: `--package` names the module that exports `LLM` and
`SamplingParams`. Weights are random (`load_format="dummy"`), prompts are token ids drawn from a
seed, and EOS is ignored, so every engine does exactly the same work.

    python gpu_workloads.py --package PKG --model FOLDER_WITH_CONFIG_JSON --workloads mixed,latency
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = tuple[list[list[int]], list[int]]  # prompts as token ids, tokens to generate for each


def lengths(rng: random.Random, n: int, mean_log: float, sigma: float, low: int, high: int) -> list[int]:
    return [min(high, max(low, int(rng.lognormvariate(mean_log, sigma)))) for _ in range(n)]


def tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(1000, 30000) for _ in range(n)]


def mixed(rng: random.Random) -> Work:
    """1,000 chat-like requests: log-normal prompt and output lengths, all at once."""
    ins, outs = lengths(rng, 1000, 5.3, 0.9, 4, 2048), lengths(rng, 1000, 5.0, 0.7, 4, 1024)
    return [tokens(rng, i) for i in ins], outs


def uniform(rng: random.Random) -> Work:
    """256 requests, prompts 100-1024, outputs 100-1024: decode-bound, sensitive to CPU overhead."""
    ins, outs = [rng.randint(100, 1024) for _ in range(256)], [rng.randint(100, 1024) for _ in range(256)]
    return [tokens(rng, i) for i in ins], outs


def prefix(rng: random.Random) -> Work:
    """512 requests that share a 2,048-token prefix, 64 tokens of their own, 64 out."""
    shared = tokens(rng, 2048)
    return [shared + tokens(rng, 64) for _ in range(512)], [64] * 512


def long(rng: random.Random) -> Work:
    """16 requests of 32,000 tokens in, 256 out: attention-bound."""
    return [tokens(rng, 32000) for _ in range(16)], [256] * 16


WORKLOADS: dict[str, Callable[[random.Random], Work]] = {f.__name__: f for f in (mixed, uniform, prefix, long)}


def run(llm: Any, params: Any, prompts: list[list[int]], outs: list[int]) -> float:
    """Seconds for all of it; asserts that every token asked for came."""
    sampling = [params(temperature=1.0, max_tokens=o, ignore_eos=True, detokenize=False) for o in outs]
    requests = [{"prompt_token_ids": p} for p in prompts]
    start = time.perf_counter()
    results = llm.generate(requests, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    got = sum(len(r.outputs[0].token_ids) for r in results)
    assert got == sum(outs), f"asked for {sum(outs)} tokens, got {got}"
    return seconds


def latency(llm: Any, params: Any, rng: random.Random) -> dict[str, float]:
    """One request at a time, 512 in, 128 out: medians of five."""
    firsts, fulls = [], []
    for _ in range(5):
        firsts.append(run(llm, params, [tokens(rng, 512)], [1]))
        fulls.append(run(llm, params, [tokens(rng, 512)], [128]))
    ttft, full = sorted(firsts)[2], sorted(fulls)[2]
    return {"ttft_ms": round(ttft * 1e3, 2), "itl_ms": round((full - ttft) / 127 * 1e3, 3)}


def throughput(llm: Any, params: Any, work: Work) -> dict[str, float]:
    """All requests at once."""
    prompts, outs = work
    seconds = run(llm, params, prompts, outs)
    n_in, n_out = sum(map(len, prompts)), sum(outs)
    return {
        "seconds": round(seconds, 3),
        "requests_s": round(len(outs) / seconds, 2),
        "output_tok_s": round(n_out / seconds, 1),
        "total_tok_s": round((n_in + n_out) / seconds, 1),
    }


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("--package", required=True)
    ap.add_argument("--model", required=True)
    ap.add_argument("--workloads", default="mixed,uniform,prefix,latency")
    ap.add_argument("--repeat", type=int, default=2)
    ap.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    ap.add_argument("--out")
    args = ap.parse_args()
    module = importlib.import_module(args.package)
    params = module.SamplingParams
    began = time.perf_counter()
    llm = module.LLM(model=args.model, load_format="dummy", skip_tokenizer_init=True, seed=0, **json.loads(args.kwargs))
    startup = round(time.perf_counter() - began, 2)
    label = {"package": args.package, "model": Path(args.model).name, "kwargs": args.kwargs}

    def report(row: dict[str, Any]) -> None:
        """Print a row, and write it at once: a later workload that fails takes no earlier one with it."""
        print(json.dumps(row), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps({**label, **row}) + "\n")

    report({"workload": "startup", "seconds": startup})
    run(llm, params, [tokens(random.Random(9), 64)] * 8, [16] * 8)
    for name in args.workloads.split(","):
        for i in range(args.repeat):
            rng = random.Random(1000 + i)  # fresh prompts each time: the prefix cache must not help by accident
            row = latency(llm, params, rng) if name == "latency" else throughput(llm, params, WORKLOADS[name](rng))
            report({"workload": name, "run": i, **row})


if __name__ == "__main__":
    main()
