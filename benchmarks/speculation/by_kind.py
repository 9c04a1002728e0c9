"""Speculation by kind of prompt, on a CPU or a GPU: those of workloads.py, answered without and with guesses, in turn.

    python benchmarks/speculation/by_kind.py [--model smollm2] [--method ngram] [--draft FOLDER] [--drafts 8]
        [--fixed] [--kinds "code edit" summary chat random] [--prompts N] [--rounds 3] [--threads N] [--out FILE]

float32, each prompt by itself, prefix cache off, adaptive lengths unless --fixed. Every prompt is answered by both
engines one right after the other, which goes first changing with each, so that other work on the machine meets both
alike. Tokens/s are those of all answers of a kind over their time, prompts included, as medians over the rounds; steps
are of the first round. A JSON line a kind goes to --out. Exits with 1 where an answer's tokens differ. On a GPU, which
it takes where there is one, each engine has three tenths of the memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from workloads import KINDS, Prompt, prompts

from octavo import LLM, SamplingParams
from octavo.protocol.speculation import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare_cpu import commit, machine

Row = dict[str, Any]


@dataclass
class Total:
    """Of one engine, kind and round. steps: of the engine, those of prompts included; checked: steps that verified
    guesses, and guesses and accepted those in them."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    checked: int = 0
    guesses: int = 0
    accepted: int = 0


@dataclass
class Engine:
    """An engine and what it has done, by kind, round after round."""

    llm: LLM
    totals: dict[str, list[Total]] = field(default_factory=lambda: defaultdict(list))

    def answer(self, token_ids: list[int], prompt: Prompt, total: Total) -> list[int]:
        """The tokens. total: is added to."""
        params = SamplingParams(temperature=prompt.temperature, seed=1, max_tokens=prompt.max_tokens)
        before, began = self.llm.stats(), time.perf_counter()
        output = self.llm.generate({"prompt_token_ids": token_ids}, params, use_tqdm=False)[0].outputs[0]
        total.seconds += time.perf_counter() - began
        after = self.llm.stats()
        total.steps += after.num_steps_total - before.num_steps_total
        total.checked += after.num_drafts_total - before.num_drafts_total
        total.guesses += after.num_draft_tokens_total - before.num_draft_tokens_total
        total.accepted += after.num_accepted_tokens_total - before.num_accepted_tokens_total
        total.tokens += len(output.token_ids)
        return list(output.token_ids)

    def tokens_s(self, kind: str) -> float:
        return statistics.median(total.tokens / total.seconds for total in self.totals[kind])


def run_round(engines: tuple[Engine, Engine], kind: str, work: list[tuple[list[int], Prompt]]) -> int:
    """Answer all prompts of a kind; how many answers differ."""
    totals = Total(), Total()
    differing = 0
    for number, (token_ids, prompt) in enumerate(work):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        found = {which: engines[which].answer(token_ids, prompt, totals[which]) for which in order}
        differing += found[0] != found[1]
    for engine, total in zip(engines, totals):
        engine.totals[kind].append(total)
    return differing


def result(engines: tuple[Engine, Engine], kind: str) -> Row:
    """Of a kind, as plot.py reads it."""
    plain, guessing = (engine.totals[kind][0] for engine in engines)
    rates = [engine.tokens_s(kind) for engine in engines]
    return {
        "kind": kind,
        "tokens": plain.tokens,
        "plain_tokens_s": round(rates[0], 2),
        "tokens_s": round(rates[1], 2),
        "speed_up": round(rates[1] / rates[0], 3),
        "plain_steps": plain.steps,
        "steps": guessing.steps,
        "tokens_a_step": round(guessing.tokens / guessing.steps, 3),
        "checked": guessing.checked,
        "guesses": guessing.guesses,
        "accepted": guessing.accepted,
    }


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="smollm2")
    ap.add_argument("--method", choices=METHODS, default="ngram")
    ap.add_argument("--draft", help="folder of the draft model or head")
    ap.add_argument("--drafts", type=int, default=8)
    ap.add_argument("--fixed", action="store_true", help="always as many guesses as --drafts")
    ap.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    ap.add_argument("--prompts", type=int, help="so many of each kind; all unless given")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--out", type=Path, help="file to append JSON lines to")
    args = ap.parse_args()
    on_gpu = torch.cuda.is_available()
    options: Row = {"dtype": "float32", "max_model_len": 2048, "enable_prefix_caching": False}
    options |= {} if on_gpu else {"threads": args.threads}
    # Of the device's memory, with what the other engine has.
    plain_share, share = ({"gpu_memory_utilization": most} for most in (0.3, 0.6)) if on_gpu else ({}, {})
    config: Row = {"method": args.method, "num_speculative_tokens": args.drafts, "adaptive": not args.fixed}
    if args.draft is not None:
        config["model"] = args.draft
    engines = (
        Engine(LLM(args.model, **options, **plain_share)),
        Engine(LLM(args.model, speculative_config=config, **options, **share)),
    )
    tokenizer = engines[0].llm.get_tokenizer()
    work = {
        kind: [(prompt.tokens(tokenizer), prompt) for prompt in prompts(kind, tokenizer.vocab_size)[: args.prompts]]
        for kind in args.kinds
    }
    for engine, kind in itertools.product(engines, args.kinds if on_gpu else args.kinds[:1]):
        engine.answer(*work[kind][0], Total())  # which on a GPU records graphs, too
    about = {"benchmark": "by_kind", "method": args.method, "drafts": args.drafts, "fixed": args.fixed}
    about |= {"rounds": args.rounds, "commit": commit(), "device": "gpu" if on_gpu else "cpu"}
    about |= {"machine": torch.cuda.get_device_name()} if on_gpu else {"machine": machine(), "threads": args.threads}
    all_differing = 0
    for kind in args.kinds:
        differing = sum(run_round(engines, kind, work[kind]) for _ in range(args.rounds))
        row = about | {"prompts": len(work[kind]), "differing": differing} | result(engines, kind)
        print(json.dumps(row), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        all_differing += differing
    return 1 if all_differing else 0


if __name__ == "__main__":
    sys.exit(main())
