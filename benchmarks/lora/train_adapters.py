#!/usr/bin/env python3
"""Train two adapters of SmolLM2-135M on a CPU with PEFT: one answers in capitals, one in JSON.

    pip install peft transformers accelerate
    PYTHONPATH=src python benchmarks/lora/train_adapters.py OUT [--steps 30]

Saves the folders OUT/capitals and OUT/json, and prints one JSON row each: the share of 20 prompts that were held out
whose greedy answer is what the task wants, of the base model and with the adapter. Exits 1 where that share does not
grow by half at least.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from adapter_tasks import TASKS, Task, examples, greedy, held_out, load_reference, load_text
from peft import LoraConfig, get_peft_model

from octavo.text.tokenizer import Tokenizer

BATCH_SIZE = 8
LEARNING_RATE = 1e-3
IGNORED = -100  # as a label: no loss


def batch_of(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Token ids padded on the right, [B, T], with labels for the answers alone."""
    rows = [(tokenizer.encode(prompt, False), tokenizer.encode(answer, False)) for prompt, answer in pairs]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(task: Task, model: Any, tokenizer: Tokenizer, num_steps: int) -> float:
    """The loss of the last step."""
    pairs = examples(task)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / num_steps)
    )
    model.train()
    for step in range(num_steps):
        begin = step * BATCH_SIZE
        chosen = [pairs[i % len(pairs)] for i in range(begin, begin + BATCH_SIZE)]
        loss = model(**batch_of(chosen, tokenizer)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return float(loss.detach())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    tokenizer, prompts = load_text(), held_out()

    def answers(model: Any) -> list[str]:
        return [tokenizer.decode(ids, True).strip() for ids in greedy(model, tokenizer, prompts)]

    before = answers(load_reference())
    learnt = True
    for task in TASKS:
        torch.manual_seed(0)
        begin = time.monotonic()
        model = get_peft_model(load_reference(), LoraConfig(task_type="CAUSAL_LM", **task.adapter))
        loss = train(task, model, tokenizer, args.steps)
        seconds = time.monotonic() - begin
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that it saves the embedding's own weight too
            model.save_pretrained(args.out / task.name)
        after = answers(model)
        shares = [sum(map(task.succeeds, texts)) / len(prompts) for texts in (before, after)]
        learnt &= shares[1] >= shares[0] + 0.5
        row = {"task": task.name, "share_base": shares[0], "share_adapter": shares[1], "loss": round(loss, 4)}
        print(json.dumps(row | {"seconds": round(seconds, 1), "example": after[0]}), flush=True)
    return 0 if learnt else 1


if __name__ == "__main__":
    sys.exit(main())
