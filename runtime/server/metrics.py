"""What the server counts, as Prometheus reads it: one registry per server, no global state.

Names and buckets live here; who observes what lives where it happens. Knows nothing of requests' contents.
"""

from __future__ import annotations

from collections.abc import Callable

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Wide enough for a Raspberry Pi that prefills for a minute and for a GPU that decodes in two milliseconds.
_WAIT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """All instruments of one server. Safe to use from several threads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.requests = self._counter("edgelm_http_requests", "Answered HTTP requests", ("route", "status"))
        self.generations = self._counter("edgelm_generations", "Ended generations by reason", ("reason",))
        self.refusals = self._counter("edgelm_refusals", "Requests refused because the queue was full")
        self.prefill_tokens = self._counter("edgelm_prefill_tokens", "Prompt tokens computed, cached ones left out")
        self.cached_tokens = self._counter("edgelm_cached_tokens", "Prompt tokens found in the cache")
        self.decode_tokens = self._counter("edgelm_decode_tokens", "Tokens generated")
        self.ttft_s = self._histogram(
            "edgelm_ttft_seconds", "From the queueing of a request to its first token", _WAIT_BUCKETS_S
        )
        self.inter_token_s = self._histogram(
            "edgelm_inter_token_seconds", "Between two tokens of one request", _TOKEN_BUCKETS_S
        )
        self.queue_wait_s = self._histogram(
            "edgelm_queue_wait_seconds", "From the queueing of a request to its first computation", _WAIT_BUCKETS_S
        )
        self.batch_tokens = self._histogram("edgelm_batch_tokens", "Tokens computed in one engine call", _BATCH_BUCKETS)
        process = psutil.Process()
        self.gauge(
            "edgelm_process_resident_memory_bytes", "Resident memory of the server", lambda: process.memory_info().rss
        )

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for, so that it can never be stale."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """The exposition of everything, for ``/metrics``."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=buckets)
