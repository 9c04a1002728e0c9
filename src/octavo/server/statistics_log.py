"""One log line every ten seconds while the engine works."""

from __future__ import annotations

import asyncio
import logging
import time

from octavo.protocol.outputs import SchedulerStats
from octavo.server.metrics import MetricsRegistry

logger = logging.getLogger("octavo.stats")

INTERVAL_SECONDS = 10.0


async def log_statistics(metrics: MetricsRegistry, interval: float = INTERVAL_SECONDS) -> None:
    """Runs until cancelled. Says nothing about an interval in which nothing ran or waited."""
    before, then = metrics.stats, time.monotonic()
    while True:
        await asyncio.sleep(interval)
        now = time.monotonic()
        line, metrics.throughput = describe(before, metrics.stats, now - then)
        before, then = metrics.stats, now
        if line:
            logger.info(line)


def describe(before: SchedulerStats, after: SchedulerStats, seconds: float) -> tuple[str | None, tuple[float, float]]:
    """The line for what lies between two snapshots (None when idle), and (prompt, generation) tokens per second.

    The hit rate is that of the interval's own prompts.
    """
    # An engine that was restarted counts from 0 again.
    start = before if after.num_steps_total >= before.num_steps_total else SchedulerStats()
    prompt = (after.prompt_tokens_total - start.prompt_tokens_total) / seconds
    generation = (after.generation_tokens_total - start.generation_tokens_total) / seconds
    if not (prompt or generation or after.num_running or after.num_waiting):
        return None, (0.0, 0.0)
    usage = 1 - after.num_free_blocks / after.num_blocks if after.num_blocks else 0.0
    queries = after.prefix_cache_queries_total - start.prefix_cache_queries_total
    hits = after.prefix_cache_hits_total - start.prefix_cache_hits_total
    line = (
        f"prompt {prompt:.1f} tokens/s, generation {generation:.1f} tokens/s, "
        f"Running: {after.num_running}, Waiting: {after.num_waiting}, "
        f"KV cache usage: {usage:.1%}, Prefix cache hit rate: {hits / queries if queries else 0.0:.1%}"
    )
    return line + _of_speculation(start, after), (prompt, generation)


def _of_speculation(start: SchedulerStats, after: SchedulerStats) -> str:
    """How many guesses came true, how many tokens a row with guesses brought where it had brought one, and how much
    faster the steps with guesses were, as far as it is known what steps without take."""
    rows = after.num_drafts_total - start.num_drafts_total
    if not rows:
        return ""
    drafts = after.num_draft_tokens_total - start.num_draft_tokens_total
    accepted = after.num_accepted_tokens_total - start.num_accepted_tokens_total
    line = f", Draft acceptance: {accepted / drafts:.1%}, {1 + accepted / rows:.2f} tokens a row with drafts"
    seconds = after.guessing_seconds_total - start.guessing_seconds_total
    if seconds:
        line += f", {(after.plain_seconds_total - start.plain_seconds_total) / seconds:.2f}x the speed of none"
    return line
