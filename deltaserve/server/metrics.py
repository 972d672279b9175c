"""Prometheus metrics: under vLLM's names where they mean the same, else under ``deltaserve:``.

The number of series is bounded: of each label that grows with use, the first ``MAX_VALUES`` get
series of their own, the rest share one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deltaserve.engine.client import EngineClient
from deltaserve.engine.types import TokenEvent, Usage
from deltaserve.errors import LimitError, QueueFullError

MAX_VALUES = 200
OTHER = "(other)"
ENGINE = "0"
"""vLLM numbers its engines; here there is one."""
LABELS = ("model_name", "engine")

# vLLM's, so that its dashboards work. Seconds.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
TOKEN_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000,
)  # fmt: skip


class Capped:
    """The first values by themselves, later ones as one."""

    def __init__(self, limit: int = MAX_VALUES) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(value)
        return value


class SequenceMetrics:
    """What is observed of single sequences, under vLLM's names. Times are in seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(
                f"vllm:{name}", text, LABELS, buckets=tuple(buckets), registry=registry
            )

        self.ttft = histogram(
            "time_to_first_token_seconds", "From the request to its first token.", TTFT_BUCKETS
        )
        self.itl = histogram(
            "inter_token_latency_seconds", "From one token to the next.", ITL_BUCKETS
        )
        self.tpot = histogram(
            "request_time_per_output_token_seconds",
            "Mean time from one token to the next, of a request.",
            ITL_BUCKETS,
        )
        self.e2e = histogram(
            "e2e_request_latency_seconds", "From the request to its last token.", REQUEST_BUCKETS
        )
        self.phases = {
            name: histogram(f"request_{name}_time_seconds", text, REQUEST_BUCKETS)
            for name, text in (
                ("queue", "Waiting for a turn and for the delta."),
                ("inference", "Prefill and decode."),
                ("prefill", "Computing the prompt."),
                ("decode", "Generating."),
            )
        }
        self.prompt_tokens = histogram("request_prompt_tokens", "Of a prompt.", TOKEN_BUCKETS)
        self.generation_tokens = histogram(
            "request_generation_tokens", "Of an answer.", TOKEN_BUCKETS
        )
        self.success = Counter(
            "vllm:request_success",
            "Requests that ended, by reason.",
            (*LABELS, "finished_reason"),
            registry=registry,
        )


class Metrics:
    """What is counted while requests pass; the rest is read from the engine when asked for."""

    def __init__(self, client: EngineClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._model = Capped()
        self._tenant = Capped()
        self._registry.register(EngineCollector(client, self._model, self._tenant))
        self._sequences = SequenceMetrics(self._registry)
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused before they were queued.",
            ("engine", "reason"),
            registry=self._registry,
        )
        self._limited = Counter(
            "deltaserve:limited_requests",
            "Requests refused because a limit of their tenant or key was used up.",
            ("tenant", "limit"),
            registry=self._registry,
        )

    def watch(self, model: str, prompt_tokens: int) -> Watch:
        """Follow one sequence from now on."""
        return Watch(self._sequences, self._clock, self._model(model), prompt_tokens, self._clock())

    def refuse(self, error: Exception, tenant: str | None) -> None:
        """Count a request that was refused, if that was for want of room or by a limit."""
        if isinstance(error, LimitError):
            self._rejections.labels(ENGINE, error.limit).inc()
            self._limited.labels(self._tenant(tenant or ""), error.limit).inc()
        elif isinstance(error, QueueFullError):
            self._rejections.labels(ENGINE, "queue_full").inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


@dataclass(slots=True)
class Watch:
    """Times of one sequence, as its client sees them."""

    metrics: SequenceMetrics
    clock: Callable[[], float]
    model: str
    prompt_tokens: int
    started: float
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def see(self, event: TokenEvent) -> None:
        now = self.clock()
        labels = (self.model, ENGINE)
        if event.token_ids:
            if self.first is None:
                self.first = now
                self.metrics.ttft.labels(*labels).observe(now - self.started)
            else:
                self.metrics.itl.labels(*labels).observe(now - self.last)
            self.last = now
            self.tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self._end(event, now, labels)

    def _end(self, event: TokenEvent, now: float, labels: tuple[str, str]) -> None:
        metrics = self.metrics
        assert event.finish_reason is not None
        metrics.success.labels(*labels, event.finish_reason.value).inc()
        metrics.e2e.labels(*labels).observe(now - self.started)
        metrics.prompt_tokens.labels(*labels).observe(self.prompt_tokens)
        metrics.generation_tokens.labels(*labels).observe(self.tokens)
        if self.first is not None and self.tokens > 1:
            mean = (self.last - self.first) / (self.tokens - 1)
            metrics.tpot.labels(*labels).observe(mean)
        if (timing := event.timing) is not None:
            seconds = {
                "queue": timing.queued + timing.load,
                "inference": timing.prefill + timing.decode,
                "prefill": timing.prefill,
                "decode": timing.decode,
            }
            for name, value in seconds.items():
                metrics.phases[name].labels(*labels).observe(value)


