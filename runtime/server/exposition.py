"""Counters, histograms and gauges in Prometheus' library, and their text.

Knows no names: ``runtime.server.metrics`` says what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from runtime.server.metrics import Gauge

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Gauges(Collector):
    """Asks whenever Prometheus does."""

    def __init__(self, read: Callable[[], Iterable[Gauge]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}
        for gauge in self._read():
            labels = [name for name, _ in gauge.labels]
            family = families.setdefault(gauge.name, GaugeMetricFamily(gauge.name, gauge.text, labels=labels))
            family.add_metric([value for _, value in gauge.labels], gauge.value)
        yield from families.values()

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing is promised beforehand: what there is depends on what is known."""
        return iter(())


class Exposition:
    """One registry, no global state. Safe to use from several threads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}

    def add_counter(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        """A counter for every combination of label values."""
        self._counters[name] = Counter(name, text, labels, registry=self._registry)

    def add_histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> None:
        """A histogram with these upper bounds."""
        self._histograms[name] = Histogram(name, text, registry=self._registry, buckets=buckets)

    def add_gauges(self, read: Callable[[], Iterable[Gauge]]) -> None:
        """Gauges that are read when they are asked for; those of one name follow one another."""
        self._registry.register(_Gauges(read))

    def total(self, name: str) -> float:
        """The sum of a counter over all its label values."""
        samples = [sample for family in self._counters[name].collect() for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name.endswith("_total"))

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
