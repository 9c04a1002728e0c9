"""Octavo beside transformers' `generate` on a CPU: the shapes of cpu_workloads.py, one interleaved run.

    python benchmarks/compare_cpu.py [--model FILE.gguf] [--rounds 3] [--threads N] [--out benchmarks/results]

Every engine gets the same bfloat16 safetensors (the GGUF model, dequantized once by transformers and kept in the
cache), the same token ids, greedy decoding, EOS ignored. Each runs in a process of its own, in turn, round after
round; the table gives medians over the rounds. transformers runs batches of 8 in order of arrival, left-padded, each
as long as its longest output; only tokens that were asked for count. Writes cpu-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_workloads
import torch
import transformers
from cpu_workloads import Work, batch_of_32, shared_prefix, tokens

from octavo import LLM, SamplingParams
from octavo.config import home
from octavo.loading.package import pull

PEER_BATCH = 8
ENGINES = ("octavo", "octavo-without-prefix-cache", "transformers")
METRICS = {
    "decode_tok_s": ("alone, decode, tokens/s", True),
    "ttft_ms": ("alone, time to first token of 128, ms", False),
    "batch_tok_s": ("32 at once, output tokens/s", True),
    "shared_s": ("16 that share 512 tokens, s", False),
}
Run = Callable[[Sequence[Work]], float]


def octavo(folder: Path, threads: int, prefix_caching: bool) -> tuple[Run, LLM]:
    """A function that runs requests and returns the seconds they took."""
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=32,
        threads=threads,
        enable_prefix_caching=prefix_caching,
        skip_tokenizer_init=True,
    )

    def run(requests: Sequence[Work]) -> float:
        params = [SamplingParams(temperature=0, max_tokens=out, ignore_eos=True) for _, out in requests]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(output.outputs[0].token_ids) for output in outputs] == [out for _, out in requests]
        return seconds

    return run, llm


def peer(folder: Path, threads: int) -> Run:
    """The same for transformers."""
    torch.set_num_threads(threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None

    def run_batch(batch: Sequence[Work]) -> None:
        longest = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        count = max(out for _, out in batch)
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0
            )
        assert output.shape == (len(batch), longest + count)

    def run(requests: Sequence[Work]) -> float:
        start = time.perf_counter()
        for at in range(0, len(requests), PEER_BATCH):
            run_batch(requests[at : at + PEER_BATCH])
        return time.perf_counter() - start

    return run


def chat_like(rng: random.Random) -> list[Work]:
    """The first 64 requests of gpu_workloads.py's `mixed`, which have log-normal prompt and output lengths, as long
    as the context holds."""
    prompts, outs = gpu_workloads.mixed(rng)
    return [(prompt[:1024], out) for prompt, out in zip(prompts[:64], outs)]


def kv_waste(run: Run, llm: LLM, work: Sequence[Work]) -> float:
    """Share of the KV entries allocated to running sequences that hold no token yet, over all steps of a workload."""
    engine = llm._engine
    step = engine.step
    used = allocated = 0

    def watched() -> Any:
        nonlocal used, allocated
        outputs = step()
        stats = engine.stats()
        used += stats.num_kv_tokens
        allocated += stats.num_kv_slots
        return outputs

    engine.step = watched  # type: ignore[method-assign]
    run(work)
    return 1 - used / allocated


def measure(engine: str, folder: Path, threads: int, number: int) -> dict[str, float]:
    """One engine's part of one round."""
    llm = None
    if engine == "transformers":
        run = peer(folder, threads)
    else:
        run, llm = octavo(folder, threads, prefix_caching=engine == "octavo")
    rng = random.Random(100 + number)
    run([(tokens(random.Random(7), 64), 8)] * 4)
    row = {}
    if engine != "octavo-without-prefix-cache":
        first = statistics.median(run([(tokens(rng, 128), 1)]) for _ in range(3))
        full = run([(tokens(rng, 128), 128)])
        batch = batch_of_32(rng)
        row["ttft_ms"] = first * 1e3
        row["decode_tok_s"] = 127 / (full - first)
        row["batch_tok_s"] = sum(out for _, out in batch) / run(batch)
    row["shared_s"] = run(shared_prefix(random.Random(200 + number)))
    if engine == "octavo" and llm is not None:
        row["kv_waste"] = kv_waste(run, llm, chat_like(rng))
    return row