class EngineCollector(Collector):
    """The engine's own counters and load, as they are when somebody asks."""

    def __init__(self, client: EngineClient, model: Capped, tenant: Capped) -> None:
        self._client = client
        self._model = model
        self._tenant = tenant

    def collect(self) -> Iterator[Metric]:
        yield from self._load()
        yield from self._by_model()
        yield from self._by_tenant()
        yield from self._residency()

    def _load(self) -> Iterator[Metric]:
        stats, base = self._client.stats(), self._client.models()[0].name
        used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", stats.running),
            ("num_requests_waiting", "Requests that wait.", stats.waiting),
            ("kv_cache_usage_perc", "KV blocks in use; 1 is all.", used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
            gauge.add_metric((base, ENGINE), value)
            yield gauge
        counts = (
            ("num_preemptions", "Requests that gave way and were computed again.",
             stats.preemptions),
            ("prefix_cache_queries", "Prompt tokens that were looked up.", stats.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens that were found.", stats.cached_tokens),
        )  # fmt: skip
        for name, text, count in counts:
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
            counter.add_metric((base, ENGINE), count)
            yield counter
        up = GaugeMetricFamily("deltaserve:engine_up", "1 while the engine serves.")
        up.add_metric((), float(self._client.alive()))
        yield up

    def _by_model(self) -> Iterator[Metric]:
        names = ("prompt_tokens", "generation_tokens", "prompt_tokens_cached")
        counters = {
            name: CounterMetricFamily(f"vllm:{name}", "Tokens.", labels=LABELS) for name in names
        }
        for model, usage in _merge(self._client.stats().models, self._model).items():
            values = (usage.prompt_tokens, usage.generation_tokens, usage.cached_tokens)
            for counter, value in zip(counters.values(), values, strict=True):
                counter.add_metric((model, ENGINE), value)
        yield from counters.values()

    def _by_tenant(self) -> Iterator[Metric]:
        counters = {
            name: CounterMetricFamily(f"deltaserve:tenant_{name}", text, labels=("tenant",))
            for name, text in (
                ("requests", "Sequences that ran."),
                ("prompt_tokens", "Tokens of prompts."),
                ("cached_tokens", "Tokens of prompts that did not have to be computed."),
                ("generation_tokens", "Tokens of answers."),
                ("queue_seconds", "Waiting for a turn and for deltas, of requests that ended."),
            )
        }
        for tenant, usage in _merge(self._client.stats().tenants, self._tenant).items():
            values = (
                usage.requests, usage.prompt_tokens, usage.cached_tokens,
                usage.generation_tokens, usage.queued_s + usage.load_s,
            )  # fmt: skip
            for counter, value in zip(counters.values(), values, strict=True):
                counter.add_metric((tenant,), value)
        yield from counters.values()

    def _residency(self) -> Iterator[Metric]:
        models = [info for info in self._client.models() if info.parent is not None]
        state = GaugeMetricFamily(
            "deltaserve:deltas", "Served deltas by state and tier.", labels=("state", "tier")
        )
        counts: dict[tuple[str, str], int] = {}
        for info in models:
            counts[info.state, info.tier] = counts.get((info.state, info.tier), 0) + 1
        for key, count in counts.items():
            state.add_metric(key, count)
        yield state
        size = GaugeMetricFamily(
            "deltaserve:delta_bytes", "Of a delta in memory.", labels=("delta", "tier")
        )
        for info in models:
            if (name := self._model(info.name)) != OTHER:
                size.add_metric((name, info.tier), info.resident_bytes)
        yield size
        yield from self._tiers()

    def _tiers(self) -> Iterator[Metric]:
        stats = self._client.stats().residency
        for name, text, values in (
            ("tier_bytes", "Taken by deltas.",
             (stats.device_bytes, stats.merged_bytes, stats.host_bytes)),
            ("tier_limit_bytes", "That deltas may take.",
             (stats.device_limit, stats.merged_limit, stats.host_limit)),
        ):  # fmt: skip
            gauge = GaugeMetricFamily(f"deltaserve:{name}", text, labels=("tier",))
            for tier, value in zip(("device", "merged", "host"), values, strict=True):
                gauge.add_metric((tier,), value)
            yield gauge
        counts = (
            ("delta_loads", "Deltas brought to the device.", stats.loads),
            ("delta_load_seconds", "Spent on it.", stats.load_seconds),
            ("delta_evictions", "Deltas that gave way to others.", stats.evictions),
            ("delta_failures", "Deltas that could not be loaded.", stats.failures),
            ("delta_hits", "Requests that found their delta on the device.", stats.hits),
            ("delta_misses", "Requests that had to wait for their delta.", stats.misses),
        )
        for name, text, count in counts:
            counter = CounterMetricFamily(f"deltaserve:{name}", text)
            counter.add_metric((), count)
            yield counter


def _merge(table: dict[str, Usage], capped: Capped) -> dict[str, Usage]:
    """The same with bounded names; those beyond the bound are summed."""
    merged: dict[str, Usage] = {}
    for name, usage in table.items():
        total = merged.setdefault(capped(name), Usage())
        for field in ("requests", "prompt_tokens", "cached_tokens", "generation_tokens",
                      "queued_s", "load_s"):  # fmt: skip
            setattr(total, field, getattr(total, field) + getattr(usage, field))
    return merged
