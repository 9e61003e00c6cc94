"""What the server counts, as Prometheus reads it: one registry per server, no global state.

Names and buckets live here; who observes what lives where it happens. Knows nothing of requests' contents. The engine's
process forwards what it observes and so does not load Prometheus' library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.server.exposition import Exposition

# Wide enough for a Raspberry Pi that prefills for a minute and for a GPU that decodes in two milliseconds.
_WAIT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
# From a large model on a small board to prefill on a GPU.
_RATE_BUCKETS = (0.5, 1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 250, 500, 1000, 2500, 5000)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Observation:
    """One thing that was counted or measured: the instrument's name, its label values and by how much."""

    name: str
    labels: tuple[str, ...]
    value: float


@dataclass(frozen=True, slots=True)
class Gauge:
    """One figure that goes up and down, as it is now. ``labels`` are names and values."""

    name: str
    text: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


class Instrument:
    """A counter or histogram as those see it who observe: where an observation goes is the owner's business."""

    def __init__(self, name: str, record: Callable[[Observation], None], labels: tuple[str, ...] = ()) -> None:
        self.name = name
        self._record = record
        self._labels = labels

    def labels(self, *values: str) -> Instrument:
        """The same instrument for these label values."""
        return Instrument(self.name, self._record, values)

    def inc(self, amount: float = 1.0) -> None:
        """Count ``amount`` more."""
        self._record(Observation(self.name, self._labels, amount))

    def observe(self, value: float) -> None:
        """Add one measured value to the histogram."""
        self._record(Observation(self.name, self._labels, value))


class Metrics:
    """All instruments of one server. Safe to use from several threads.

    With ``forward`` nothing is kept: every observation is handed on, for an engine in a process of its own whose
    server applies them. Counters so outlive an engine that dies.
    """

    def __init__(self, forward: Callable[[Observation], None] | None = None) -> None:
        self._exposition = _exposition() if forward is None else None
        self._record = forward or self.apply
        self.requests = self._counter("edgelm_http_requests", "Answered HTTP requests", ("route", "status"))
        self.generations = self._counter("edgelm_generations", "Ended generations by reason", ("reason",))
        self.refusals = self._counter("edgelm_refusals", "Requests refused before any work, by reason", ("reason",))
        self.engine_starts = self._counter("edgelm_engine_starts", "Starts of the engine")
        self.engine_deaths = self._counter("edgelm_engine_deaths", "Engines that ended without being asked to")
        self.engine_hangs = self._counter("edgelm_engine_hangs", "Engines that stood still and were ended for it")
        self.model_loads = self._counter("edgelm_model_loads", "Loads of one of several models", ("model",))
        self.model_unloads = self._counter("edgelm_model_unloads", "Unloads of one of several models", ("model",))
        self.prefill_tokens = self._counter("edgelm_prefill_tokens", "Prompt tokens computed, cached ones left out")
        self.cached_tokens = self._counter("edgelm_cached_tokens", "Prompt tokens found in the cache")
        self.prompt_files = self._counter(
            "edgelm_prompt_files", "Files of the prompt cache by what became of them", ("event",)
        )
        self.decode_tokens = self._counter("edgelm_decode_tokens", "Tokens generated")
        self.drafted_tokens = self._counter("edgelm_drafted_tokens", "Guessed tokens that were checked")
        self.accepted_tokens = self._counter("edgelm_accepted_tokens", "Guessed tokens that were right")
        self.ttft_s = self._histogram(
            "edgelm_ttft_seconds", "From the queueing of a request to its first token", _WAIT_BUCKETS_S
        )
        self.inter_token_s = self._histogram(
            "edgelm_inter_token_seconds", "Between two tokens of one request", _TOKEN_BUCKETS_S
        )
        self.queue_wait_s = self._histogram(
            "edgelm_queue_wait_seconds", "From the queueing of a request to its first computation", _WAIT_BUCKETS_S
        )
        self.prefill_rate = self._histogram(
            "edgelm_prefill_tokens_per_second",
            "Prompt tokens computed per second of one request's prefill",
            _RATE_BUCKETS,
        )
        self.decode_rate = self._histogram(
            "edgelm_decode_tokens_per_second", "Tokens per second of one request after its first", _RATE_BUCKETS
        )
        self.batch_requests = self._histogram(
            "edgelm_batch_requests", "Requests that shared one engine call", _BATCH_BUCKETS
        )
        self.batch_tokens = self._histogram("edgelm_batch_tokens", "Tokens computed in one engine call", _BATCH_BUCKETS)

    def gauges(self, read: Callable[[], Iterable[Gauge]]) -> None:
        """Gauges that are read when they are asked for, so that they can never be stale; what is not known is left
        out."""
        if self._exposition is not None:
            self._exposition.add_gauges(read)

    def total(self, counter: Instrument) -> float:
        """What a counter has come to, over all its labels; 0 where nothing is kept."""
        return 0.0 if self._exposition is None else self._exposition.total(counter.name)

    def apply(self, observation: Observation) -> None:
        """Count one observation. Raises ``ValueError`` when it is of no instrument of this server."""
        if self._exposition is not None:
            self._exposition.count(observation.name, observation.labels, observation.value)

    def text(self) -> bytes:
        """The exposition of everything, for ``/metrics``."""
        return b"" if self._exposition is None else self._exposition.text()

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Instrument:
        if self._exposition is not None:
            self._exposition.add_counter(name, text, labels)
        return Instrument(name, self._record)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Instrument:
        if self._exposition is not None:
            self._exposition.add_histogram(name, text, buckets)
        return Instrument(name, self._record)


def _exposition() -> Exposition:
    from runtime.server.exposition import Exposition

    return Exposition()
