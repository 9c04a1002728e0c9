"""What a JSON schema costs: output tokens per second with every request constrained, beside the same without.

    python benchmarks/structured_overhead.py [--rounds 7] [--threads N] [--requests 32] [--out benchmarks/results]

One engine on the CPU, prefix cache off. A round runs the same prompts with the same output lengths twice, with and
without the schema, in turn; which comes first alternates. Greedy, EOS ignored; the schema has 20 fields, all required,
whose shortest instance is longer than the longest output, so that both runs sample exactly as many tokens in as many
steps, and only what the constraint adds differs. Reports the median of the rounds' ratios, of wall time and of the
process's CPU time: on a shared machine the first moves with what others do, and the second hardly (take --threads 1,
for threads that wait for each other burn time too). Also the time of the first constrained request and of the next, in
seconds. Writes structured-overhead-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

from compare_cpu import commit, machine
from cpu_workloads import Work, batch_of_32, tokens

from octavo import LLM, SamplingParams, StructuredOutputsParams

_TEXT: dict[str, Any] = {"type": "string", "minLength": 24, "maxLength": 60}
_PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"city": _TEXT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["city", "zip"],
    "additionalProperties": False,
}
FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("title", "summary", "author", "publisher", "language", "subject"), _TEXT),
    **{name: {"type": "integer"} for name in ("pages", "edition", "volumes", "copies")},
    **{name: {"type": "number"} for name in ("price", "rating", "weight")},
    **{name: {"type": "boolean"} for name in ("in_stock", "signed")},
    "binding": {"enum": ["paperback", "hardcover", "leather"]},
    "tags": {"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 5},
    "published": {"type": "string", "format": "date"},
    "shelf": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "place": _PLACE,
}
SCHEMA = {"type": "object", "properties": FIELDS, "required": list(FIELDS), "additionalProperties": False}


def run(llm: LLM, requests: list[Work], wish: StructuredOutputsParams | None) -> tuple[float, float]:
    """Seconds of wall time, and of the process's CPU time."""
    params = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, structured_outputs=wish)
        for _, count in requests
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    start, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start, time.process_time() - cpu
    assert [len(output.outputs[0].token_ids) for output in outputs] == [count for _, count in requests]
    assert wish is None or all(output.outputs[0].text.lstrip().startswith("{") for output in outputs)
    return seconds


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--requests", type=int, default=32, help="of the 32 of a batch")
    ap.add_argument("--dtype", default="bfloat16", help="float32 where the processor has no bfloat16")
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--out", type=Path, help="folder to write the page to; without it, it is printed only")
    args = ap.parse_args()
    assert len(FIELDS) == 20
    llm = LLM(
        "smollm2",
        dtype=args.dtype,
        max_model_len=2048,
        max_num_seqs=32,
        threads=args.threads,
        enable_prefix_caching=False,
    )
    wish = StructuredOutputsParams(json=SCHEMA)
    warm = [(tokens(random.Random(7), 16), 4)]
    run(llm, warm, None)
    first, second = run(llm, warm, wish)[0], run(llm, warm, wish)[0]
    rows: list[tuple[float, float]] = []
    of_cpu: list[float] = []
    for number in range(args.rounds):
        requests = batch_of_32(random.Random(100 + number))[: args.requests]
        count = sum(out for _, out in requests)
        order = (None, wish) if number % 2 else (wish, None)
        times = {w is not None: run(llm, requests, w) for w in order}
        rows.append((count / times[False][0], count / times[True][0]))
        of_cpu.append(times[False][1] / times[True][1])
        print(f"round {number + 1}: {rows[-1]} tokens/s; CPU time {of_cpu[-1]:.3f}", flush=True)
    ratio = statistics.median(bound / free for free, bound in rows)
    page = "\n".join(
        [
            f"# The cost of a JSON schema on a CPU, {datetime.date.today()}",
            "",
            f"Machine: {machine()}, {args.threads} threads, shared with other work. Commit: {commit()}. SmolLM2-135M, "
            f"{args.dtype}, {args.requests} requests at once.",
            f"Command: `python benchmarks/structured_overhead.py --rounds {args.rounds} --requests {args.requests} "
            f"--threads {args.threads} --dtype {args.dtype}`",
            "",
            "| | output tokens/s, median |",
            "|---|---|",
            f"| without a constraint | {statistics.median(free for free, _ in rows):.1f} |",
            f"| each with a schema of 20 fields | {statistics.median(bound for _, bound in rows):.1f} |",
            "",
            f"Constrained / free, median over {args.rounds} interleaved rounds: {ratio:.3f} "
            f"({', '.join(f'{bound / free:.3f}' for free, bound in rows)}).",
            f"Free / constrained, the process's CPU time: {statistics.median(of_cpu):.3f} "
            f"({', '.join(f'{share:.3f}' for share in of_cpu)}).",
            f"The first constrained request of a process takes {first:.2f} s, the next {second:.2f} s.",
            "",
        ]
    )
    print(page)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"structured-overhead-{datetime.date.today()}.md").write_text(page)


if __name__ == "__main__":
    main()
