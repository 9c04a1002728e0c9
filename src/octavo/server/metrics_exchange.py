"""One /metrics for several API processes: whichever is asked adds up what all of them count.

Each listens on a unix socket and answers a connection with its Snapshot. What every process knows of the engine
is taken from the one that heard of it last; what a process counted itself is summed.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from octavo.protocol.outputs import SchedulerStats
from octavo.server.front_ends import FrontEndGroup
from octavo.server.metrics import MetricsRegistry
from octavo.server.openai.errors import unavailable

logger = logging.getLogger("octavo.server")

_TIMEOUT_SECONDS = 5.0

Counts = tuple[list[int], float]  # of a histogram: per bucket, and the sum


class Snapshot(msgspec.Struct, frozen=True):
    """All that one process would show, unrendered. process: its own exposition, of memory, CPU time and platform."""

    stats: SchedulerStats
    stats_time: float
    num_received: int
    finished: dict[str, int]
    num_cached_tokens: int
    num_computed_prompt_tokens: int
    throughput: tuple[float, float]
    histograms: dict[str, Counts]
    http: list[tuple[tuple[str, str, str], int]]
    http_seconds: list[tuple[tuple[str, str], Counts]]
    process: bytes


def snapshot(metrics: MetricsRegistry) -> Snapshot:
    """What `metrics` holds now."""
    return Snapshot(
        metrics.stats,
        metrics.stats_time,
        metrics.num_received,
        dict(metrics.finished),
        metrics.num_cached_tokens,
        metrics.num_computed_prompt_tokens,
        metrics.throughput,
        {name: data.export() for name, data in metrics.histograms.items()},
        list(metrics.http.items()),
        [(key, data.export()) for key, data in metrics.http_seconds.items()],
        metrics.render_process(),
    )


def merge(into: MetricsRegistry, snapshots: list[Snapshot]) -> bytes:
    """The exposition of all `snapshots` together, the first process's first. `into` is fresh, and filled."""
    latest = max(snapshots, key=lambda one: one.stats_time)
    into.stats, into.stats_time = latest.stats, latest.stats_time
    into.throughput = snapshots[0].throughput  # the first process keeps the statistics log
    for one in snapshots:
        into.num_received += one.num_received
        into.finished.update(one.finished)
        into.num_cached_tokens += one.num_cached_tokens
        into.num_computed_prompt_tokens += one.num_computed_prompt_tokens
        into.http.update(dict(one.http))
        for name, counts in one.histograms.items():
            into.histograms[name].add(*counts)
        for key, counts in one.http_seconds:
            into.http_histogram(key).add(*counts)
    return snapshots[0].process + into.render_own()


class MetricsExchange:
    """This process's end of it."""

    def __init__(self, metrics: MetricsRegistry, group: FrontEndGroup) -> None:
        self._metrics = metrics
        self._group = group
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        if self._group.directory is not None:
            self._server = await asyncio.start_unix_server(self._answer, self._path(self._group.index))

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def render(self) -> bytes:
        """The exposition for the whole server. Raises APIError 503 when a process does not answer in time."""
        if self._group.directory is None:
            return self._metrics.render()
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                found = await asyncio.gather(*map(self._ask, range(self._group.count)))
        except TimeoutError:
            raise unavailable("an API process did not tell its metrics in time") from None
        return merge(self._metrics.empty_copy(), [one for one in found if one is not None])

    async def _ask(self, index: int) -> Snapshot | None:
        """None for a process that does not serve yet, or no more."""
        if index == self._group.index:
            return snapshot(self._metrics)
        try:
            reader, writer = await asyncio.open_unix_connection(self._path(index))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        try:
            data = await reader.read(-1)
        finally:
            writer.close()
        return msgspec.msgpack.decode(data, type=Snapshot)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # noqa: ARG002
        writer.write(msgspec.msgpack.encode(snapshot(self._metrics)))
        writer.close()

    def _path(self, index: int) -> Path:
        assert self._group.directory is not None
        return Path(self._group.directory) / f"metrics-{index}.sock"
