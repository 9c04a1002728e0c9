"""Sample outputs of the small model under every schema of the tests, and validate those that came to their end.

    python benchmarks/structured_outputs.py [--samples 2] [--max-tokens 64] [--only N] [--out benchmarks/results]

More than 300 schemas, SmolLM2-135M on the CPU, temperature 1, batches of 64. An output whose finish_reason is "stop"
must be valid by `jsonschema` (Draft 2020-12, with formats). Exits with 1 where one is not. Writes
structured-outputs-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import jsonschema

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from compare_cpu import commit, machine
from json_schemas_more import ALL_SCHEMAS
from schema_formats import validate

from octavo import LLM, SamplingParams, StructuredOutputsParams

BATCH = 64


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--samples", type=int, default=2, help="of each schema")
    ap.add_argument("--max-tokens", type=int, default=64)
    ap.add_argument("--dtype", default="bfloat16")
    ap.add_argument("--only", type=int, help="the first N schemas")
    ap.add_argument("--out", type=Path, help="folder to write the page to; without it, it is printed only")
    args = ap.parse_args()
    names = list(ALL_SCHEMAS)[: args.only]
    work = [(name, sample) for sample in range(args.samples) for name in names]
    llm = LLM("smollm2", dtype=args.dtype, max_model_len=256, max_num_seqs=BATCH, kv_cache_memory="512MiB")
    began = time.perf_counter()
    reasons = {"stop": 0, "length": 0}
    wrong: list[str] = []
    for begin in range(0, len(work), BATCH):
        some = work[begin : begin + BATCH]
        params = [
            SamplingParams(
                temperature=1.0,
                seed=1000 * sample + index,
                max_tokens=args.max_tokens,
                structured_outputs=StructuredOutputsParams(
                    json=ALL_SCHEMAS[name], disable_any_whitespace=index % 8 > 0
                ),
            )
            for index, (name, sample) in enumerate(some, begin)
        ]
        prompts = [f"As JSON, by the schema {json.dumps(ALL_SCHEMAS[name])[:200]}: " for name, _ in some]
        for (name, _), output in zip(some, llm.generate(prompts, params, use_tqdm=False)):
            completion = output.outputs[0]
            reasons[str(completion.finish_reason)] = reasons.get(str(completion.finish_reason), 0) + 1
            if completion.finish_reason == "stop":
                try:
                    validate(ALL_SCHEMAS[name], json.loads(completion.text))
                except (ValueError, jsonschema.ValidationError) as error:
                    wrong.append(f"{name}: {completion.text!r}: {str(error).splitlines()[0]}")
                    print(wrong[-1], flush=True)
        print(f"{begin + len(some)} of {len(work)}: {reasons}", flush=True)
    page = "\n".join(
        [
            f"# Structured output of a small model, {datetime.date.today()}",
            "",
            f"Machine: {machine()}. Commit: {commit()}. SmolLM2-135M, {args.dtype}, temperature 1.",
            f"Command: `python benchmarks/structured_outputs.py {' '.join(sys.argv[1:])}`",
            "",
            f"{len(names)} schemas, {args.samples} outputs each, at most {args.max_tokens} tokens: "
            f"{', '.join(f'{count} ended with {reason}' for reason, count in reasons.items())}; "
            f"{len(wrong)} of those that ended with stop are not valid. {time.perf_counter() - began:.0f} s.",
            "",
            *(f"- {line}" for line in wrong),
        ]
    )
    print(page)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"structured-outputs-{datetime.date.today()}.md").write_text(page + "\n")
    return 1 if wrong or set(reasons) > {"stop", "length"} else 0


if __name__ == "__main__":
    sys.exit(main())
