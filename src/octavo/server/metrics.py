"""Prometheus metrics under vLLM's names, so that existing dashboards and alerts keep working.

Fed from two sides: the engine's Outputs messages (gauges, token totals, step sizes) and the
handlers' RequestRecords (latencies, ends). Everything is written and read on the event loop.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.protocol.messages import Outputs
from octavo.protocol.outputs import FinishReason, SchedulerStats
from octavo.server import histogram
from octavo.server.histogram import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FINISHED = ("stop", "length", "abort", "error", "repetition")
_LABELS = ("model_name", "engine")


class MetricsRegistry(Collector):
    """All that /metrics shows. `stats` is what the engine last said."""

    def __init__(
        self, model_name: str, max_model_len: int, cache_config: Mapping[str, str], max_loras: int = 0
    ) -> None:
        """max_loras: the engine's; 0 where it takes no adapters, and nothing is shown of them."""
        lengths = histogram.one_two_five(max_model_len)
        seconds = histogram.REQUEST_SECONDS
        self.stats = SchedulerStats()
        self.stats_time = 0.0  # when it was said, monotonic seconds
        self.num_received = 0
        self.finished: Counter[str] = Counter(dict.fromkeys(_FINISHED, 0))
        self.num_cached_tokens = 0
        self.num_computed_prompt_tokens = 0
        self.throughput = (0.0, 0.0)  # prompt and generation tokens per second, written by the statistics log
        self.histograms = {
            "iteration_tokens_total": Histogram(histogram.ITERATION_TOKENS),
            "time_to_first_token_seconds": Histogram(histogram.TTFT_SECONDS),
            "inter_token_latency_seconds": Histogram(histogram.TOKEN_SECONDS),
            "request_time_per_output_token_seconds": Histogram(histogram.TOKEN_SECONDS),
            "e2e_request_latency_seconds": Histogram(seconds),
            "request_queue_time_seconds": Histogram(seconds),
            "request_inference_time_seconds": Histogram(seconds),
            "request_prefill_time_seconds": Histogram(seconds),
            "request_decode_time_seconds": Histogram(seconds),
            "request_prompt_tokens": Histogram(lengths),
            "request_generation_tokens": Histogram(lengths),
            "request_max_num_generation_tokens": Histogram(lengths),
            "request_params_max_tokens": Histogram(lengths),
            "request_prefill_kv_computed_tokens": Histogram(lengths),
            "request_params_n": Histogram(histogram.PARAMS_N),
        }
        self.http: Counter[tuple[str, str, str]] = Counter()  # by handler, method, class of the status
        self.http_seconds: dict[tuple[str, str], Histogram] = {}  # by handler, method
        self._arguments = (model_name, max_model_len, cache_config, max_loras)
        self._labels = (model_name, "0")
        self._cache_config = dict(cache_config)
        self._max_loras = max_loras
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def empty_copy(self) -> MetricsRegistry:
        """One with the same labels and buckets, and nothing counted."""
        return MetricsRegistry(*self._arguments)

    def on_outputs(self, outputs: Outputs) -> None:
        """Listener for EngineClient.add_listener."""
        self.stats = outputs.stats
        self.stats_time = time.monotonic()
        if outputs.num_step_tokens:
            self.histograms["iteration_tokens_total"].observe(outputs.num_step_tokens)

    def http_request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP answer. `handler` is a route's pattern, so that label values stay few."""
        method = method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH") else "other"
        self.http[handler, method, f"{status // 100}xx"] += 1
        self.http_histogram((handler, method)).observe(seconds)

    def http_histogram(self, key: tuple[str, str]) -> Histogram:
        """That of (handler, method), made where there is none yet."""
        return self.http_seconds.setdefault(key, Histogram(histogram.HTTP_SECONDS))

    @property
    def num_in_flight(self) -> int:
        return self.num_received - self.finished.total()

    def render(self) -> bytes:
        """The exposition in Prometheus' text format 0.0.4."""
        return self.render_process() + self.render_own()

    def render_process(self) -> bytes:
        """The part about this process: memory, CPU time, platform."""
        return generate_latest(self._process)

    def render_own(self) -> bytes:
        """The part about the engine and the requests."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._engine_gauges()
        yield from self._engine_counters()
        yield from self._request_counters()
        if self._max_loras:
            yield from self._adapter_families()
        if self.stats.num_accepted_by_position_total:
            yield from self._speculation_families()
        for name, data in self.histograms.items():
            yield self._histogram(name, data)
        # The name and the shorter bucket list before inter_token_latency_seconds took over.
        yield self._histogram("time_per_output_token_seconds", self.histograms["inter_token_latency_seconds"], 2.5)
        yield from self._http_families()

    def describe(self) -> list[Metric]:
        return []

    def _engine_gauges(self) -> Iterator[Metric]:
        stats = self.stats
        usage = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        queries = stats.prefix_cache_queries_total
        hit_rate = stats.prefix_cache_hits_total / queries if queries else 0.0
        for name, text, value in (
            ("num_requests_running", "Sequences that run", stats.num_running),
            ("num_requests_waiting", "Sequences that wait to run", stats.num_waiting),
            ("kv_cache_usage_perc", "KV blocks in use, 0..1", usage),
            ("gpu_cache_usage_perc", "Older name of vllm:kv_cache_usage_perc", usage),
            ("cpu_cache_usage_perc", "Nothing is swapped: always 0", 0),
            ("num_requests_swapped", "Nothing is swapped: always 0", 0),
            ("gpu_prefix_cache_hit_rate", "Prefix cache hits per queried token since the start", hit_rate),
            ("cpu_prefix_cache_hit_rate", "There is no CPU prefix cache: always 0", 0),
            ("avg_prompt_throughput_toks_per_s", "Prompt tokens per second of late", self.throughput[0]),
            ("avg_generation_throughput_toks_per_s", "Output tokens per second of late", self.throughput[1]),
        ):
            yield self._gauge(f"vllm:{name}", text, value)
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "Sequences that wait, by reason", labels=(*_LABELS, "reason")
        )
        reasons.add_metric((*self._labels, "capacity"), stats.num_waiting)
        reasons.add_metric((*self._labels, "deferred"), 0)
        yield reasons
        labels = (*_LABELS, *self._cache_config)
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's configuration", labels=labels)
        info.add_metric((*self._labels, *self._cache_config.values()), 1)
        yield info
        yield self._gauge("octavo:requests_in_flight", "Sequences that have not ended", self.num_in_flight)

    def _engine_counters(self) -> Iterator[Metric]:
        stats = self.stats
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_cache_queries_total),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.prefix_cache_hits_total),
            ("gpu_prefix_cache_queries", "Older name of vllm:prefix_cache_queries", stats.prefix_cache_queries_total),
            ("gpu_prefix_cache_hits", "Older name of vllm:prefix_cache_hits", stats.prefix_cache_hits_total),
            ("num_preemptions", "Sequences sent back to the queue for want of KV blocks", stats.num_preemptions_total),
            ("prompt_tokens", "Prompt tokens of sequences that reached their first token", stats.prompt_tokens_total),
            ("request_prompt_tokens", "Alias of vllm:prompt_tokens", stats.prompt_tokens_total),
            ("generation_tokens", "Output tokens", stats.generation_tokens_total),
            ("request_generation_tokens", "Alias of vllm:generation_tokens", stats.generation_tokens_total),
        ):
            yield self._counter(f"vllm:{name}", text, value)

    def _request_counters(self) -> Iterator[Metric]:
        cached, computed = self.num_cached_tokens, self.num_computed_prompt_tokens
        yield self._counter("octavo:requests_received", "Sequences given to the engine", self.num_received)
        yield self._counter("vllm:prompt_tokens_cached", "Prompt tokens taken from the prefix cache", cached)
        source = CounterMetricFamily(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from", labels=(*_LABELS, "source")
        )
        source.add_metric((*self._labels, "local_compute"), computed)
        source.add_metric((*self._labels, "local_cache_hit"), cached)
        yield source
        ends = CounterMetricFamily(
            "vllm:request_success", "Sequences that ended, by reason", labels=(*_LABELS, "finished_reason")
        )
        for reason, number in self.finished.items():
            ends.add_metric((*self._labels, reason), number)
        yield ends

    def _adapter_families(self) -> Iterator[Metric]:
        labels = {
            "max_lora": str(self._max_loras),
            "waiting_lora_adapters": ",".join(self.stats.waiting_adapters),
            "running_lora_adapters": ",".join(self.stats.running_adapters),
        }
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "When it was last known which adapters run and wait, unix time",
            labels=list(labels),
        )
        if self.stats_time:
            info.add_metric(list(labels.values()), time.time() - time.monotonic() + self.stats_time)
        yield info
        loads = self.stats.num_adapter_loads_total
        yield self._counter("octavo:lora_adapter_loads", "Times that an adapter was brought to the device", loads)

    def _speculation_families(self) -> Iterator[Metric]:
        stats = self.stats
        drafts, accepted = stats.num_draft_tokens_total, stats.num_accepted_tokens_total
        emitted = accepted + stats.num_drafts_total
        for name, text, value in (
            ("num_drafts", "Rows that verified draft tokens", stats.num_drafts_total),
            ("num_draft_tokens", "Draft tokens that were verified", drafts),
            ("num_accepted_tokens", "Draft tokens that came true", accepted),
            ("num_emitted_tokens", "Tokens that rows with draft tokens brought", emitted),
        ):
            yield self._counter(f"vllm:spec_decode_{name}", text, value)
        rate, most = accepted / drafts if drafts else 0.0, drafts + stats.num_drafts_total
        efficiency = emitted / most if most else 0.0
        yield self._gauge("vllm:spec_decode_draft_acceptance_rate", "Share of draft tokens that came true", rate)
        yield self._gauge("vllm:spec_decode_efficiency", "Tokens emitted per position computed", efficiency)
        family = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens that came true, by place in the draft",
            labels=(*_LABELS, "position"),
        )
        for position, number in enumerate(stats.num_accepted_by_position_total):
            family.add_metric((*self._labels, str(position)), number)
        yield family

    def _http_families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("http_requests", "HTTP requests", labels=("handler", "method", "status"))
        for key, number in self.http.items():
            requests.add_metric(key, number)
        yield requests
        seconds = HistogramMetricFamily(
            "http_request_duration_seconds", "Time to the end of the answer", labels=("handler", "method")
        )
        for labels, data in self.http_seconds.items():
            seconds.add_metric(labels, data.buckets(), data.sum)
        yield seconds

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _histogram(self, name: str, data: Histogram, last: float | None = None) -> Metric:
        family = HistogramMetricFamily(f"vllm:{name}", name.replace("_", " "), labels=_LABELS)
        family.add_metric(self._labels, data.buckets(last), data.sum)
        return family


class RequestRecord:
    """The times of one sequence, observed as they happen. `arrival` and the clock are monotonic seconds.

    Every record that begins ends exactly once, by `finish`: received = finished (all reasons) + in flight.
    """

    def __init__(
        self,
        metrics: MetricsRegistry,
        arrival: float,
        num_prompt_tokens: int,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._arrival = arrival
        self._num_prompt_tokens = num_prompt_tokens
        self._max_tokens = max_tokens
        self._scheduled = 0.0
        self._first = 0.0  # when the first token came; 0 before it
        self._last = 0.0
        self._num_cached_tokens = 0
        self.num_tokens = 0
        self._gaps = metrics.histograms["inter_token_latency_seconds"]
        metrics.num_received += 1

    def tokens(self, number: int, num_cached_tokens: int, scheduled: float) -> None:
        """`number` >= 1 tokens came in one step."""
        now = self._clock()
        self.num_tokens += number
        if self._first:
            self._gaps.observe(now - self._last)
        else:
            self._first = now
            self._scheduled = scheduled or self._arrival
            self._num_cached_tokens = num_cached_tokens
            self._metrics.num_cached_tokens += num_cached_tokens
            self._metrics.num_computed_prompt_tokens += self._num_prompt_tokens - num_cached_tokens
            self._metrics.histograms["time_to_first_token_seconds"].observe(now - self._arrival)
        self._last = now

    def finish(self, reason: FinishReason) -> None:
        metrics, observed = self._metrics, self._metrics.histograms
        metrics.finished[reason] += 1
        observed["e2e_request_latency_seconds"].observe(self._clock() - self._arrival)
        observed["request_prompt_tokens"].observe(self._num_prompt_tokens)
        observed["request_generation_tokens"].observe(self.num_tokens)
        observed["request_params_max_tokens"].observe(self._max_tokens)
        if not self._first:
            return
        decode = self._last - self._first
        observed["request_queue_time_seconds"].observe(max(0.0, self._scheduled - self._arrival))
        observed["request_inference_time_seconds"].observe(self._last - self._scheduled)
        observed["request_prefill_time_seconds"].observe(self._first - self._scheduled)
        observed["request_decode_time_seconds"].observe(decode)
        computed = self._num_prompt_tokens - self._num_cached_tokens
        observed["request_prefill_kv_computed_tokens"].observe(computed)
        if self.num_tokens > 1:
            observed["request_time_per_output_token_seconds"].observe(decode / (self.num_tokens - 1))
