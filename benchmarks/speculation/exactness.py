"""Whether speculation changes a token: greedy answers to 200 prompts of several kinds, without it and with one method.

    python benchmarks/speculation/exactness.py --method eagle3 --draft FOLDER [--model smollm2] [--prompts 200]
        [--tokens 32] [--drafts 4] [--batch 32] [--out FILE]

float32, all prompts given at once, as many guesses in every step as --drafts. Prints what differs, and for each such
answer the log probabilities of the two tokens where it parts, as the plain engine has them; then a JSON line. Exits
with 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from draft_prompts import held_out_prompts, training_prompts
from workloads import KINDS, prompts

from octavo import LLM, SamplingParams
from octavo.protocol.speculation import METHODS
from octavo.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare_cpu import commit, machine

Tokens = list[int]


def distinct_prompts(count: int, tokenizer: Tokenizer) -> list[Tokens]:
    """So many: those of workloads.py, kind by kind, then questions of draft_prompts.py, half of topics that no draft
    was trained on. Raises ValueError where there are not so many."""
    made = [prompt.tokens(tokenizer) for kind in KINDS for prompt in prompts(kind, tokenizer.vocab_size)]
    questions = zip(held_out_prompts(count), training_prompts(count))
    made += [tokenizer.encode(text, add_special_tokens=False) for pair in questions for text in pair]
    distinct = list(dict.fromkeys(map(tuple, made)))
    if len(distinct) < count:
        raise ValueError(f"--prompts {count}: there are {len(distinct)}")
    return [list(ids) for ids in distinct[:count]]


def answers(llm: LLM, asked: list[Tokens], num_tokens: int) -> tuple[list[Tokens], float]:
    """Greedy token ids, and the seconds they took."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens)
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - began


def parting(plain: LLM, prompt: Tokens, want: Tokens, got: Tokens) -> str:
    """Where two answers part, and the plain engine's log probabilities of both tokens there."""
    at = next((i for i, (one, other) in enumerate(zip(want, got)) if one != other), None)
    if at is None:
        return f"one ends after {min(len(want), len(got))} tokens, the other after {max(len(want), len(got))}"
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    output = plain.generate({"prompt_token_ids": prompt + want[:at]}, params, use_tqdm=False)[0].outputs[0]
    assert output.logprobs is not None
    found = {token: entry.logprob for token, entry in output.logprobs[0].items()}
    told = [
        f"{token} ({found[token]:.6f})" if token in found else f"{token} (below five)" for token in (want[at], got[at])
    ]
    return f"token {at}: {told[0]} without, {told[1]} with speculation"


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="smollm2")
    ap.add_argument("--method", choices=METHODS, required=True)
    ap.add_argument("--draft", help="folder of the draft model or head")
    ap.add_argument("--prompts", type=int, default=200)
    ap.add_argument("--tokens", type=int, default=32)
    ap.add_argument("--drafts", type=int, default=4)
    ap.add_argument("--batch", type=int, default=32, help="sequences in a step")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--out", type=Path, help="file to append the JSON line to")
    args = ap.parse_args()
    config: dict[str, Any] = {"method": args.method, "num_speculative_tokens": args.drafts, "adaptive": False}
    if args.draft is not None:
        config["model"] = args.draft
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": args.batch,
        "threads": args.threads,
    }
    plain = LLM(args.model, **options)
    asked = distinct_prompts(args.prompts, plain.get_tokenizer())
    want, plain_seconds = answers(plain, asked, args.tokens)
    print(f"{sum(map(len, want))} tokens without speculation in {plain_seconds:.0f} s", flush=True)
    guessing = LLM(args.model, speculative_config=config, **options)
    got, seconds = answers(guessing, asked, args.tokens)
    differing = [number for number in range(len(asked)) if got[number] != want[number]]
    for number in differing:
        print(f"prompt {number}:", parting(plain, asked[number], want[number], got[number]))
    before, after = plain.stats(), guessing.stats()
    row = {
        "benchmark": "exactness",
        "method": args.method,
        "prompts": len(asked),
        "differing": len(differing),
        "tokens": sum(map(len, got)),
        "guesses": after.num_draft_tokens_total,
        "accepted": after.num_accepted_tokens_total,
        "steps": after.num_steps_total,
        "plain_steps": before.num_steps_total,
        "seconds": round(seconds, 1),
        "plain_seconds": round(plain_seconds, 1),
        "drafts": args.drafts,
        "batch": args.batch,
        "threads": args.threads,
        "commit": commit(),
        "machine": machine(),
    }
    print(json.dumps(row))
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
