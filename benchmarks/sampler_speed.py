"""What sampling costs: milliseconds a step for a batch of rows, by feature.

    python benchmarks/sampler_speed.py --rows 32 --vocab 49152 --threads 2

Logits are bfloat16, normal with the given spreads: 1 is flat (a nucleus of p=0.9 holds 60% of the
vocabulary), 3 is wide for a language model (4%). Times include bringing the tokens to the host.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from octavo.protocol.sampling import SamplingParams
from octavo.worker.sampler.sampler import Sampler

WISHES: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 20": {"top_k": 20},
    "top_k 50, top_p 0.95": {"top_k": 50, "top_p": 0.95},
    "top_p 0.9": {"top_p": 0.9},
    "greedy, penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "greedy, min_tokens": {"temperature": 0.0, "min_tokens": 1000},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


def milliseconds(step: Callable[[int], object], repeats: int) -> tuple[float, float]:
    """Smallest and median time of `step(i)`, after two steps to warm up."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        step(i)
        times.append((time.perf_counter() - start) * 1e3)
    return min(times[2:]), statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--spread", type=float, nargs="+", default=[3.0, 1.0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{'rows':>4}  {'spread':>6}  {'feature':<22} {'min ms':>8} {'median':>8}")
    for rows in options.rows:
        for spread in options.spread:
            logits = (torch.randn(rows, options.vocab) * spread).bfloat16().to(device)
            for name, wish in WISHES.items():
                sampler = Sampler(rows, options.vocab, device)
                for slot in range(rows):
                    sampling = SamplingParams(seed=slot, max_tokens=2000, **wish)
                    sampler.set_slot(slot, sampling, (2,), list(range(100)), 50)
                slots = list(range(rows))

                def step(i: int, sampler=sampler, logits=logits, slots=slots) -> object:
                    return sampler.to_rows(sampler.sample(logits, slots, [100 + i] * len(slots)))

                fastest, median = milliseconds(step, options.repeats)
                print(f"{rows:4d}  {spread:6.1f}  {name:<22} {fastest:8.3f} {median:8.3f}")


if __name__ == "__main__":
    main()
