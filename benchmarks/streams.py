#!/usr/bin/env python3
"""Many concurrent streams through the `openai` client against a real server: do all complete, with the same text?

    python benchmarks/streams.py [--streams 200] [--tokens 32] [--cut 50]

Float32 and greedy, so each stream's text must equal that of the same prompt sent alone; a difference counts as a
tie where the two candidates' log-probabilities are within 1e-4. Then the same again while `cut` of the streams
are closed after their first chunk: the free KV blocks must return to what they were. Prints one JSON row.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from server_process import ServerProcess, running
from verify import TIE, make_prompts

ARGUMENTS = ["smollm2", "--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory", "512MiB"]


async def stream(client: AsyncOpenAI, prompt: str, num_tokens: int, *, cut: bool = False) -> str | None:
    """The text of one streamed completion; None when it was cut after its first chunk."""
    chunks = await client.completions.create(
        model="smollm2",
        prompt=prompt,
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    parts = []
    finish_reason = None
    async for chunk in chunks:
        if cut:
            await chunks.close()
            return None
        parts.append(chunk.choices[0].text)
        finish_reason = chunk.choices[0].finish_reason or finish_reason
    assert finish_reason == "length", finish_reason
    return "".join(parts)


async def alone(client: AsyncOpenAI, prompt: str, num_tokens: int) -> tuple[str, list[str], list[dict[str, float]]]:
    """Text and tokens of one completion and, at each of these, the candidates' log-probabilities."""
    answer = await client.completions.create(
        model="smollm2",
        prompt=prompt,
        max_tokens=num_tokens,
        temperature=0,
        logprobs=2,
        extra_body={"ignore_eos": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    return answer.choices[0].text, logprobs.tokens, logprobs.top_logprobs


def compare(text: str, reference: str, tokens: list[str], candidates: list[dict[str, float]]) -> str:
    """ "equal", "tie" or "different". The tokens are `reference` with its special tokens shown."""
    if text == reference:
        return "equal"
    at = 0
    for token, scores in zip(tokens, candidates):
        if not text.startswith(token, at):
            best = sorted(scores.values(), reverse=True)
            return "tie" if best[0] - best[1] < TIE else "different"
        at += len(token)
    return "different"


async def free_blocks(server: ServerProcess, want: float | None, timeout: float) -> tuple[float, float]:
    """(KV cache usage, seconds until it was `want` and nothing ran)."""
    began = time.monotonic()
    while True:
        usage = server.metric("vllm:kv_cache_usage_perc")
        running_now = server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
        if want is None or (usage == want and running_now == 0) or time.monotonic() - began > timeout:
            return usage, time.monotonic() - began
        await asyncio.sleep(0.02)


async def measure(server: ServerProcess, num_streams: int, num_tokens: int, num_cut: int) -> dict[str, Any]:
    """The row described at the top of this file."""
    async with AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", timeout=600, max_retries=0) as client:
        distinct = make_prompts(min(num_streams, 40))
        prompts = [distinct[i % len(distinct)] for i in range(num_streams)]
        reference = {prompt: await alone(client, prompt, num_tokens) for prompt in distinct}
        before, _ = await free_blocks(server, None, 0)

        began = time.monotonic()
        texts = await asyncio.gather(*(stream(client, prompt, num_tokens) for prompt in prompts))
        seconds = time.monotonic() - began
        verdicts = [compare(text or "", *reference[prompt]) for text, prompt in zip(texts, prompts)]

        cuts = [num_cut > 0 and i % max(1, num_streams // num_cut) == 0 for i in range(num_streams)]
        again = await asyncio.gather(*(stream(client, p, num_tokens, cut=c) for p, c in zip(prompts, cuts)))
        after, freed = await free_blocks(server, before, 5.0)
        kept = [compare(t, *reference[p]) for t, p in zip(again, prompts) if t is not None]
        return {
            "streams": num_streams,
            "tokens_each": num_tokens,
            "completed": sum(text is not None for text in texts),
            **{f"text_{verdict}": (verdicts + kept).count(verdict) for verdict in ("equal", "tie", "different")},
            "output_tok_s": round(num_streams * num_tokens / seconds, 1),
            "cut": sum(cuts),
            "kv_usage_before": before,
            "kv_usage_after": after,
            "seconds_until_free": round(freed, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--cut", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running(ARGUMENTS, Path(folder) / "server.log") as server:
        print(json.dumps(asyncio.run(measure(server, args.streams, args.tokens, args.cut))))


if __name__ == "__main__":
    main()
