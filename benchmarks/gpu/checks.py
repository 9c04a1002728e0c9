#!/usr/bin/env python3
"""Does a GPU compute what the CPU computes? On a real small model, text by text.

    python benchmarks/gpu/checks.py --model FILE.gguf|FOLDER [--prompts 20] [--tokens 64] [--only NAME,…]

float32: greedy tokens equal to the CPU's, and equal to each other whatever the schedule and the backend: graphs or
eager, pipeline depth 1 or 2, prefix cache on or off, triton or torch attention, batched or alone, chunked. Where
two runs part, the first position is printed with the gap between the two candidates' log-probabilities: below 1e-4
it is a tie, which rounding decides, and counted apart; the rest of that output is not compared.
Constrained: greedy outputs that are held to schemas, patterns, choices and token lists, some of a batch in each way and
some in none, equal to the CPU's and of the shape asked for. Embeddings: equal to the CPU's.
bfloat16: log-probabilities of fixed texts under teacher forcing, beside float32. How far that may be off is the model's
own affair, so the CPU's bfloat16 is the measure: the mean may be 1.25 times as far off, the largest, which is one
position's luck, twice, and either may be 2e-2 in any case. fp8 is held to a bound that only a wrong scale or layout
exceeds.
Prints PASS or FAIL a check, in the order of the list, and ends with status 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import stepping

from octavo import LLM, CompletionOutput, RequestOutput, SamplingParams
from octavo.protocol.structured import StructuredOutputsParams

TIE = 1e-4
SAME = 2e-3  # log-probabilities of equal tokens, float32 beside float32
NEAR = 2e-2  # a reduced precision that is no farther off than this is fine whatever the CPU's is
GROSS = 0.5  # mean for fp8, which nothing here can be compared with
TOP = 5
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["human", "animal"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}

TEXTS = (
    "The capital of France is Paris, and the largest city of Germany is Berlin, which is also its capital.",
    "Water boils at one hundred degrees Celsius at sea level; on a high mountain it boils at a lower temperature.",
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n    total = 0\n    for _ in range(b):\n        total",
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat.",
    "In 1969 the first human being set foot on the Moon. Six missions landed there before the programme ended in 1972.",
    "To make tomato soup, chop two onions, fry them in butter until they are golden, then add a pound of tomatoes.",
    "Dear Sir or Madam, I am writing to ask whether the room that you advertised last Tuesday is still available.",
    "A triangle has three sides. A square has four sides. A pentagon has five sides. A hexagon has six sides.",
)


@dataclass
class Outcome:
    """What one comparison found. `notes`: where outputs part."""

    name: str
    passed: bool
    summary: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setup:
    """What every LLM of this run shares."""

    model: str
    device: str
    num_prompts: int
    num_tokens: int
    options: dict[str, Any]

    def open(self, **options: Any) -> LLM:
        base = {"device": self.device, "dtype": "float32", "max_model_len": 512, "kv_cache_memory": "1GiB"}
        # Options of the command line are the GPU's: a CPU may refuse them.
        given = {} if options.get("device") == "cpu" else self.options
        return stepping.open_llm(self.model, **{**base, "max_num_seqs": 64, **given, **options})

    def prompts(self) -> list[str]:
        """Different prompts of a few to some two hundred tokens; several share a long prefix."""
        found = []
        for i in range(self.num_prompts):
            context = " ".join(TEXTS[: i % 8]) if i % 2 else ""
            words = TEXTS[i % len(TEXTS)].split(" ")
            found.append(f"{context} {' '.join(words[: 3 + i % 9])}".strip())
        return found

    def greedy(self, llm: LLM, prompts: Sequence[str]) -> list[RequestOutput]:
        return llm.generate(list(prompts), self.params(ignore_eos=True), use_tqdm=False)

    def params(self, **wishes: Any) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.num_tokens, logprobs=TOP, **wishes)

    def constrained(self) -> list[SamplingParams]:
        """One for each prompt: the kinds of constraints in turn, and none."""
        kinds: list[dict[str, Any]] = [
            {"structured_outputs": StructuredOutputsParams(json=PERSON)},
            {"ignore_eos": True},
            {"structured_outputs": StructuredOutputsParams(regex=r"[a-f]{4}-[0-9]{4}( [A-Z][a-z]+){3}")},
            {"structured_outputs": StructuredOutputsParams(choice=["yes", "no", "perhaps later"])},
            {"allowed_token_ids": list(range(300, 900)), "ignore_eos": True},
            {"bad_words": ["the", "and", "is"], "ignore_eos": True},
            {"logits_processors": [_even_ids], "ignore_eos": True},
        ]
        return [self.params(**kinds[index % len(kinds)]) for index in range(self.num_prompts)]

    def decode_constrained(self, **options: Any) -> tuple[list[RequestOutput], list[list[float]]]:
        """Outputs of a fresh LLM for `constrained`, and the embeddings of TEXTS by it."""
        llm = self.open(**options)
        outputs = llm.generate(self.prompts(), self.constrained(), use_tqdm=False)
        embeddings = [output.outputs.embedding for output in llm.embed(list(TEXTS), use_tqdm=False)]
        llm.audit()
        stepping.close(llm)
        del llm
        stepping.reclaim()
        return outputs, embeddings

    def decode(self, **options: Any) -> list[RequestOutput]:
        """Greedy outputs of a fresh LLM, which is gone afterwards."""
        llm = self.open(**options)
        outputs = self.greedy(llm, self.prompts())
        llm.audit()
        stepping.close(llm)
        del llm
        stepping.reclaim()
        return outputs

    def score(self, **options: Any) -> list[float]:
        """Log-probabilities of the tokens of TEXTS, each given those before it."""
        llm = self.open(enable_prefix_caching=False, **options)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        scores = []
        for output in llm.generate(list(TEXTS), params, use_tqdm=False):
            for token_id, entry in zip(output.prompt_token_ids, output.prompt_logprobs or ()):
                if entry is not None:
                    scores.append(entry[token_id].logprob)
        stepping.close(llm)
        del llm
        stepping.reclaim()
        return scores


def _even_ids(output_ids: Sequence[int], logits: Any) -> Any:  # noqa: ARG001 (the contract's arguments)
    """A logits processor: odd token ids are never drawn."""
    logits[1::2] = float("-inf")
    return logits


def misshapen(params: SamplingParams, output: CompletionOutput) -> str | None:
    """What is wrong with an output that `params` constrain, or None."""
    shape, ids = params.structured_outputs, output.token_ids
    if params.allowed_token_ids and not set(ids) <= set(params.allowed_token_ids):
        return "a token that is not allowed"
    if params.logits_processors and any(token_id % 2 for token_id in ids):
        return "a token that the processor forbids"
    if params.bad_words and any(word in output.text.split() for word in params.bad_words):
        return "a bad word"
    if shape is None or output.finish_reason != "stop":
        return None
    if shape.json is not None and set(json.loads(output.text)) != set(PERSON["required"]):
        return "another object than the schema's"
    if shape.regex is not None and not re.fullmatch(shape.regex, output.text):
        return "a text that does not match"
    if shape.choice is not None and output.text not in shape.choice:
        return "a text that is none of the choices"
    return None


def same_tokens(name: str, base: list[RequestOutput], other: list[RequestOutput]) -> Outcome:
    """Whether two greedy runs of equal prompts agree, ties apart."""
    largest, ties, different, compared, notes = 0.0, 0, 0, 0, []
    for index, (left, right) in enumerate(zip(base, other, strict=True)):
        a, b = left.outputs[0], right.outputs[0]
        assert a.logprobs is not None
        assert b.logprobs is not None
        for position, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)):
            seen = a.logprobs[position]
            if x != y:
                gap = seen[x].logprob - seen[y].logprob if y in seen else float("inf")
                top = sorted((entry.logprob for entry in seen.values()), reverse=True)
                ties, different = ties + (gap < TIE), different + (gap >= TIE)
                notes.append(
                    f"prompt {index}, position {position}: {x} or {y}, {gap:.6f} apart; top-2 gap {top[0] - top[1]:.6f}"
                )
                break
            compared += 1
            largest = max(largest, abs(seen[x].logprob - b.logprobs[position][y].logprob))
        else:
            different += len(a.token_ids) != len(b.token_ids)
    summary = f"{compared} tokens equal, {different} outputs differ, {ties} ties, logprobs within {largest:.1e}"
    return Outcome(name, different == 0 and compared > 0 and largest < SAME, summary, notes)


def distance(base: list[float], other: list[float]) -> tuple[float, float]:
    """Mean and largest difference of log-probabilities of the same tokens."""
    gaps = [abs(a - b) for a, b in zip(base, other, strict=True)]
    return sum(gaps) / len(gaps), max(gaps)


def close_scores(
    name: str, base: list[float], other: list[float], mean_bound: float, max_bound: float = float("inf")
) -> Outcome:
    """Whether log-probabilities of the same tokens are near each other."""
    mean, largest = distance(base, other)
    summary = f"{len(base)} positions, mean {mean:.2e} (< {mean_bound:.2e}), max {largest:.2e} (< {max_bound:.2e})"
    return Outcome(name, mean < mean_bound and largest < max_bound, summary)


class Checks:
    """The checks by name. The runs that several compare with are made once, when first wanted."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._base: list[RequestOutput] | None = None
        self._scores: list[float] | None = None
        self._cpu_scores: list[float] | None = None

    def base(self) -> list[RequestOutput]:
        if self._base is None:
            self._base = self._setup.decode()
        return self._base

    def scores(self) -> list[float]:
        if self._scores is None:
            self._scores = self._setup.score()
        return self._scores

    def cpu_scores(self) -> list[float]:
        if self._cpu_scores is None:
            self._cpu_scores = self._setup.score(device="cpu")
        return self._cpu_scores

    def all(self) -> dict[str, Callable[[], list[Outcome]]]:
        """By name: what it changes beside the base run, which has the defaults."""
        return {
            "cpu": self.cpu,
            "schedules": self.schedules,
            "constrained": self.constrained,
            "eager": lambda: self.variant("eager", enforce_eager=True),
            "depth-1": lambda: self.variant("depth-1", async_scheduling=False),
            "depth-1-eager": lambda: self.variant("depth-1-eager", async_scheduling=False, enforce_eager=True),
            "no-prefix-cache": lambda: self.variant("no-prefix-cache", enable_prefix_caching=False),
            "torch-attention": lambda: self.variant("torch-attention", attention_backend="torch"),
            "chunked": lambda: self.variant("chunked", max_num_batched_tokens=64, max_num_seqs=8),
            "bfloat16": self.bfloat16,
            "fp8-weights": lambda: self.gross("fp8-weights", dtype="bfloat16", quantization="fp8"),
            "fp8-kv": lambda: self.gross("fp8-kv", dtype="bfloat16", kv_cache_dtype="fp8"),
        }

    def variant(self, name: str, **options: Any) -> list[Outcome]:
        return [same_tokens(name, self.base(), self._setup.decode(**options))]

    def cpu(self) -> list[Outcome]:
        """The CPU's tokens, and its scores."""
        tokens = same_tokens("cpu tokens", self._setup.decode(device="cpu"), self.base())
        scores = close_scores("cpu scores", self.cpu_scores(), self.scores(), SAME, SAME)
        return [tokens, scores]

    def schedules(self) -> list[Outcome]:
        """One LLM: batched, again with the prefixes cached, and every prompt alone."""
        setup, prompts = self._setup, self._setup.prompts()
        llm = setup.open()
        together = setup.greedy(llm, prompts)
        cached = setup.greedy(llm, prompts)
        hits = llm.stats().prefix_cache_hits_total
        alone = [setup.greedy(llm, [prompt])[0] for prompt in prompts]
        llm.audit()
        stepping.close(llm)
        del llm
        stepping.reclaim()
        hit = same_tokens("prefix cache hit", together, cached)
        hit.passed = hit.passed and hits > 0
        hit.summary += f", {hits} cached tokens"
        return [same_tokens("repeated", self.base(), together), hit, same_tokens("alone", together, alone)]

    def constrained(self) -> list[Outcome]:
        """Constraints and embeddings beside the CPU's."""
        cpu, cpu_embeddings = self._setup.decode_constrained(device="cpu")
        here, embeddings = self._setup.decode_constrained()
        wrong = [
            f"prompt {index}: {what}"
            for index, (params, output) in enumerate(zip(self._setup.constrained(), here, strict=True))
            if (what := misshapen(params, output.outputs[0])) is not None
        ]
        ended = sum(output.outputs[0].finish_reason == "stop" for output in here)
        shapes = Outcome("constrained shapes", not wrong and ended > 0, f"{len(wrong)} wrong, {ended} ended", wrong)
        flat = [[value for row in rows for value in row] for rows in (cpu_embeddings, embeddings)]
        return [
            same_tokens("constrained tokens", cpu, here),
            shapes,
            close_scores("embeddings", flat[0], flat[1], SAME, SAME),
        ]

    def bfloat16(self) -> list[Outcome]:
        """bfloat16 beside the CPU's float32, as far off as the CPU's bfloat16 at most, or little more."""
        exact = self.cpu_scores()
        mean, largest = distance(exact, self._setup.score(device="cpu", dtype="bfloat16"))
        here = self._setup.score(dtype="bfloat16")
        return [close_scores("bfloat16", exact, here, max(NEAR, 1.25 * mean), max(NEAR, 2 * largest))]

    def gross(self, name: str, **options: Any) -> list[Outcome]:
        return [close_scores(name, self.scores(), self._setup.score(**options), GROSS)]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True)
    made.add_argument("--device", default="auto", help="the one that is checked")
    made.add_argument("--prompts", type=int, default=20)
    made.add_argument("--tokens", type=int, default=64)
    made.add_argument("--only", help="names of checks, comma-separated")
    made.add_argument("--kwargs", default="{}", help="JSON of further LLM() arguments")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    setup = Setup(args.model, args.device, args.prompts, args.tokens, stepping.parse_options(args.kwargs))
    checks = Checks(setup).all()
    names = args.only.split(",") if args.only else list(checks)
    if unknown := [name for name in names if name not in checks]:
        print(f"checks: {', '.join(unknown)}: unknown; there are {', '.join(checks)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names:
        began = time.perf_counter()
        try:
            outcomes = checks[name]()
        except Exception as error:  # one check that cannot run must not hide what the others find
            outcomes = [Outcome(name, False, f"{type(error).__name__}: {error}"[:500])]
            stepping.reclaim()
        for outcome in outcomes:
            failed += not outcome.passed
            print("PASS" if outcome.passed else "FAIL", f"{outcome.name}: {outcome.summary}", flush=True)
            for note in outcome.notes[:5]:
                print(f"     {note}")
        print(f"     ({name}: {time.perf_counter() - began:.1f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
