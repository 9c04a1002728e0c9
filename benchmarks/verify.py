#!/usr/bin/env python3
"""Does Octavo compute what transformers computes? On the real small model, in float32, on a CPU.

    python benchmarks/verify.py [--prompts 20] [--tokens 64]

Greedy outputs of Octavo are scored by one transformers forward pass over prompt and output. The largest difference
of log-probabilities is printed, and how many tokens are not transformers' own choice: with none, the two
greedy decodings are identical, by induction over the positions. The same outputs are then made again with
the prefix cache off, with tiny chunks, with a pool that forces preemption, and one prompt at a time. A token that
differs counts as a tie when the two candidates' log-probabilities are within 1e-4. One JSON row a check.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from octavo import LLM, RequestOutput, SamplingParams
from octavo.loading.package import pull

TIE = 1e-4
TOP = 5

SENTENCES = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a land far away,",
    "Water boils at a temperature of",
    "The three most important things in life are",
    "In 1969, the first human",
    "A recipe for tomato soup:\n1.",
    "Dear Sir or Madam,\n\nI am writing to",
    "The difference between a frog and a toad is",
    "To be or not to be,",
)


def make_prompts(count: int) -> list[str]:
    """`count` different prompts of 4 to about 150 tokens; several share a long prefix."""
    rng = random.Random(0)
    prompts = []
    for i in range(count):
        context = " ".join(rng.choices(SENTENCES, k=i % 4)) if i % 2 else " ".join(SENTENCES[: i % 10])
        prompts.append(f"{context} {SENTENCES[i % len(SENTENCES)]}".strip())
    return prompts


def greedy(llm: LLM, prompts: list[str], num_tokens: int) -> list[RequestOutput]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=TOP)
    return llm.generate(prompts, params, use_tqdm=False)


def against_transformers(outputs: list[RequestOutput], model_path: Path) -> dict[str, Any]:
    """The largest log-probability difference at the output's top tokens, and tokens that differ."""
    reference = AutoModelForCausalLM.from_pretrained(
        model_path.parent,
        gguf_file=model_path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    largest, different, ties = 0.0, 0, 0
    for output in outputs:
        completion = output.outputs[0]
        assert completion.logprobs is not None
        begin = len(output.prompt_token_ids)
        with torch.inference_mode():
            logits = reference(torch.tensor([output.prompt_token_ids + completion.token_ids])).logits[0, begin - 1 : -1]
        scores = logits.float().log_softmax(-1)
        for position, (token_id, candidates) in enumerate(zip(completion.token_ids, completion.logprobs)):
            for candidate, entry in candidates.items():
                largest = max(largest, abs(entry.logprob - scores[position, candidate].item()))
            best = int(scores[position].argmax())
            if best != token_id:
                near = (scores[position, best] - scores[position, token_id]).item() < TIE
                ties, different = ties + near, different + (not near)
    return {"max_logprob_difference": largest, "tokens_different": different, "ties": ties}


def against_each_other(base: list[RequestOutput], other: list[RequestOutput]) -> dict[str, Any]:
    """How two runs of the same prompts differ; after a tie the rest of that output is not compared."""
    largest, different, ties = 0.0, 0, 0
    for left, right in zip(base, other, strict=True):
        a, b = left.outputs[0], right.outputs[0]
        assert a.logprobs is not None
        assert b.logprobs is not None
        for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)):
            if x != y:
                near = y in a.logprobs[i] and abs(a.logprobs[i][x].logprob - a.logprobs[i][y].logprob) < TIE
                ties, different = ties + near, different + (not near)
                break
            largest = max(largest, abs(a.logprobs[i][x].logprob - b.logprobs[i][y].logprob))
    return {"max_logprob_difference": largest, "tokens_different": different, "ties": ties}


def build(**options: Any) -> LLM:
    return LLM("smollm2", dtype="float32", **{"max_model_len": 256, "kv_cache_memory": "256MiB", **options})


def verify(num_prompts: int, num_tokens: int) -> list[dict[str, Any]]:
    """Every check as a row: {"check", "max_logprob_difference", "tokens_different", "ties"}."""
    prompts = make_prompts(num_prompts)
    llm = build()
    base = greedy(llm, prompts, num_tokens)
    again = greedy(llm, prompts, num_tokens)
    cached = llm.stats().prefix_cache_hits_total
    llm.audit()
    rows = [
        {"check": "transformers", "prompts": num_prompts, "tokens": num_tokens}
        | against_transformers(base, pull("smollm2")),
        {"check": "prefix cache hit", "cached_tokens": cached} | against_each_other(base, again),
        {"check": "alone"} | against_each_other(base, [greedy(llm, [p], num_tokens)[0] for p in prompts]),
    ]
    llm = build(enable_prefix_caching=False)
    rows.append({"check": "prefix cache off"} | against_each_other(base, greedy(llm, prompts, num_tokens)))
    llm = build(max_num_seqs=4, max_num_batched_tokens=7, enable_prefix_caching=False)
    rows.append({"check": "chunks of 7"} | against_each_other(base, greedy(llm, prompts, num_tokens)))
    llm = build(kv_cache_memory="12MiB", async_scheduling=True)
    preempted = greedy(llm, prompts, num_tokens)
    count = llm.stats().num_preemptions_total
    rows.append({"check": "preempted, depth 2", "preemptions": count} | against_each_other(base, preempted))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    for row in verify(args.prompts, args.tokens):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
