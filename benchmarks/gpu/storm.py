#!/usr/bin/env python3
"""A storm of mixed requests with random aborts, in a KV pool small enough to preempt: nothing may leak or break.

    python benchmarks/gpu/storm.py --model FILE.gguf|FOLDER [--requests 2000] [--device auto] [--kwargs JSON]

Requests differ in length, sampling parameters and n; a part shares prefixes; some are aborted while they wait, run or
are in flight. Every 100 steps the bookkeeping is audited. Every request must end exactly once, with the number of
tokens that its end implies. At the end nothing runs, no block is in use, and after the first quarter of the requests
device memory has not grown by more than --slack-mib (samples between steps; the largest of a quarter counts).
Prints one line a check and ends with status 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import stepping
import torch

from octavo import LLM, SamplingParams
from octavo.protocol.outputs import TokenOutput
from octavo.protocol.request import Request

AUDIT_EVERY = 100
SAMPLE_EVERY = 20
ABORTED = 0.15
MIB = 1024**2


def sampling_of(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Any mixture of the parameters that a step treats differently."""
    if rng.random() < 0.25:
        wish = {"temperature": 0.0}
    else:
        wish = {"temperature": rng.choice((0.5, 1.0, 1.5)), "n": rng.choice((1, 1, 1, 2, 3))}
    for chance, fields in (
        (0.3, {"top_p": rng.uniform(0.5, 1.0)}),
        (0.3, {"top_k": rng.randint(1, 100)}),
        (0.15, {"min_p": rng.uniform(0.0, 0.2)}),
        (0.2, {"presence_penalty": 0.5, "frequency_penalty": 0.3}),
        (0.15, {"repetition_penalty": 1.2}),
        (0.15, {"logprobs": rng.randint(0, 5)}),
        (0.05, {"prompt_logprobs": 1}),
        (0.1, {"logit_bias": {rng.randrange(vocab_size): 5.0}}),
        (0.1, {"stop_token_ids": [rng.randrange(vocab_size) for _ in range(3)]}),
        (0.3, {"seed": rng.randrange(1000)}),
        (0.7, {"ignore_eos": True}),
    ):
        if rng.random() < chance:
            wish.update(fields)
    return SamplingParams(**wish, max_tokens=None, detokenize=False)


