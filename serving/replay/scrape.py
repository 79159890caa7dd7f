"""A server's metrics, under any prefix of their names: `halfmoon:`, `vllm:` or another."""

import dataclasses
import math

from prometheus_client.parser import text_string_to_metric_families


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerCounters:
    """Sums over all models and engines of a server; `None` where the server does not report a metric.

    Attributes:
        running, waiting: requests in the engine now.
        kv_usage: share of KV memory held by requests, 0 to 1; the highest of all engines.
        preemptions, compiles, steps: counts since the server started; `compiles` after warm-up only.
    """

    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    preemptions: float | None = None
    compiles: float | None = None
    steps: float | None = None

    @classmethod
    def parse(cls, exposition: str) -> "ServerCounters":
        """Parses Prometheus' text format. Raises ValueError for anything else."""
        samples: dict[str, list[float]] = {}
        for family in text_string_to_metric_families(exposition):
            for sample in family.samples:
                if math.isfinite(sample.value):
                    samples.setdefault(sample.name.rpartition(":")[2], []).append(sample.value)

        def total(name: str) -> float | None:
            return sum(samples[name]) if name in samples else None

        return cls(
            running=total("num_requests_running"),
            waiting=total("num_requests_waiting"),
            kv_usage=max(samples.get("kv_cache_usage_perc", [0.0])) if "kv_cache_usage_perc" in samples else None,
            preemptions=total("num_preemptions_total"),
            compiles=total("compiles_after_warm_up_total"),
            steps=total("engine_steps_total"),
        )

    def since(self, earlier: "ServerCounters") -> "ServerCounters":
        """Returns the gauges of `self`, and the counters of `self` less those of `earlier`."""

        def difference(now: float | None, before: float | None) -> float | None:
            return None if now is None or before is None else now - before

        return dataclasses.replace(
            self,
            preemptions=difference(self.preemptions, earlier.preemptions),
            compiles=difference(self.compiles, earlier.compiles),
            steps=difference(self.steps, earlier.steps),
        )
