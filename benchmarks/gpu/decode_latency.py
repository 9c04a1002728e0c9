#!/usr/bin/env python3
"""Milliseconds a token while a batch decodes on a GPU, and a digest of the tokens: two builds that should differ in
speed alone say the same.

    python benchmarks/gpu/decode_latency.py --model FOLDER [--batches 1,8] [--kwargs '{"quantization": "fp8"}']

Random weights of the folder's config.json. Each batch: prompts of 512 random tokens with one token each, then three
times with 192, of which the faster of the last two counts. Seconds are of the whole batch.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time

import stepping

from octavo import LLM, SamplingParams

PROMPT, OUTPUT = 512, 192


def measure(llm: LLM, batch: int) -> str:
    """A line of what was found."""
    rng, digest, seconds = random.Random(batch), hashlib.sha256(), []
    for run in range(4):
        prompts = [{"prompt_token_ids": rng.choices(range(1000, 100_000), k=PROMPT)} for _ in range(batch)]
        tokens = OUTPUT if run else 1  # the first run times the prompts
        params = SamplingParams(temperature=1.0, seed=run, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        for output in outputs:
            digest.update(str(list(output.outputs[0].token_ids)).encode())
    best = min(seconds[2:])
    each = (best - seconds[0]) / (OUTPUT - 1) * 1000
    return f"batch {batch}: {best:.3f} s, {each:.3f} ms a token, tokens {digest.hexdigest()[:8]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--kwargs", default="{}", help="of LLM, as JSON")
    args = parser.parse_args()
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 4096}
    llm = LLM(args.model, **options | stepping.parse_options(args.kwargs))
    for batch in map(int, args.batches.split(",")):
        print(measure(llm, batch), flush=True)


if __name__ == "__main__":
    main()