def requests_of(count: int, longest: int, vocab_size: int, rng: random.Random) -> Iterator[list[Request]]:
    """`count` generations, each as the requests of its n completions. longest: tokens of prompt and output."""
    prefixes = [[rng.randrange(vocab_size) for _ in range(longest // 3)] for _ in range(4)]
    for index in range(count):
        num_prompt = max(1, min(longest // 2, int(rng.lognormvariate(3.5, 1.0))))
        prompt = [rng.randrange(vocab_size) for _ in range(num_prompt)]
        if rng.random() < 0.3:
            prompt = (rng.choice(prefixes) + prompt)[: longest * 3 // 4]
        max_tokens = max(1, min(longest - len(prompt), int(rng.lognormvariate(3.3, 0.9))))
        salt = rng.choice((None, None, None, "a"))
        eos = (rng.randrange(vocab_size),)
        yield [
            Request(
                request_id=f"{index}-{place}",
                prompt_token_ids=prompt,
                sampling=own,
                max_tokens=max_tokens,
                eos_token_ids=eos,
                arrival_time=time.monotonic(),
                cache_salt=salt,
            )
            for place, own in enumerate(sampling_of(rng, vocab_size).completions(lambda: rng.getrandbits(62)))
        ]


@dataclass
class Storm:
    """What became of every request so far. `step` and `add` are the writers."""

    llm: LLM
    rng: random.Random
    open: dict[str, tuple[Request, int]] = field(default_factory=dict)  # the request, and tokens that came
    errors: list[str] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)  # finish reason -> requests
    num_steps: int = 0
    num_aborts: int = 0
    memory: list[tuple[float, list[float]]] = field(default_factory=list)  # (share of requests added, MiB)

    def add(self, requests: list[Request]) -> None:
        for request in requests:
            stepping.engine_of(self.llm).add(request)
            self.open[request.request_id] = (request, 0)

    def abort_some(self) -> None:
        """A few of the open requests, wherever they are, sometimes with an id that nobody knows."""
        chosen = [i for i in self.rng.sample(list(self.open), min(3, len(self.open))) if self.rng.random() < 0.5]
        self.num_aborts += len(chosen)
        unknown = ["unknown"] if self.rng.random() < 0.2 else []
        self.read(stepping.engine_of(self.llm).abort(chosen + unknown))

    def step(self, share: float) -> None:
        """One step, with an audit or a sample of the memory where it is time. share: of the requests added, 0..1."""
        self.read(stepping.engine_of(self.llm).step())
        self.num_steps += 1
        if self.num_steps % AUDIT_EVERY == 0:
            self.llm.audit()
        if self.num_steps % SAMPLE_EVERY == 0:
            self.memory.append((share, device_memory()))

    def read(self, outputs: list[TokenOutput]) -> None:
        """Count tokens, and check each end."""
        for output in outputs:
            if output.request_id not in self.open:
                self.errors.append(f"{output.request_id}: output after its end, or of nobody")
                continue
            request, count = self.open[output.request_id]
            count += len(output.new_token_ids)
            self.open[output.request_id] = (request, count)
            if output.logprobs is not None and len(output.logprobs) != len(output.new_token_ids):
                self.errors.append(f"{output.request_id}: {len(output.logprobs)} logprobs")
            if output.finish_reason is None:
                continue
            del self.open[output.request_id]
            self.ended[output.finish_reason] = self.ended.get(output.finish_reason, 0) + 1
            if output.finish_reason == "error":
                self.errors.append(f"{output.request_id}: {output.error}")
            if count > request.max_tokens or (output.finish_reason == "length" and count != request.max_tokens):
                self.errors.append(
                    f"{output.request_id}: {count} of {request.max_tokens} tokens, {output.finish_reason}"
                )


def device_memory() -> list[float]:
    """MiB: allocated and reserved by torch, in use on the device; nothing on a CPU."""
    if not torch.cuda.is_available():
        return []
    free, total = torch.cuda.mem_get_info()
    return [value / MIB for value in (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free)]


def growth(memory: list[tuple[float, list[float]]]) -> list[float]:
    """MiB by which the largest sample after the first quarter exceeds the largest within it, for each figure."""
    early = [sample for share, sample in memory if share <= 0.25]
    late = [sample for share, sample in memory if share > 0.25]
    if not early or not late:
        return []
    return [max(column) - max(before) for column, before in zip(zip(*late), zip(*early))]


def weather(storm: Storm, count: int, longest: int, vocab_size: int, most_open: int) -> None:
    """Let it all happen: requests arrive in gusts while those before them run."""
    waiting = list(requests_of(count, longest, vocab_size, storm.rng))[::-1]
    engine = stepping.engine_of(storm.llm)
    while waiting or engine.has_work:
        while waiting and len(storm.open) < most_open and storm.rng.random() < 0.9:
            storm.add(waiting.pop())
            if storm.rng.random() < ABORTED:
                storm.abort_some()
        storm.step(1 - len(waiting) / count)


def judge(storm: Storm, slack_mib: float) -> list[tuple[bool, str]]:
    """(passed, what was found) of each check."""
    stats = storm.llm.stats()
    used = stats.num_blocks - stats.num_free_blocks
    verdicts = [
        (not storm.errors, f"every request ended once and rightly: {storm.ended}, wrong: {storm.errors[:3]}"),
        (not storm.open, f"all ended: {len(storm.open)} did not"),
        (storm.num_aborts > 0, f"{storm.num_aborts} aborts"),
        (stats.num_preemptions_total > 0, f"{stats.num_preemptions_total} preemptions"),
        (stats.prefix_cache_hits_total > 0, f"{stats.prefix_cache_hits_total} cached tokens"),
        (stats.num_running == stats.num_waiting == used == 0, f"{stats.num_running} run, {used} blocks in use"),
    ]
    if torch.cuda.is_available():
        grown = dict(zip(("allocated", "reserved", "in use"), growth(storm.memory)))
        flat = len(grown) == 3 and max(grown.values()) <= slack_mib
        text = ", ".join(f"{name} {value:+.1f} MiB" for name, value in grown.items())
        verdicts.append((flat, f"device memory after the first quarter: {text or 'no samples'}"))
    try:
        storm.llm.audit()
        verdicts.append((True, "audit is clean"))
    except AssertionError as error:
        verdicts.append((False, f"audit: {error}"))
    return verdicts


def run(args: argparse.Namespace) -> int:
    """The whole storm; the exit status."""
    options = {
        "device": args.device,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "kv_cache_memory": args.kv_cache_memory,
        "skip_tokenizer_init": True,
        **stepping.parse_options(args.kwargs),
    }
    llm = stepping.open_llm(args.model, **options)
    stepping.warm_up(llm)  # what is recorded once, at its first use, is no leak
    storm = Storm(llm, random.Random(args.seed))
    began = time.perf_counter()
    weather(storm, args.requests, args.max_model_len - 1, args.vocab_size, 2 * args.max_num_seqs)
    seconds = time.perf_counter() - began
    verdicts = judge(storm, args.slack_mib)
    for passed, text in verdicts:
        print("PASS" if passed else "FAIL", f"storm: {text}", flush=True)
    print(f"storm: {args.requests} requests, {storm.num_steps} steps, {seconds:.1f} s")
    passed = all(passed for passed, _ in verdicts)
    if args.out:
        row = {"workload": "storm", "requests": args.requests, "steps": storm.num_steps, "seconds": round(seconds, 1)}
        row |= {"passed": passed, "checks": [text for _, text in verdicts]}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return 0 if passed else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True)
    made.add_argument("--requests", type=int, default=2000)
    made.add_argument("--device", default="auto")
    made.add_argument("--max-model-len", type=int, default=512)
    made.add_argument("--max-num-seqs", type=int, default=64)
    made.add_argument("--kv-cache-memory", default="96MiB", help="small, so that it preempts")
    made.add_argument("--vocab-size", type=int, default=49152, help="prompt ids are below it")
    made.add_argument("--slack-mib", type=float, default=32.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    made.add_argument("--out", type=Path)
    return made


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
