#!/usr/bin/env python3
"""Speed-up by speculation on a GPU, by acceptance and batch: a draft model whose guesses are taken with a set
probability, whatever they are.

    python benchmarks/gpu/speculation.py --model FOLDER [--draft FOLDER] [--acceptance 0.8] [--tokens 5] [--fixed]
                                         [--plain-draft] [--batches 1,8,64,256] [--sequences 48] [--out FILE]

Random weights of the folders' config.json, the draft's in FP8 unless --plain-draft; --acceptance none: no speculation.
All CUDA graphs are recorded first, as a server does while it has nothing else to do. Each batch: prompts of 512 random
tokens and 192 output tokens, twice to warm up, then timed as often as makes --sequences (48; 8 without speculation):
how often guesses come true is luck (at 0.8, five guesses each, 192 tokens take 44 to 61 steps). Seconds are of the
whole batch, ms of a token of one sequence, means both.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import stepping

from octavo import LLM, SamplingParams

PROMPT, OUTPUT = 512, 192
WARM_UPS = 3  # the first of which times the prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--acceptance", default="none")
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--fixed", action="store_true", help="always as many guesses as --tokens")
    parser.add_argument("--plain-draft", action="store_true", help="the draft's weights as its config.json has them")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--sequences", type=int, help="timed of each batch, as whole batches, one at least")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options: dict[str, Any] = {}
    if args.acceptance != "none":
        options["speculative_config"] = {
            "method": "draft_model",
            "model": str(args.draft),
            "num_speculative_tokens": args.tokens,
            "synthetic_acceptance": float(args.acceptance),
            "adaptive": not args.fixed,
        }
        if not args.plain_draft:
            options["speculative_config"]["quantization"] = "fp8"
    began = time.perf_counter()
    llm = LLM(str(args.model), load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, **options)
    print(f"ready in {time.perf_counter() - began:.1f} s", flush=True)
    stepping.warm_up(llm)
    sequences = args.sequences or (48 if options else 8)
    for batch in map(int, args.batches.split(",")):
        rng = random.Random(batch)
        vocabulary = range(1000, 100_000)
        seconds: list[float] = []
        before = llm.stats()
        timed = max(1, sequences // batch)
        for run in range(WARM_UPS + timed):
            prompts = [{"prompt_token_ids": rng.choices(vocabulary, k=PROMPT)} for _ in range(batch)]
            tokens = 1 if run == 0 else OUTPUT
            params = SamplingParams(temperature=1.0, seed=run, max_tokens=tokens, ignore_eos=True, detokenize=False)
            before = llm.stats() if run <= WARM_UPS else before
            start = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        after = llm.stats()
        mean = sum(seconds[WARM_UPS:]) / timed
        row = {
            "batch": batch,
            "acceptance": args.acceptance,
            "drafts": round((after.num_drafts_total - before.num_drafts_total) / timed, 1),
            "fixed": args.fixed,
            "tokens": args.tokens,
            "draft": None if args.draft is None else args.draft.name,
            "seconds": round(mean, 3),
            "steps": round((after.num_steps_total - before.num_steps_total) / timed, 1),
            "ms_a_token": round((mean - seconds[0]) / (OUTPUT - 1) * 1000, 3),
        }
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    llm.audit()


if __name__ == "__main__":
    main()
