"""Open-loop load on any OpenAI-compatible server: Poisson arrivals, streamed completions.

    python serve_load.py --base-url http://127.0.0.1:8000 --model NAME --rates 10,30,inf --seconds 30

Each request streams /v1/completions with a prompt of token ids and ignore_eos, so every server does
the same work. Prints one JSON row a rate: achieved rate, failures, TTFT, inter-token and
end-to-end latency (p50/p90/p99, ms), output tokens per second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import Any, NamedTuple

import aiohttp


class Outcome(NamedTuple):
    """One request as its client saw it: seconds, tokens, and what went wrong, if something did."""

    ttft: float = 0.0
    gap: float = 0.0
    end_to_end: float = 0.0
    tokens: int = 0
    failure: str | None = None


def percentiles(seconds: list[float]) -> list[float] | None:
    """p50, p90 and p99 in milliseconds; None of nothing."""
    ranked = sorted(seconds)
    at = [ranked[min(len(ranked) - 1, int(p / 100 * len(ranked)))] for p in (50, 90, 99)] if ranked else []
    return [round(value * 1e3, 2) for value in at] or None


async def one(session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], n_out: int) -> Outcome:
    """Stream one completion. A failed request is an outcome, never a crash of the load."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": n_out,
        "temperature": 1.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, stamps, usage = time.perf_counter(), [], None
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                return Outcome(failure=f"{response.status} {(await response.text())[:200]}")
            async for line in response.content:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    chunk = json.loads(line[6:])
                    usage = chunk.get("usage") or usage
                    if chunk["choices"]:
                        stamps.append(time.perf_counter())
        count = usage["completion_tokens"] if usage else 0
        gap = (stamps[-1] - stamps[0]) / max(1, count - 1)
        failure = None if count == n_out else f"{count} of {n_out} tokens"
        return Outcome(stamps[0] - start, gap, stamps[-1] - start, count, failure)
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
        return Outcome(failure=repr(error)[:200])


async def load(args: argparse.Namespace, rate: float, session: aiohttp.ClientSession) -> dict[str, Any]:
    """Requests at a Poisson rate for args.seconds, or args.burst at once where the rate is inf."""
    rng = random.Random(args.seed)
    jobs = []
    count = args.burst if rate == float("inf") else int(rate * args.seconds)
    begin = time.perf_counter()
    at = begin
    for _ in range(count):
        n_in = min(2048, max(4, int(rng.lognormvariate(5.3, 0.9))))
        n_out = min(1024, max(4, int(rng.lognormvariate(5.0, 0.7))))
        prompt = [rng.randrange(1000, 30000) for _ in range(n_in)]
        if rate != float("inf"):
            at += rng.expovariate(rate)
            await asyncio.sleep(max(0, at - time.perf_counter()))
        url = args.base_url + "/v1/completions"
        jobs.append(asyncio.create_task(one(session, url, args.model, prompt, n_out)))
    outcomes = await asyncio.gather(*jobs)
    took = time.perf_counter() - begin
    good = [outcome for outcome in outcomes if outcome.failure is None]
    bad = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    return {
        "rate": str(rate),
        "requests": count,
        "failed": len(bad),
        "first_failure": bad[0] if bad else None,
        "requests_s": round(len(good) / took, 2),
        "output_tok_s": round(sum(outcome.tokens for outcome in good) / took, 1),
        "ttft_ms_p50_p90_p99": percentiles([outcome.ttft for outcome in good]),
        "itl_ms_p50_p90_p99": percentiles([outcome.gap for outcome in good]),
        "e2e_ms_p50_p90_p99": percentiles([outcome.end_to_end for outcome in good]),
    }


async def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("--base-url", default="http://127.0.0.1:8000")
    ap.add_argument("--model", required=True)
    ap.add_argument("--rates", default="10,30,inf")
    ap.add_argument("--seconds", type=float, default=20)
    ap.add_argument("--burst", type=int, default=1000, help="requests sent at once for rate inf")
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        for _ in range(2):
            await one(session, args.base_url + "/v1/completions", args.model, [2000] * 64, 16)
        for rate in args.rates.split(","):
            args.seed += 1
            print(json.dumps(await load(args, float(rate), session)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
