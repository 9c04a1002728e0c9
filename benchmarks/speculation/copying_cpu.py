"""Prompt lookup on a CPU: the prompts of workloads.py, answered without and with speculation, turn by turn.

    python benchmarks/speculation/copying_cpu.py [--model smollm2] [--drafts 8] [--method ngram] [--rounds 3]
        [--kinds "code edit" summary chat random] [--threads N] [--out benchmarks/results]

float32, each prompt by itself, prefix cache off. Every prompt is answered by both engines one right after the other,
which goes first changing with each, so that other work on the machine meets both alike. Tokens/s are those of all
answers of a kind over their time, prompts included; the table gives medians over the rounds. Exits with 1 where an
answer's tokens differ.
"""

from __future__ import annotations

import argparse
import datetime
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare_cpu import commit, machine


@dataclass
class Total:
    """Of one engine, kind and round. steps: of the engine, those of prompts included."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0


@dataclass
class Engine:
    """An engine and what it has done, by kind, round after round."""

    llm: LLM
    totals: dict[str, list[Total]] = field(default_factory=lambda: defaultdict(list))

    def answer(self, token_ids: list[int], prompt: Prompt, total: Total | None) -> list[int]:
        """The tokens. total: to be added to."""
        params = SamplingParams(temperature=prompt.temperature, seed=1, max_tokens=prompt.max_tokens)
        before, began = self.llm.stats().num_steps_total, time.perf_counter()
        output = self.llm.generate({"prompt_token_ids": token_ids}, params, use_tqdm=False)[0].outputs[0]
        if total is not None:
            total.seconds += time.perf_counter() - began
            total.steps += self.llm.stats().num_steps_total - before
            total.tokens += len(output.token_ids)
        return list(output.token_ids)


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


def line(engines: tuple[Engine, Engine], kind: str) -> str:
    """A row of the table."""
    rates = [statistics.median(total.tokens / total.seconds for total in engine.totals[kind]) for engine in engines]
    steps = [engine.totals[kind][0].steps for engine in engines]
    tokens = engines[0].totals[kind][0].tokens
    return (
        f"| {kind} | {tokens} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[1] / rates[0]:.2f} | "
        f"{tokens / steps[0]:.2f} | {tokens / steps[1]:.2f} |"
    )


def report(engines: tuple[Engine, Engine], config: dict[str, Any], args: argparse.Namespace, differing: int) -> str:
    """The results as a Markdown page."""
    command = " ".join(["python benchmarks/speculation/copying_cpu.py", *sys.argv[1:]])
    kinds = list(engines[0].totals)
    rounds = [
        f"    {kind} {name} {[round(total.tokens / total.seconds, 1) for total in engine.totals[kind]]}"
        for kind in kinds
        for name, engine in zip(("plain", "speculative"), engines)
    ]
    lines = [
        f"# Prompt lookup on a CPU, {datetime.date.today()}",
        "",
        f"Machine: {machine()}, {args.threads} threads. Commit: {commit()}. Model: {args.model}, float32. torch "
        f"{torch.__version__}. speculative_config: `{config}`",
        f"{args.rounds} interleaved rounds. Command: `{command}`",
        "",
        "| kind | tokens | plain, tokens/s | with lookup | ratio | plain, tokens a step | with lookup |",
        "|---|---|---|---|---|---|---|",
        *(line(engines, kind) for kind in kinds),
        "",
        f"Answers whose tokens differ: {differing}.",
        "",
        "Tokens/s of every round:",
        "",
        *rounds,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="smollm2")
    ap.add_argument("--method", choices=("ngram", "suffix"), default="ngram")
    ap.add_argument("--drafts", type=int, default=8)
    ap.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--out", type=Path, help="folder to write the page to; without it, it is printed only")
    args = ap.parse_args()
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 2048, "enable_prefix_caching": False}
    config = {"method": args.method, "num_speculative_tokens": args.drafts}
    speculative = LLM(args.model, threads=args.threads, speculative_config=config, **options)
    engines = Engine(LLM(args.model, threads=args.threads, **options)), Engine(speculative)
    tokenizer = speculative.get_tokenizer()
    work = {
        kind: [(prompt.tokens(tokenizer), prompt) for prompt in prompts(kind, tokenizer.vocab_size)]
        for kind in args.kinds
    }
    for engine in engines:
        engine.answer(*work[args.kinds[0]][0], None)
    differing = 0
    for number in range(args.rounds):
        for kind in args.kinds:
            differing += run_round(engines, kind, work[kind])
            print(f"round {number + 1}", line(engines, kind), flush=True)
    page = report(engines, config, args, differing)
    print(f"\n{page}")
    if args.out is not None:
        path = args.out / f"copying-cpu-{datetime.date.today()}.md"
        path.write_text(page)
        print(f"written to {path}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
