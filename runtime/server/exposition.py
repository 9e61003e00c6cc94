"""Counters, histograms and gauges in Prometheus' library, and their text.

Knows no names: ``runtime.server.metrics`` says what there is.
"""

from __future__ import annotations

from collections.abc import Callable

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Exposition:
    """One registry, no global state. Safe to use from several threads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        process = psutil.Process()
        self.add_gauge(
            "edgelm_process_resident_memory_bytes", "Resident memory of the server", lambda: process.memory_info().rss
        )

    def add_counter(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        """A counter for every combination of label values."""
        self._counters[name] = Counter(name, text, labels, registry=self._registry)

    def add_histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> None:
        """A histogram with these upper bounds."""
        self._histograms[name] = Histogram(name, text, registry=self._registry, buckets=buckets)

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, text, registry=self._registry).set_function(read)

    def count(self, name: str, labels: tuple[str, ...], value: float) -> None:
        """Add to a counter or histogram. Raises ``ValueError`` for names, labels or values that it does not take."""
        if name in self._counters:
            counter = self._counters[name]
            (counter.labels(*labels) if labels else counter).inc(value)
        elif name in self._histograms and not labels:
            self._histograms[name].observe(value)
        else:
            raise ValueError(f"there is no instrument {name!r} with {len(labels)} labels")

    def text(self) -> bytes:
        """What Prometheus scrapes."""
        return generate_latest(self._registry)
