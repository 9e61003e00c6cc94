"""The points of a benchmark's sweep, measured in turns on a loaded engine until they are tight or time is up.

Prompts are random but fixed tokens, as in llama-bench: speed does not depend on what a text says. With speculative
decoding it does, so that decoding then continues a fixed text that quotes itself. Single sequences go
through ``generate()``, so a figure is what a user gets; several sequences take the scheduler's step, one ``forward``
for all. Every repetition is bracketed by readings of the sensors. Knows nothing of reports and files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from edgelm.progress import Stage
from edgelm.report import Measurement, SustainedPoint, SustainedRecord
from runtime.conditions import Window, labels_of, merged, power_w, unsteady, usable_cpus
from runtime.engine import Chunk, Engine
from runtime.generate import GenerationRequest, Session, TokenEvent, generate
from runtime.sensors import Reading, Sampler
from runtime.speculative import Speculation
from runtime.tokenizer import TextTokenizer
from targets.significance import median_interval, summarise

SEED = 0
AUTO_LEAST, AUTO_MOST = 5, 100  # repetitions when the precision decides
PRECISION = 0.02  # half the width of the median's 95 % interval, relative to it
_WARM_TOKENS = 8
GUESSED_DEPTH = 128
"""Least tokens of text before what is decoded with guesses: without a text there is nothing to guess from."""
_QUOTED = (
    "The harbour of Lindholm was built in 1883 by the engineer Karla Brandt. It has three docks, and the longest of "
    "them measures 240 metres. Today the harbour employs 410 people and handles 96,000 containers a year.\n\n"
)
SUSTAINED_POINTS = 600  # at most in one long run

StoppedBy = Literal["count", "precision", "time", "interrupt"]


@dataclass(frozen=True, slots=True)
class Point:
    """What to measure: ``tokens`` per sequence behind ``depth`` tokens that are in the cache already."""

    kind: Literal["prefill", "decode"]
    tokens: int
    depth: int = 0
    sequences: int = 1

    @property
    def name(self) -> str:
        """As llama-bench names its tests: ``pp512``, ``tg128 @ d2048``; ``x4`` for four sequences."""
        several = f" x{self.sequences}" if self.sequences > 1 else ""
        behind = f" @ d{self.depth}" if self.depth else ""
        return f"{'pp' if self.kind == 'prefill' else 'tg'}{self.tokens}{several}{behind}"


@dataclass(slots=True)
class Taken:
    """Samples of one point so far, with the readings around each."""

    point: Point
    tps: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    pieces: list[list[Reading]] = field(default_factory=list)
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None

    @property
    def tight(self) -> bool:
        """Whether the median is known well enough."""
        interval = median_interval(self.tps)
        if interval is None or len(self.tps) < AUTO_LEAST:
            return False
        return (interval[1] - interval[0]) / 2 <= PRECISION * float(np.median(self.tps))


@dataclass(frozen=True, slots=True)
class Until:
    """When to stop: after ``repetitions`` (0: when all points are tight), and at ``deadline_s`` of perf_counter."""

    repetitions: int
    deadline_s: float | None = None


class Runner:
    """Measures points on one loaded engine."""

    def __init__(
        self, engine: Engine, tokenizer: TextTokenizer, sampler: Sampler, speculation: Speculation | None = None
    ) -> None:
        self.engine = engine
        self.speculation = speculation
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._session = Session(engine)
        self._random = np.random.default_rng(SEED)
        self._tokens: list[int] = []

    def run(self, points: Sequence[Point], until: Until, stage: Stage | None = None) -> tuple[list[Taken], StoppedBy]:
        """Rounds over all points after one that is not counted; Ctrl-C ends them and keeps what there is.

        Points take turns, so that a machine that slows down shows in all of them.
        """
        taken = [Taken(point) for point in points]
        try:
            for point in points:
                self.warm(point)
                _advance(stage)
            rounds = until.repetitions or AUTO_MOST
            for number in range(rounds):
                for item in taken:
                    self.once(item)
                    _advance(stage)
                if until.deadline_s is not None and time.perf_counter() >= until.deadline_s and number + 1 < rounds:
                    return taken, "time"
                if until.repetitions == 0 and all(item.tight for item in taken):
                    return taken, "precision"
        except KeyboardInterrupt:
            return taken, "interrupt"
        return taken, "count"

    def warm(self, point: Point) -> None:
        """One pass that is not counted; decoding needs only a few tokens of it."""
        if point.kind == "prefill":
            self._prefill(point)
        else:
            self._decode(point, min(point.tokens, _WARM_TOKENS))

    def once(self, item: Taken) -> None:
        """One counted repetition."""
        point = item.point
        if point.kind == "prefill":
            first, piece = self._prefill(point)
            if first.prefill_s:
                item.tps.append(point.tokens / first.prefill_s)
                item.ttft_s.append(first.elapsed_s)
        else:
            seconds, piece = self._decode(point, point.tokens, item)
            item.tps.append(point.sequences * point.tokens / seconds)
        item.pieces.append(piece)

    def stream(self, seconds: float, window_s: float, generated: int) -> Iterator[tuple[float, int, float, Reading]]:
        """Decode until ``seconds`` are over: (time since the start, tokens, seconds they took, reading) per window.

        Prompts between two generations are left out of the seconds that tokens took.
        """
        began = time.perf_counter()
        tokens, took_s = 0, 0.0
        while True:
            last_s: float | None = None
            request = GenerationRequest(self._behind(0), generated + 1)
            for event in generate(self._session, self._tokenizer, request, speculation=self.speculation):
                now = time.perf_counter()
                if last_s is not None:
                    tokens, took_s = tokens + 1, took_s + now - last_s
                if took_s >= window_s or (now - began >= seconds and tokens):
                    yield now - began, tokens, took_s, self._sampler.mark()
                    tokens, took_s = 0, 0.0
                if now - began >= seconds:
                    return
                last_s = time.perf_counter() if event.finish_reason is None else None

    def first_token_s(self, tokens: int) -> float:
        """Seconds to the first token of a prompt, caches as they are."""
        self._clear()
        request = GenerationRequest(self._fixed(tokens), 1)
        return next(iter(generate(self._session, self._tokenizer, request))).elapsed_s

    def _prefill(self, point: Point) -> tuple[TokenEvent, list[Reading]]:
        """The first event after computing the prompt behind ``depth`` tokens, which are not timed."""
        self._clear()
        behind = self._fixed(point.depth)
        if behind:
            for _ in generate(self._session, self._tokenizer, GenerationRequest(behind, 1)):
                pass
        # Other tokens than those of the depth, so that not one of them is found in the cache.
        prompt = [*behind, *self._fixed(point.depth + point.tokens)[point.depth :]]
        start = self._sampler.mark()
        event = next(iter(generate(self._session, self._tokenizer, GenerationRequest(prompt, 1))))
        return event, self._sampler.between(start, self._sampler.mark())

    def _decode(self, point: Point, count: int, item: Taken | None = None) -> tuple[float, list[Reading]]:
        """Seconds for ``count`` tokens per sequence after the first one, which belongs to the prompt.

        ``item`` counts the guesses of speculative decoding.
        """
        prompt = self._fixed(max(point.depth, 1))
        if point.sequences > 1:
            return self._decode_together(prompt, point.sequences, count)
        request = GenerationRequest(self._behind(point.depth), max_tokens=count + 1)
        events = generate(self._session, self._tokenizer, request, speculation=self.speculation)
        last = next(events)
        start = self._sampler.mark()
        started_s = time.perf_counter()
        for event in events:
            last = event
        seconds = time.perf_counter() - started_s
        if item is not None and self.speculation is not None:
            item.drafted_tokens = (item.drafted_tokens or 0) + last.drafted_tokens
            item.accepted_tokens = (item.accepted_tokens or 0) + last.accepted_tokens
        return seconds, self._sampler.between(start, self._sampler.mark())

    def _decode_together(self, prompt: list[int], sequences: int, count: int) -> tuple[float, list[Reading]]:
        engine = self.engine
        self._clear()
        tokens = []
        for sequence in range(sequences):
            engine.truncate(0, sequence)
            logits = engine.forward([Chunk(sequence, prompt)])
            tokens.append(int(logits[-1].argmax()))
        start = self._sampler.mark()
        started_s = time.perf_counter()
        for _ in range(count):
            logits = engine.forward([Chunk(sequence, [token]) for sequence, token in enumerate(tokens)])
            tokens = [int(token) for token in logits.argmax(axis=1)]
        seconds = time.perf_counter() - started_s
        end = self._sampler.mark()
        for sequence in range(sequences):
            engine.truncate(0, sequence)
        return seconds, self._sampler.between(start, end)

    def _fixed(self, count: int) -> list[int]:
        """The first ``count`` of the random tokens, the same ones every time."""
        have = self._tokens
        if len(have) < count:
            have += self._random.integers(0, self.engine.info.vocabulary, count - len(have)).tolist()
        return have[:count]

    def _behind(self, depth: int) -> list[int]:
        """What decoding goes on from: random tokens, or for guesses a text that quotes itself."""
        if self.speculation is None:
            return self._fixed(max(depth, 1))
        tokens = self._tokenizer.encode(_QUOTED, special=False)
        count = max(depth, GUESSED_DEPTH)
        return (tokens * (count // len(tokens) + 1))[-count:]

    def _clear(self) -> None:
        self.engine.truncate(0, self._session.sequence)
        self._session.tokens.clear()


def _advance(stage: Stage | None) -> None:
    if stage is not None:
        stage.advance()


def measurement(item: Taken, threads: int, origin_s: float) -> Measurement | None:
    """A point as a report keeps it, labelled; None when no repetition was completed."""
    tps = summarise(item.tps)
    if tps is None:
        return None
    window = Window(item.pieces, threads, usable_cpus())
    point = item.point
    return Measurement(
        kind=point.kind,
        tokens=point.tokens,
        depth=point.depth,
        sequences=point.sequences,
        threads=threads,
        tps=tps,
        ttft_s=summarise(item.ttft_s),
        started_s=item.pieces[0][0].at_s - origin_s,
        seconds=window.seconds,
        power_w=power_w(window),
        labels=merged([labels_of(window), unsteady(point.name, tps)]),
        drafted_tokens=item.drafted_tokens,
        accepted_tokens=item.accepted_tokens,
    )


def sustained(runner: Runner, seconds: float, generated: int, stage: Stage | None = None) -> SustainedRecord | None:
    """Decode for ``seconds``, in generations of ``generated`` tokens; a point about every second.

    Ctrl-C ends it early. None when not even one point was reached.
    """
    points: list[SustainedPoint] = []
    window_s = max(1.0, seconds / SUSTAINED_POINTS)
    began = time.perf_counter()
    try:
        for at_s, tokens, took_s, reading in runner.stream(seconds, window_s, generated):
            throttled = reading.throttle.now if reading.throttle else ()
            points.append(
                SustainedPoint(
                    at_s=at_s,
                    decode_tps=tokens / took_s,
                    temperature_c=reading.temperature_c,
                    clock_mhz=reading.clock_mhz,
                    throttled=throttled,
                )
            )
            _advance(stage)
    except KeyboardInterrupt:
        pass
    if not points:
        return None
    tenth = max(len(points) // 10, 1)
    first = float(np.median([point.decode_tps for point in points[:tenth]]))
    last = float(np.median([point.decode_tps for point in points[-tenth:]]))
    return SustainedRecord(
        seconds=time.perf_counter() - began,
        points=tuple(points),
        first_tps=first,
        last_tps=last,
        change=last / first - 1,
    )
