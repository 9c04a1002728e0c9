"""Workloads that measure an engine with a vLLM-style `LLM` class on a CPU, on a real small model.

    python cpu_workloads.py --package PKG --model FOLDER_OR_GGUF [--kwargs '{"dtype": "bfloat16"}']

Greedy, EOS ignored, the same token ids for every engine. One JSON row: cold start (process start to first
token, s), time to first token (128 in, ms), single-stream decode (tokens/s), batch (32 requests, 32-256 in,
32-128 out: output tokens/s), and 16 requests that share a 512-token prefix (s, prefix cache on).
"""

from __future__ import annotations

import time

BORN = time.time()  # before anything else is imported: a cold start includes the imports

import argparse  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import resource  # noqa: E402

Work = tuple[list[int], int]  # prompt token ids, tokens to generate


def tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(100, 49000) for _ in range(n)]


def batch_of_32(rng: random.Random) -> list[Work]:
    """32 requests: 32-256 tokens in, 32-128 out."""
    return [(tokens(rng, rng.randint(32, 256)), rng.randint(32, 128)) for _ in range(32)]


def shared_prefix(rng: random.Random) -> list[Work]:
    """16 requests that share a 512-token prefix, with 32 tokens of their own, 32 out."""
    prefix = tokens(rng, 512)
    return [(prefix + tokens(rng, 32), 32) for _ in range(16)]


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("--package", required=True)
    ap.add_argument("--model", required=True)
    ap.add_argument("--kwargs", default="{}")
    ap.add_argument("--repeat", type=int, default=3)
    args = ap.parse_args()
    module = importlib.import_module(args.package)
    llm = module.LLM(model=args.model, max_model_len=2048, max_num_seqs=32, **json.loads(args.kwargs))

    def run(requests: list[Work]) -> float:
        params = [module.SamplingParams(temperature=0, max_tokens=o, ignore_eos=True) for _, o in requests]
        start = time.perf_counter()
        out = llm.generate([{"prompt_token_ids": p} for p, _ in requests], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(r.outputs[0].token_ids) for r in out] == [o for _, o in requests]
        return seconds

    run([(tokens(random.Random(8), 16), 1)])
    cold = time.time() - BORN
    run([(tokens(random.Random(7), 64), 8)] * 4)
    rows: dict[str, list[float]] = {"ttft_ms": [], "decode_tok_s": [], "batch_out_tok_s": [], "shared_prefix_s": []}
    for i in range(args.repeat):
        rng = random.Random(100 + i)
        first = run([(tokens(rng, 128), 1)])
        full = run([(tokens(rng, 128), 128)])
        batch = batch_of_32(rng)
        seconds = run(batch)
        shared = run(shared_prefix(rng))
        rows["ttft_ms"].append(first * 1e3)
        rows["decode_tok_s"].append(127 / (full - first))
        rows["batch_out_tok_s"].append(sum(o for _, o in batch) / seconds)
        rows["shared_prefix_s"].append(shared)
    median = {k: round(sorted(v)[len(v) // 2], 2) for k, v in rows.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"package": args.package, "cold_start_s": round(cold, 2), **median, "peak_rss_mb": peak}))


if __name__ == "__main__":
    main()
