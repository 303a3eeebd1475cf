"""Prometheus metrics: counters and gauges read from the engine at scrape time, and histograms of
what clients feel."""

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .drafting import DraftStats
from .engine import Engine
from .generation import Generation

_TIMES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry; the engine is read when somebody looks."""

    def __init__(
        self, engine: Engine, rebuilds: Callable[[], int], is_ready: Callable[[], bool]
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, rebuilds, is_ready))
        self._ttft = self._histogram("time_to_first_token", "From the request to its first token")
        self._e2e = self._histogram("e2e_request_latency", "From the request to its last token")
        self._tpot = self._histogram("time_per_output_token", "Mean between a request's tokens")

    def _histogram(self, name: str, text: str) -> Histogram:
        full = f"dsd:{name}_seconds"
        return Histogram(full, text, buckets=_TIMES_S, registry=self._registry)

    def watch(self, generation: Generation) -> None:
        """Observes the generation when it ends."""
        generation.observe = self._observe

    def _observe(self, generation: Generation) -> None:
        timing = generation.timing
        if not timing.first_token:
            return
        self._ttft.observe(timing.first_token - timing.submitted)
        self._e2e.observe(timing.last_token - timing.submitted)
        intervals = generation.num_completion_tokens - len(generation.choices)
        if intervals > 0:
            self._tpot.observe((timing.last_token - timing.first_token) / intervals)

    def exposition(self) -> tuple[bytes, str]:
        """The text format and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _EngineCollector(Collector):
    def __init__(
        self, engine: Engine, rebuilds: Callable[[], int], is_ready: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._rebuilds = rebuilds
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        counters = engine.counters
        yield from self._counters(
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            requests=counters.requests,
            requests_refused=counters.refused,
            engine_steps=counters.steps,
            worker_rebuilds=self._rebuilds(),
        )
        ended = CounterMetricFamily(
            "dsd:request_success", "Requests by the way they ended", labels=["finished_reason"]
        )
        for reason, count in counters.finished.items():
            ended.add_metric([str(reason)], count)
        yield ended
        yield GaugeMetricFamily("dsd:ready", "1: requests are served",
                                value=float(self._is_ready()))  # fmt: skip
        yield from self._gauges()

    def _counters(self, **values: int) -> Iterator[Metric]:
        for name, value in values.items():
            text = f"{name.replace('_', ' ')} since the start".capitalize()
            yield CounterMetricFamily(f"dsd:{name}", text, value=value)

    def _gauges(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        if stats is None:
            return
        yield from self._counters(
            num_preemptions=stats.num_preemptions,
            prefix_cache_queries=stats.num_prompt_tokens,
            prefix_cache_hits=stats.num_cached_tokens,
        )
        gauges = {
            "num_requests_running": (stats.num_running, "Sequences that have a row"),
            "num_requests_waiting": (stats.num_waiting, "Sequences in the queue"),
            "kv_cache_usage_perc": (
                stats.num_held_blocks / stats.num_blocks,
                "Share of the KV cache that sequences hold, 0 to 1",
            ),
            "kv_cache_cached_blocks": (stats.num_cached_blocks, "Blocks kept for prefix reuse"),
            "kv_cache_blocks": (stats.num_blocks, "Blocks of the KV cache"),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"dsd:{name}", text, value=value)
        if stats.drafts is not None:
            yield from self._drafts(stats.drafts)

    def _drafts(self, drafts: DraftStats) -> Iterator[Metric]:
        yield from self._counters(
            spec_decode_num_drafts=drafts.num_verified[0],
            spec_decode_num_draft_tokens=sum(drafts.num_verified),
            spec_decode_num_accepted_tokens=sum(drafts.num_accepted),
        )
        by_position = CounterMetricFamily(
            "dsd:spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by their place among the drafts",
            labels=["position"],
        )
        for position, count in enumerate(drafts.num_accepted):
            by_position.add_metric([str(position)], count)
        yield by_position
        yield GaugeMetricFamily("dsd:spec_decode_draft_length", "Drafts for a sequence in a step",
                                value=drafts.length)  # fmt: skip
