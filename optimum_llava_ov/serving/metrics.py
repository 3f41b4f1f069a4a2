"""What `/metrics` tells. No metric has contents of requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric


PREFIX = "llava_ov"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class State(Protocol):
    """The present state of a model, by the names of metrics."""

    def gauges(self) -> Mapping[str, float]: ...


GAUGES = {
    "requests_running": "Requests whose answers are computed.",
    "requests_waiting": "Requests in the queue.",
    "batch_requests": "Requests in the engine's batch.",
    "cache_usage_ratio": "Used share of the allocated cache.",
    "cache_bytes": "Allocated cache.",
    "image_cache_hits": "Images that were found in the cache.",
    "image_cache_misses": "Images that were prepared.",
}


class _Gauges:
    """Ask each model when somebody reads the metrics."""

    def __init__(self, models: Mapping[str, State]):
        self._models = models

    def collect(self) -> Iterator[Metric]:
        states = {name: model.gauges() for name, model in self._models.items()}
        for gauge, description in GAUGES.items():
            family = GaugeMetricFamily(f"{PREFIX}_{gauge}", description, labels=["model"])
            for model, values in states.items():
                family.add_metric([model], values[gauge])
            yield family

    def describe(self) -> Iterable[Metric]:
        return []


class Metrics:
    """Count requests and tokens, and measure times.

    Args:
        models: The models by name.
    """

    def __init__(self, models: Mapping[str, State]):
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(models))
        self.requests = self._counter("requests", "Requests by status.", "path", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, with image tokens.", "model")
        self.generated_tokens = self._counter("generated_tokens", "Tokens of answers.", "model")
        self.cancelled = self._counter("cancelled_requests", "Requests whose client went away.", "model")
        self.first_token = self._histogram("first_token_seconds", "From the request to its first token.", _SECONDS)
        self.per_token = self._histogram("per_token_seconds", "Mean time of a token after the first.", _TOKEN_SECONDS)
        self.seconds = self._histogram("request_seconds", "From the request to its last token.", _SECONDS)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", description, labels, registry=self.registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", description, ["model"], buckets=buckets, registry=self.registry)
