#!/usr/bin/env python3
"""Does Octavo say with adapters what PEFT says? On SmolLM2-135M, in float32, on a CPU.

    pip install peft transformers accelerate
    PYTHONPATH=src python benchmarks/lora/verify_adapters.py DIR [--references FILE] [--model MODEL]

DIR holds what train_adapters.py saved. The greedy answers to 20 prompts are compared token by token with those that
PEFT and transformers give one prompt at a time: of the base model and of each adapter alone, then of all three mixed in
one batch. Prints a table of how many answers differ, and where the first that does leaves PEFT's. Exits 1 if one does.
PEFT's answers are kept in FILE, so that a machine without PEFT, one with a GPU say, can compare too. MODEL: where
Octavo finds SmolLM2, if that is not its own cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain
from pathlib import Path

from adapter_tasks import NUM_TOKENS, TASKS, greedy, held_out, load_reference

from octavo import LLM, LoRARequest, SamplingParams
from octavo.text.tokenizer import Tokenizer

try:
    from peft import PeftModel
except ImportError:  # answers that a file keeps need none
    PeftModel = None

BASE = "base"


def references(folder: Path, tokenizer: Tokenizer, prompts: list[str]) -> dict[str, list[list[int]]]:
    """Token ids by adapter, `BASE` first; each adapter is put on a base model of its own."""
    found = {BASE: greedy(load_reference(), tokenizer, prompts)}
    for task in TASKS:
        model = PeftModel.from_pretrained(load_reference(), folder / task.name)
        found[task.name] = greedy(model.eval(), tokenizer, prompts)
    return found


def report(run: str, tokenizer: Tokenizer, expected: list[list[int]], got: list[list[int]]) -> int:
    """Print a row; the number of answers that differ."""
    differing = [i for i, (left, right) in enumerate(zip(expected, got, strict=True)) if left != right]
    print(f"| {run} | {len(expected)} | {sum(map(len, expected))} | {len(differing)} |", flush=True)
    for i in differing[:1]:
        for who, ids in (("PEFT", expected[i]), ("Octavo", got[i])):
            print(f"    {who}: {tokenizer.decode(ids, True)!r}")
    return len(differing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--references", type=Path)
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()
    folder, prompts = args.folder, held_out()
    llm = LLM(args.model, dtype="float32", max_model_len=256, enable_lora=True, max_loras=4)
    tokenizer = llm.get_tokenizer()
    if args.references is not None and args.references.exists():
        expected = json.loads(args.references.read_text())
    else:
        expected = references(folder, tokenizer, prompts)
        if args.references is not None:
            args.references.write_text(json.dumps(expected))
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    requests = {BASE: None} | {
        task.name: LoRARequest(task.name, number, str(folder / task.name)) for number, task in enumerate(TASKS, 1)
    }

    def answers(batch: list[str], adapters: list[LoRARequest | None]) -> list[list[int]]:
        outputs = llm.generate(batch, params, lora_request=adapters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    print("| run | answers | tokens | different |\n|---|---|---|---|")
    different = 0
    for name, request in requests.items():
        different += report(name, tokenizer, expected[name], answers(prompts, [request] * len(prompts)))
    mixed = list(chain.from_iterable([prompt] * len(requests) for prompt in prompts))
    wanted = list(chain.from_iterable(zip(*expected.values(), strict=True)))
    different += report("all in one batch", tokenizer, wanted, answers(mixed, list(requests.values()) * len(prompts)))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
