#!/usr/bin/env python3
"""Where the time of a decode step goes on a GPU: its kernels by kind, beside the bytes that they must move.

    python benchmarks/gpu/profile_step.py --model FOLDER [--seqs 1,64,256] [--context 512] [--steps 32] [--out FILE.md]

Random weights of the folder's config.json; all sequences decode at about `context` tokens. Kinds are told by kernel
names (KINDS below); the longest kernels are listed with their kind, so that a wrong one shows. GEMM moves the weights
of the linear layers and of the output head once, attention the keys and values of every sequence; the limit is those
bytes at the measured copy speed of an H200. With fp8 weights the linear layers have one byte a weight; the head keeps
its two. A kernel's time is what it adds to that of those before it: some start while these still run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stepping
import torch
import traces

from octavo import LLM

LIMIT_TB_S = 4.2  # device copy, bytes read and written, measured on an H200 at 4.23

# The first pattern that a kernel's name holds decides. Attention before rope+KV: its names speak of KV as well.
KINDS = (
    ("copy", r"memcpy|memset"),
    ("attention", r"attention|attn|flash|fmha|batch(decode|prefill)|_decode_kernel|paged_prefill|gather_kv|combine"),
    ("rope+KV", r"rope|rotary|write_kv|kv_cache"),
    ("sampling", r"sampl|best_of|top_?k|top_?p|cuts_|argmax|softmax|logprob|penal|_count_|_bias_kernel|radix|sort"),
    ("norm", r"norm"),
    ("activation", r"silu|swiglu|gelu|activation"),
    ("quantize", r"quantize"),
    ("inputs", r"apply_diff|build_inputs|gather_last|embed"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|xmma|cublas|split_?k|matmul|linear|scaled_mm|_dot_kernel|_fma_kernel"),
)
ORDER = ("attention", "GEMM", "norm", "rope+KV", "activation", "quantize", "sampling", "inputs", "copy", "other")


def kind_of(name: str) -> str:
    """Which part of a step a kernel belongs to."""
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), "other")


@dataclass(frozen=True)
class ModelBytes:
    """What a decode step must read. weights: a step; kv_per_token: of context, all layers, keys and values."""

    weights: int
    kv_per_token: int

    @classmethod
    def of(cls, config: dict[str, Any], fp8_weights: bool, fp8_kv: bool) -> ModelBytes:
        """From config.json, for bfloat16 unless fp8 is asked for."""
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        layer = attention + 3 * hidden * config["intermediate_size"]
        head = 2 * hidden * config["vocab_size"]
        kv = 2 * layers * kv_heads * head_dim
        return cls(layers * layer * (1 if fp8_weights else 2) + head, kv * (1 if fp8_kv else 2))


@dataclass(frozen=True)
class Profile:
    """A recording of decode steps. microseconds: by kind, a step. longest: (name, kind, us a step, calls a step)."""

    num_seqs: int
    context: int
    microseconds: dict[str, float]
    longest: list[tuple[str, str, float, float]]
    period: float  # us from step to step, idle time included
    idle: float  # us a step in which nothing ran


def summarize(kernels: Sequence[traces.Kernel], num_seqs: int, context: int, num_steps: int) -> Profile:
    """Group the kernels of `num_steps` steps."""
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, list[float]] = defaultdict(list)
    for kernel, us in zip(kernels, traces.added(kernels), strict=True):
        by_kind[kind_of(kernel.name)] += us / num_steps
        by_name[kernel.name].append(us)
    ranked = sorted(by_name.items(), key=lambda entry: -sum(entry[1]))
    longest = [(name, kind_of(name), sum(us) / num_steps, len(us) / num_steps) for name, us in ranked]
    idle = traces.idle_of(kernels, num_steps)
    return Profile(num_seqs, context, dict(by_kind), longest, idle.total / num_steps, idle.idle / num_steps)


def record(llm: LLM, num_seqs: int, context: int, num_steps: int) -> Profile:
    """Decode steps of `num_seqs` sequences. Raises RuntimeError if they do not fit, or nothing can be recorded."""
    engine = stepping.engine_of(llm)
    ids = stepping.start_decoding(llm, num_seqs, context, 2 * num_steps + 48, settle=16)

    def work() -> None:
        for _ in range(num_steps):
            engine.step()

    try:
        traces.record(work)  # the profiler's own start is in the first recording
        kernels = traces.record(work)
    finally:
        stepping.finish(llm, ids)
    return summarize(kernels, num_seqs, context + 16 + num_steps * 3 // 2, num_steps)


def markdown(profile: Profile, model: ModelBytes, num_longest: int) -> str:
    """The table of one batch size, its totals, and the longest kernels."""
    kv = model.kv_per_token * profile.num_seqs * profile.context
    moved = {"attention": kv, "GEMM": model.weights}
    busy = sum(profile.microseconds.values())
    lines = [
        f"### {profile.num_seqs} sequences, context about {profile.context}",
        "",
        "| kind | us a step | share | GB moved | TB/s | limit us | of limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ORDER:
        us = profile.microseconds.get(kind, 0.0)
        cells = [kind, f"{us:.1f}", f"{us / busy:.1%}"]
        if (size := moved.get(kind)) and us:
            limit = size / LIMIT_TB_S / 1e6
            cells += [f"{size / 1e9:.2f}", f"{size / us / 1e6:.2f}", f"{limit:.1f}", f"{limit / us:.0%}"]
        else:
            cells += ["-"] * 4
        lines.append(f"| {' | '.join(cells)} |")
    limit = (kv + model.weights) / LIMIT_TB_S / 1e6
    lines += [
        f"| kernels | {busy:.1f} | 100% | {(kv + model.weights) / 1e9:.2f} | {(kv + model.weights) / busy / 1e6:.2f} "
        f"| {limit:.1f} | {limit / busy:.0%} |",
        f"| step to step | {profile.period:.1f} | | | | {limit:.1f} | {limit / profile.period:.0%} |",
        "",
        f"Idle: {profile.idle:.1f} us a step. Longest kernels:",
        "",
    ]
    for name, kind, us, calls in profile.longest[:num_longest]:
        lines.append(f"    {us:9.1f} us  {calls:6.1f} calls  {kind:<10} {name[:90]}")
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, type=Path)
    made.add_argument("--seqs", default="1,64,256")
    made.add_argument("--context", type=int, default=512)
    made.add_argument("--steps", type=int, default=32)
    made.add_argument("--longest", type=int, default=12, help="kernels listed for each batch size")
    made.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    made.add_argument("--out", type=Path)
    return made


def main() -> int:
    args = parser().parse_args()
    options = stepping.parse_options(args.kwargs)
    config = json.loads((args.model / "config.json").read_text())
    model = ModelBytes.of(config, options.get("quantization") == "fp8", options.get("kv_cache_dtype") == "fp8")
    llm = stepping.open_llm(str(args.model), **{"load_format": "dummy", "skip_tokenizer_init": True, **options})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    text = f"## Decode steps of {args.model.name} on {device}, {args.kwargs}\n\n"
    failed = 0
    for num_seqs in map(int, args.seqs.split(",")):
        try:
            text += markdown(record(llm, num_seqs, args.context, args.steps), model, args.longest) + "\n"
        except RuntimeError as error:
            failed += 1
            text += f"### {num_seqs} sequences: {error}\n\n"
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
