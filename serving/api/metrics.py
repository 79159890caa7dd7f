"""Prometheus metrics, under vLLM's names where it has one, with `halfmoon:` before them."""

import collections
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.api.streams import TokenStream
from serving.engine.types import EngineStats
from serving.workload.outcomes import tbt_s

_PREFIX = "halfmoon:"
_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_GAP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKEN_BUCKETS = tuple(2**power for power in range(18))


class ServerMetrics:
    """An `Observer` of a `Backend`: histograms of requests and the engine's statistics, in a registry of its own."""

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self._engine = _EngineCollector(model_name, max_model_len)
        self._registry = CollectorRegistry()
        self._registry.register(self._engine)
        self._recent_s: collections.deque[float] = collections.deque(maxlen=64)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(_PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry)
            return metric.labels(model_name)

        self._ttft = histogram("time_to_first_token_seconds", "From submission to the first token.", _TTFT_BUCKETS)
        self._gap = histogram("inter_token_latency_seconds", "Between consecutive tokens of a request.", _GAP_BUCKETS)
        self._tbt = histogram(
            "request_tbt_seconds", "TBT of a request: mean of its longest 10 % of inter-token gaps.", _GAP_BUCKETS
        )
        self._latency = histogram("e2e_request_latency_seconds", "From submission to the end.", _REQUEST_BUCKETS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of the prompt.", _TOKEN_BUCKETS)
        self._generated = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKEN_BUCKETS)
        self._ended = Counter(
            f"{_PREFIX}request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._model_name = model_name

    def stepped(self, stats: EngineStats) -> None:
        """Keeps the engine's statistics after a step."""
        self._engine.stats = stats

    def token(self, stream: TokenStream) -> None:
        """Observes the latest token of `stream`."""
        times = stream.times
        if times.gaps_s:
            self._gap.observe(times.gaps_s[-1])
        elif times.first_s is not None:
            self._ttft.observe(times.first_s - stream.submission.submitted_s)

    def ended(self, stream: TokenStream) -> None:
        """Counts `stream`, which has finished or was aborted; observes the latencies of its answer if it finished."""
        self._ended.labels(self._model_name, stream.finish_reason or "abort").inc()
        if stream.finish_reason not in ("stop", "length") or stream.times.first_s is None:
            return
        gaps_s = stream.times.gaps_s[: stream.answered_tokens - 1]
        latency_s = stream.times.first_s + sum(gaps_s) - stream.submission.submitted_s
        self._recent_s.append(latency_s)
        self._latency.observe(latency_s)
        self._prompt.observe(len(stream.request.prompt))
        self._generated.observe(stream.answered_tokens)
        if (tbt := tbt_s(gaps_s)) is not None:
            self._tbt.observe(tbt)

    def seconds_until_a_place(self) -> float:
        """Predicts seconds until a running request ends, from the latest 64 latencies; sent as `Retry-After`."""
        if not self._recent_s:
            return 1.0
        mean_s = sum(self._recent_s) / len(self._recent_s)
        return min(60.0, mean_s / max(1, self._engine.stats.running))

    def exposition(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Exports the engine's statistics after its latest step."""

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self._model_name = model_name
        self._max_model_len = max_model_len
        self.stats = EngineStats()

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        cached = stats.pages_cached / stats.pages_total if stats.pages_total else 0.0
        for name, text, value in (
            ("num_requests_running", "Requests that are being computed.", stats.running),
            ("num_requests_waiting", "Requests that wait to be admitted.", stats.waiting),
            ("kv_cache_usage_perc", "Share of KV pages held by requests, 0 to 1.", used),
            ("kv_cache_reusable_perc", "Share of KV pages kept for reuse that no request holds, 0 to 1.", cached),
            ("max_model_len", "Most tokens of one request, prompt and output.", self._max_model_len),
        ):
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens whose KV came from the prefix cache.", stats.prefix_hit_tokens),
            (
                "num_preemptions",
                "Preemptions: a request lost its pages to others and is computed again.",
                stats.preemptions,
            ),
            ("engine_steps", "Steps of the engine.", stats.steps),
            (
                "compiles_after_warm_up",
                "Compilations while serving; 0 unless a shape escaped warm-up.",
                stats.compiles_after_warm_up,
            ),
        ):
            counter = CounterMetricFamily(_PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
