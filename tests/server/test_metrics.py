"""The numbers on /metrics against what the tests know to have happened."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_rig import FakeEngine, Script, running, until

from octavo.protocol.outputs import SchedulerStats
from octavo.server.histogram import Histogram, one_two_five
from octavo.server.metrics import MetricsRegistry, RequestRecord
from octavo.server.statistics_log import describe, log_statistics

PATH = "/v1/completions"
STATS = SchedulerStats(
    num_running=3, num_waiting=2, num_blocks=100, num_free_blocks=75, prefix_cache_queries_total=200,
    prefix_cache_hits_total=50, num_preemptions_total=4, prompt_tokens_total=1000, generation_tokens_total=500,
    num_steps_total=9,
)  # fmt: skip


async def test_the_ledger_adds_up() -> None:
    gate = asyncio.Event()

    def script(request: object) -> Script:
        kind = bytes(request.prompt_token_ids)
        return {
            b"ok": Script(b"abc"),
            b"bad": Script(b"abc", fault="error"),
            b"held": Script(gate=gate),
            b"gone": Script(gate=gate),
        }[kind]

    async with running(FakeEngine(script)) as rig:

        def post(prompt: str, **fields: object) -> asyncio.Task:
            return asyncio.create_task(rig.http.post(PATH, json={"model": "fake", "prompt": prompt, **fields}))

        await asyncio.gather(*(post("ok", n=2) for _ in range(3)), post("ok", max_tokens=2), post("bad"), post(""))
        held, gone = post("held"), post("gone", stream=True)
        await until(lambda: len(rig.engine.running) == 2)
        gone.cancel()
        await until(lambda: len(rig.engine.running) == 1)
        metrics = await rig.metrics()
        ended = {
            reason: metrics[f'vllm:request_success_total{{finished_reason="{reason}"}}']
            for reason in ("stop", "length", "abort", "error")
        }
        assert ended == {"stop": 6, "length": 1, "abort": 1, "error": 1}
        assert metrics["octavo:requests_received_total"] == 10 == sum(ended.values()) + 1
        assert metrics["octavo:requests_in_flight"] == 1
        assert metrics["vllm:request_params_n_count"] == 7
        assert metrics["vllm:request_params_n_sum"] == 3 * 2 + 4
        assert metrics["vllm:time_to_first_token_seconds_count"] == 8
        assert metrics["vllm:e2e_request_latency_seconds_count"] == 9
        assert metrics["vllm:inter_token_latency_seconds_count"] == 6 * 3 + 1 + 2
        assert metrics["vllm:time_per_output_token_seconds_count"] == 21
        assert metrics["vllm:request_generation_tokens_sum"] == 6 * 4 + 2 + 3
        assert metrics["vllm:prompt_tokens_cached_total"] == 8 * 4
        assert metrics['http_requests_total{handler="/v1/completions",method="POST",status="2xx"}'] == 4
        assert metrics['http_requests_total{handler="/v1/completions",method="POST",status="4xx"}'] == 2
        assert metrics['http_requests_total{handler="/v1/completions",method="POST",status="5xx"}'] == 1
        gate.set()
        await held
        assert (await rig.metrics())["octavo:requests_in_flight"] == 0


async def test_engine_numbers() -> None:
    async with running() as rig:
        for tokens in (1, 8, 9, 0):
            rig.engine.emit(STATS, tokens)
        metrics = await rig.metrics()
        for name, value in {
            "num_requests_running": 3,
            "num_requests_waiting": 2,
            'num_requests_waiting_by_reason{reason="capacity"}': 2,
            "kv_cache_usage_perc": 0.25,
            "gpu_cache_usage_perc": 0.25,
            "num_requests_swapped": 0,
            "gpu_prefix_cache_hit_rate": 0.25,
            "prefix_cache_queries_total": 200,
            "gpu_prefix_cache_hits_total": 50,
            "num_preemptions_total": 4,
            "prompt_tokens_total": 1000,
            "request_prompt_tokens_total": 1000,
            "generation_tokens_total": 500,
            'iteration_tokens_total_bucket{le="1.0"}': 1,
            'iteration_tokens_total_bucket{le="8.0"}': 2,
            'iteration_tokens_total_bucket{le="+Inf"}': 3,
            'cache_config_info{block_size="16",num_gpu_blocks="64"}': 1,
        }.items():
            assert metrics[f"vllm:{name}"] == value, name
        answer = await rig.http.get("/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = {family.name for family in text_string_to_metric_families(answer.text)}
        assert {"process_resident_memory_bytes", "python_info", "vllm:request_prefill_time_seconds"} <= families


def test_latencies_of_one_request() -> None:
    metrics = MetricsRegistry("m", 100, {})
    now = 10.0
    record = RequestRecord(metrics, 10.0, 7, 5, clock=lambda: now)
    now = 12.0
    record.tokens(1, 3, scheduled=11.5)
    now = 12.5
    record.tokens(2, 3, scheduled=11.5)
    record.finish("length")
    sums = {name: data.sum for name, data in metrics.histograms.items()}
    assert sums["time_to_first_token_seconds"] == 2.0
    assert sums["inter_token_latency_seconds"] == 0.5
    assert sums["request_queue_time_seconds"] == 1.5
    assert sums["request_prefill_time_seconds"] == 0.5
    assert sums["request_decode_time_seconds"] == 0.5
    assert sums["request_inference_time_seconds"] == 1.0
    assert sums["e2e_request_latency_seconds"] == 2.5
    assert sums["request_time_per_output_token_seconds"] == 0.25
    assert sums["request_prefill_kv_computed_tokens"] == 4
    assert metrics.num_in_flight == 0


def test_buckets_are_cumulative_and_closed_above() -> None:
    data = Histogram((1, 2, 5))
    for value in (0, 1, 1.5, 5, 6):
        data.observe(value)
    assert data.buckets() == [("1.0", 2), ("2.0", 3), ("5.0", 4), ("+Inf", 5)]
    assert data.buckets(last=2) == [("1.0", 2), ("2.0", 3), ("+Inf", 5)]
    assert one_two_five(2048) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


def test_a_token_costs_microseconds() -> None:
    record = RequestRecord(MetricsRegistry("m", 100, {}), 0.0, 1, 1)

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(5_000):
            record.tokens(1, 0, 0.0)
        return (time.perf_counter() - start) / 5_000

    assert min(seconds() for _ in range(5)) < 10e-6


def test_the_statistics_line() -> None:
    line, throughput = describe(SchedulerStats(), STATS, 10.0)
    assert throughput == (100.0, 50.0)
    assert line == (
        "prompt 100.0 tokens/s, generation 50.0 tokens/s, Running: 3, Waiting: 2, "
        "KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )
    idle = SchedulerStats(num_steps_total=9, prompt_tokens_total=1000, generation_tokens_total=500)
    assert describe(idle, idle, 10.0) == (None, (0.0, 0.0))
    restarted = SchedulerStats(num_steps_total=1, prompt_tokens_total=30)
    assert describe(STATS, restarted, 10.0)[1] == (3.0, 0.0)


async def test_the_statistics_log_is_silent_when_idle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "octavo.stats")
    metrics = MetricsRegistry("m", 100, {})
    task = asyncio.create_task(log_statistics(metrics, 0.01))
    await asyncio.sleep(0.05)
    assert caplog.records == []
    metrics.stats = STATS
    await until(lambda: bool(caplog.records))
    assert metrics.throughput[0] > 0
    task.cancel()


async def test_speculation_is_counted_where_there_is_any() -> None:
    stats = SchedulerStats(
        num_steps_total=5,
        num_running=1,
        num_drafts_total=10,
        num_draft_tokens_total=30,
        num_accepted_tokens_total=12,
        num_accepted_by_position_total=(7, 4, 1),
    )
    async with running() as rig:
        rig.engine.emit(STATS)
        assert "spec_decode" not in (await rig.http.get("/metrics")).text
        rig.engine.emit(stats)
        metrics = await rig.metrics()
        for name, value in {
            "num_drafts_total": 10,
            "num_draft_tokens_total": 30,
            "num_accepted_tokens_total": 12,
            "num_emitted_tokens_total": 22,
            "draft_acceptance_rate": 0.4,
            "efficiency": 22 / 40,
            'num_accepted_tokens_per_pos_total{position="1"}': 4,
        }.items():
            assert metrics[f"vllm:spec_decode_{name}"] == value, name
    line, _ = describe(SchedulerStats(), stats, 10.0)
    assert line is not None
    assert line.endswith(", Draft acceptance: 40.0%, 2.20 tokens a row with drafts")
    timed = msgspec.structs.replace(stats, guessing_seconds_total=4.0, plain_seconds_total=7.0)
    line, _ = describe(SchedulerStats(), timed, 10.0)
    assert line is not None
    assert line.endswith("2.20 tokens a row with drafts, 1.75x the speed of none")