def export(model: Path) -> Path:
    """The GGUF model as bfloat16 safetensors, written once."""
    folder = home() / "benchmarks" / f"{model.stem}-bf16"
    if not (folder / "config.json").exists():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model.parent,
            gguf_file=model.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        unfinished = folder.with_suffix(".unfinished")
        loaded.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def in_process(engine: str, folder: Path, threads: int, number: int) -> dict[str, float]:
    """`measure` in a process of its own, so that no engine sees another's memory or threads."""
    command = [sys.executable, __file__, "--measure", engine, "--model", str(folder)]
    command += ["--threads", str(threads), "--number", str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    row: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    print(f"round {number + 1}  {engine:<28}", {key: round(value, 3) for key, value in row.items()}, flush=True)
    return row


def report(rows: dict[str, list[dict[str, float]]], model: Path, threads: int) -> str:
    """The results as a Markdown page."""
    ours, bare, theirs = ({key: statistics.median(row[key] for row in rows[e]) for key in rows[e][0]} for e in ENGINES)
    command = " ".join(["python benchmarks/compare_cpu.py", *sys.argv[1:]])
    lines = [
        f"# Octavo beside transformers on a CPU, {datetime.date.today()}",
        "",
        f"Machine: {machine()}, {threads} threads. Commit: {commit()}. Model: {model.stem}, dequantized to bfloat16.",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.",
        f"Medians of {len(rows['octavo'])} interleaved rounds. Command: `{command}`",
        "",
        f"| workload | Octavo | transformers, batch {PEER_BATCH} | Octavo is |",
        "|---|---|---|---|",
    ]
    for key, (title, more_is_better) in METRICS.items():
        lines.append(_line(title, ours[key], theirs[key], more_is_better))
        if key == "shared_s":
            lines.append(_line(f"{title}, prefix cache off", bare[key], theirs[key], more_is_better))
    rounds = [(engine, {k: round(v, 4) for k, v in row.items()}) for engine in ENGINES for row in rows[engine]]
    lines += [
        "",
        f"Prefix cache off / on, time of the shared-prefix workload: {bare['shared_s'] / ours['shared_s']:.1f}x.",
        f"KV entries allocated but empty, 64 mixed requests, average over steps: {ours['kv_waste']:.1%}.",
        "",
        "Every round:",
        "",
        *(f"    {engine} {json.dumps(row)}" for engine, row in rounds),
    ]
    return "\n".join(lines) + "\n"


def _line(title: str, ours: float, theirs: float, more_is_better: bool) -> str:
    ratio = ours / theirs if more_is_better else theirs / ours
    return f"| {title} | {ours:.4g} | {theirs:.4g} | {ratio:.1f}x as fast |"


def machine() -> str:
    """The processor's name and how many of its cores this process may use."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The commit that is checked out; "+" after it says that the tree differs from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, help="a GGUF file; the small model of `octavo pull` unless given")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    ap.add_argument("--measure", choices=ENGINES, help="run this engine's part of a round here and print it as JSON")
    ap.add_argument("--number", type=int, default=0, help="which round, for --measure")
    args = ap.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.model, args.threads, args.number)))
        return
    model = args.model or pull("smollm2")
    folder = export(model)
    rows: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for number in range(args.rounds):
        for engine in ENGINES:
            rows[engine].append(in_process(engine, folder, args.threads, number))
    page = report(rows, model, args.threads)
    path = args.out / f"cpu-{datetime.date.today()}.md"
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    print(f"\n{page}\nwritten to {path}")


if __name__ == "__main__":
    main()
