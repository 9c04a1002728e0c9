"""Perplexity of models on a text: what a quantized checkpoint costs in accuracy, in one table.

    python benchmarks/perplexity.py TEXT NAME=MODEL[,dtype=D][,quantization=Q] ... [--tokens 20000] [--window 512]
        [--threads N] [--out FILE]

The text's first tokens are cut into windows that are scored by themselves, from their second token on: perplexity is
exp of the mean negative log-likelihood over all of these, in nats, as `prompt_logprobs` has it. Everything runs on the
CPU. The table's first row is what the others are compared with. Prints it, with the text's SHA-256; --out writes it to
a file too. No text comes with this script: the recorded results name the one they were made on.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_cpu import commit, machine
from tqdm import tqdm

from octavo import LLM, SamplingParams

_KNOWN = ("dtype", "quantization")
_AT_ONCE = 16  # windows: the log-probabilities of more would only take memory


@dataclass(frozen=True)
class Row:
    """loss: mean negative log-likelihood, in nats a token; count: of the tokens scored."""

    name: str
    loss: float
    count: int
    seconds: float


def windows(token_ids: list[int], size: int) -> list[list[int]]:
    """Whole windows of `size` tokens, in the text's order."""
    return [token_ids[at : at + size] for at in range(0, len(token_ids) - size + 1, size)]


def losses(llm: LLM, pieces: list[list[int]]) -> list[float]:
    """The negative log-likelihood of every token but the first of each piece."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    found = []
    for at in tqdm(range(0, len(pieces), _AT_ONCE), "windows"):
        prompts: list[Any] = [{"prompt_token_ids": piece} for piece in pieces[at : at + _AT_ONCE]]
        for output in llm.generate(prompts, params, use_tqdm=False):
            scored = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:])
            found += [-by_token[token].logprob for token, by_token in scored if by_token is not None]
    return found


def measure(spelled: str, text: str, args: argparse.Namespace) -> Row:
    name, _, rest = spelled.partition("=")
    model, *said = rest.split(",")
    options = dict(option.split("=", 1) for option in said)
    if not model or set(options) - set(_KNOWN):
        raise SystemExit(f"{spelled!r}: expected NAME=MODEL, then of {', '.join(_KNOWN)} what is wanted")
    llm = LLM(model=model, device="cpu", threads=args.threads, max_model_len=args.window + 1, **options)
    token_ids = llm.get_tokenizer().encode(text, add_special_tokens=False)[: args.tokens]
    begun = time.perf_counter()
    found = losses(llm, windows(token_ids, args.window))
    del llm
    gc.collect()
    return Row(name, math.fsum(found) / len(found), len(found), time.perf_counter() - begun)


def table(rows: list[Row]) -> str:
    lines = ["| model | perplexity | against the first | tokens scored | s |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = math.exp(row.loss - rows[0].loss)
        lines.append(
            f"| {row.name} | {math.exp(row.loss):.3f} | {100 * (ratio - 1):+.2f} % | {row.count} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    raw = args.text.read_bytes()
    rows = [measure(spelled, raw.decode(), args) for spelled in args.models]
    said = (
        f"Machine: {machine()}. Commit: {commit()}. Text: {args.text.name}, SHA-256 {hashlib.sha256(raw).hexdigest()};"
        f" its first {args.tokens} tokens in windows of {args.window}.\n\n{table(rows)}\n"
    )
    print(said)
    if args.out is not None:
        args.out.write_text(said)


if __name__ == "__main__":
    main()
