"""How many steps lookup would save, counted over outputs that were decoded plainly: what a setting can gain at best.

    python benchmarks/speculation/replay.py [--model smollm2] [--kinds "code edit" chat] [--drafts 4 8 16]

Each output is walked through: where the drafts that a step would verify agree with what came, it is that much further.
Speculation yields the same tokens, so these are the steps of a sequence that decodes alone, however the engine works.
The table gives tokens a step (1 without speculation): of ngram, of suffix where the kind's other prompts were answered
before, and of suffix where all of them have been answered once. "copied" is the share of an output's tokens in runs of
8 or more that its prompt has too; what else is guessed is the output's own repetition, of which small models are fond.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from workloads import KINDS, prompts

from octavo import LLM, SamplingParams
from octavo.worker.drafters.lookup import Lookup, LookupSettings

_RUN = 8
_CPU = torch.device("cpu")


class Answer(NamedTuple):
    """Token ids."""

    prompt: list[int]
    output: list[int]


def answers(llm: LLM, kind: str) -> list[Answer]:
    """All prompts of a kind, answered."""
    tokenizer = llm.get_tokenizer()
    work = prompts(kind, tokenizer.vocab_size)
    ids = [prompt.tokens(tokenizer) for prompt in work]
    params = [SamplingParams(temperature=p.temperature, seed=1, max_tokens=p.max_tokens) for p in work]
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=False)
    return [Answer(one, list(output.outputs[0].token_ids)) for one, output in zip(ids, outputs)]


def num_steps(lookup: Lookup, answer: Answer) -> int:
    """Steps from the first token on, which comes with the prompt's last step, to the last one; that one counted too."""
    known, tokens = len(answer.prompt) + 1, answer.prompt + answer.output
    token_ids = torch.tensor([tokens])
    drafts, counts = torch.empty(1, lookup.settings.max_drafts, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    wanted, slots = torch.full_like(counts, lookup.settings.max_drafts), torch.zeros_like(counts)
    steps = 1
    while known < len(tokens):
        lookup.find(token_ids, slots, torch.tensor([known], dtype=torch.int32), wanted, drafts, counts)
        right = 0
        for draft, token in zip(drafts[0, : int(counts)].tolist(), tokens[known : len(tokens) - 1]):
            if draft != token:
                break
            right += 1
        known += right + 1
        steps += 1
    return steps


def tokens_a_step(given: Sequence[Answer], settings: LookupSettings, rounds: int = 1) -> float:
    """Of all answers in the last of so many rounds through them."""
    lookup = Lookup(settings, _CPU)
    steps = 0
    for round_number in range(rounds):
        for answer in given:
            if round_number == rounds - 1:
                steps += num_steps(lookup, answer)
            if lookup.past is not None:
                lookup.past.add(torch.tensor(answer.output))
    return sum(len(answer.output) for answer in given) / steps


def copied(answer: Answer) -> int:
    """Tokens of the output in runs that the prompt has too."""
    prompt, output = answer
    runs = {tuple(prompt[at : at + _RUN]) for at in range(len(prompt) - _RUN + 1)}
    found: set[int] = set()
    for at in range(len(output) - _RUN + 1):
        if tuple(output[at : at + _RUN]) in runs:
            found.update(range(at, at + _RUN))
    return len(found)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", default="smollm2")
    ap.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    ap.add_argument("--drafts", nargs="+", type=int, default=[4, 8, 16])
    ap.add_argument("--min-match", type=int, default=2)
    ap.add_argument("--threads", type=int)
    args = ap.parse_args()
    llm = LLM(args.model, dtype="float32", max_model_len=2048, threads=args.threads)
    print("| kind | tokens | copied | drafts | ngram | suffix | suffix, asked again |\n|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        given = answers(llm, kind)
        total = sum(len(answer.output) for answer in given)
        share = sum(map(copied, given)) / total
        for count in args.drafts:
            ngram = LookupSettings(args.min_match, 5, count)
            suffix = LookupSettings(args.min_match, 16, count, 65_536)
            found = tokens_a_step(given, ngram), tokens_a_step(given, suffix), tokens_a_step(given, suffix, 2)
            print(f"| {kind} | {total} | {share:.0%} | {count} | " + " | ".join(f"{one:.2f}" for one in found) + " |")


if __name__ == "__main__":
    main()
