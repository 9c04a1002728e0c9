"""How fast the scheduler is: schedule() and commit() against a worker that answers at once.

    python benchmarks/scheduler_speed.py [--seconds 2]

Prints one JSON row a case: "stream" keeps 8 sequences running, finished ones being replaced (requests of
64..79 + 64 tokens that share a prefix, so with prefix-cache hits and block turnover); "wide" decodes 256 sequences.
CPU times of the scheduler's two calls; steps_per_s_with_worker counts the fake worker and the refills as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from itertools import count
from time import process_time

from octavo.config import SchedulerConfig
from octavo.protocol.plan import RowResult, StepPlan, StepResult
from octavo.protocol.request import Request
from octavo.protocol.sampling import SamplingParams
from octavo.scheduler.scheduler import Scheduler


def make_scheduler(num_seqs: int, depth_blocks: int) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=1 << 20,
        block_size=16,
        num_blocks=1 + depth_blocks * num_seqs,
    )
    return Scheduler(config)


def requests(num_prompt: int, max_tokens: int) -> Iterator[Request]:
    """Endless requests; the first half of each prompt is the same."""
    for index in count():
        prompt = list(range(num_prompt // 2)) + [index % 65536] * (num_prompt // 2 + index % 16)
        yield Request(request_id=str(index), prompt_token_ids=prompt, sampling=SamplingParams(), max_tokens=max_tokens)


def answer(plan: StepPlan) -> StepResult:
    return StepResult(plan.step_id, [RowResult([7] if row.samples else []) for row in plan.rows])


def run(scheduler: Scheduler, source: Iterator[Request], num_seqs: int, seconds: float) -> dict[str, float]:
    """Step for `seconds`, topping up to num_seqs requests. Times in microseconds a step."""
    steps: list[float] = []
    num_unfinished = 0
    begin = process_time()
    while process_time() - begin < seconds:
        while num_unfinished < num_seqs:
            scheduler.add(next(source))
            num_unfinished += 1
        t0 = process_time()
        plan = scheduler.schedule(t0)
        t1 = process_time()
        assert plan is not None
        result = answer(plan)
        t2 = process_time()
        outputs = scheduler.commit(plan, result)
        steps.append(process_time() - t2 + t1 - t0)
        num_unfinished -= sum(output.finish_reason is not None for output in outputs)
    total = process_time() - begin
    ordered = sorted(steps)
    return {
        "steps_per_s": round(len(steps) / sum(steps)),
        "steps_per_s_with_worker": round(len(steps) / total),
        "median_us": round(statistics.median(ordered) * 1e6, 1),
        "p99_us": round(ordered[int(len(ordered) * 0.99)] * 1e6, 1),
        "num_steps": len(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each case runs")
    seconds = parser.parse_args().seconds
    for case, num_seqs, num_prompt, max_tokens in (("stream", 8, 64, 64), ("wide", 256, 64, 100_000)):
        scheduler = make_scheduler(num_seqs, 1 + (num_prompt + 16 + max_tokens) // 16)
        measured = run(scheduler, requests(num_prompt, max_tokens), num_seqs, seconds)
        scheduler.audit()
        print(json.dumps({"case": case, "num_seqs": num_seqs, **measured}))


if __name__ == "__main__":
    main()
