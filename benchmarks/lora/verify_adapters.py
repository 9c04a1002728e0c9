#!/usr/bin/env python3
"""Does Octavo say with adapters what PEFT says? On SmolLM2-135M, in float32, on a CPU.

    pip install peft transformers accelerate
    PYTHONPATH=src python benchmarks/lora/verify_adapters.py DIR

DIR holds what train_adapters.py saved. The greedy answers to 20 prompts are compared token by token with those that
PEFT and transformers give one prompt at a time: of the base model and of each adapter alone, then of all three mixed in
one batch. Prints a table of how many answers differ, and where the first that does leaves PEFT's. Exits 1 if one does.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

from adapter_tasks import NUM_TOKENS, TASKS, greedy, held_out, load_reference, load_text
from peft import PeftModel

from octavo import LLM, SamplingParams
from octavo.lora.request import LoRARequest
from octavo.text.tokenizer import Tokenizer

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
    folder = parser.parse_args().folder
    tokenizer, prompts = load_text(), held_out()
    expected = references(folder, tokenizer, prompts)
    llm = LLM("smollm2", dtype="float32", max_model_len=256, enable_lora=True, max_loras=4)
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
