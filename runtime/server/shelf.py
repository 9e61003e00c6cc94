"""Several models behind one server: loaded when they are asked for, unloaded by age and when memory is needed.

A model's name is looked up among those that were given at the start and nowhere else, so no name reaches the file
system. Never more is loaded than fits: what a model is predicted to take is compared with what is free now. Knows
backends by what all have in common; nothing of HTTP, engines or requests' contents.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgelm.bundle import Manifest
from edgelm.errors import DoesNotFitError, EdgelmError, EngineError
from edgelm.units import format_bytes
from runtime.gpu_memory import VramUse
from runtime.server.figures import Shown
from runtime.server.logs import log_event
from runtime.server.metrics import Gauge, Metrics
from runtime.server.worker import KvUse, LoopReader, NotReadyError, State

LOAD_LIMIT_S = 900.0
_POLL_S = 0.02
_LONGEST_NAP_S = 5.0


class Servant(Shown, Protocol):
    """What the shelf needs of a backend, whatever it computes."""

    @property
    def failure(self) -> EdgelmError | None: ...
    def start(self) -> None: ...
    def abort(self, message: str) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Title:
    """One model that can be served. ``open`` makes its backend, which raises ``EdgelmError``; ``needs`` predicts the
    bytes that it will take, ``mapped_bytes`` are those of its file, which count as free memory while they are used."""

    name: str
    manifest: Manifest | None
    mapped_bytes: int
    needs: Callable[[], int]
    open: Callable[[], Servant]


class Book:
    """A title and what is loaded of it. Everything but the title belongs to the shelf and its lock."""

    def __init__(self, title: Title) -> None:
        self.title = title
        self.servant: Servant | None = None
        self.loading = False
        self.attempts = 0
        """How often loading has come to an end, well or not."""
        self.error: EdgelmError | None = None
        self.users = 0
        self.used_s = 0.0
        self.needed_bytes = 0

    @property
    def state(self) -> str:
        """``unloaded``, ``loading``, or the state of its engine."""
        servant = self.servant
        if servant is not None:
            return servant.state
        return "loading" if self.loading else "unloaded"


class Shelf:
    """All models of a server. ``free`` tells bytes that can be taken now; ``unload_after_s`` None keeps what is loaded.

    The first title is loaded at the start: the server is ready when it is. ``on_refusal`` is called once when that
    fails; ``failure`` then tells why. ``on_unload`` is called with the name of a model that is let go of.
    """

    def __init__(
        self,
        titles: Sequence[Title],
        metrics: Metrics,
        free: Callable[[], int],
        *,
        unload_after_s: float | None = None,
    ) -> None:
        self.books = {title.name: Book(title) for title in titles}
        self.first = self.books[titles[0].name]
        self._metrics = metrics
        self._free = free
        self._unload_after_s = unload_after_s
        self._lock = threading.Lock()
        self._one_load = threading.Lock()
        self._stopping = threading.Event()
        self._opened = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.on_refusal: Callable[[], None] = lambda: None
        self.on_unload: Callable[[str], object] = lambda name: None
        self._reaper = threading.Thread(target=self._reap, name="unload", daemon=True)
        metrics.gauges(self._gauges)

    @property
    def state(self) -> State:
        """``starting`` until the first model answers; then that of the loaded engine that is worst off, and ``ready``
        without any, since one is loaded when it is needed."""
        if self._stopping.is_set():
            return "stopped"
        if self.failure is not None:
            return "failed"
        if not self._opened:
            return "starting"
        return "restarting" if "restarting" in [servant.state for servant in self._servants()] else "ready"

    @property
    def failure(self) -> EdgelmError | None:
        return None if self._opened else self.first.error

    @property
    def running(self) -> int:
        return sum(servant.running for servant in self._servants())

    @property
    def queued(self) -> int:
        return sum(servant.queued for servant in self._servants())

    @property
    def kv(self) -> KvUse | None:
        used = [kv for servant in self._servants() if (kv := servant.kv) is not None]
        if not used:
            return None
        return KvUse(
            sum(kv.tokens for kv in used), sum(kv.capacity_tokens for kv in used), sum(kv.reserved_bytes for kv in used)
        )

    @property
    def engine_pids(self) -> tuple[int, ...]:
        return tuple(pid for servant in self._servants() for pid in servant.engine_pids)

    def vram(self) -> tuple[VramUse, ...]:
        """What all loaded models have on GPUs."""
        return tuple(use for servant in self._servants() for use in servant.vram())

    def start(self) -> None:
        """Begin to load the first model."""
        with self._lock:
            self._begin(self.first)
        self._reaper.start()

    def lend(self, loop: asyncio.AbstractEventLoop) -> None:
        """See ``LoopReader``: for every model that is loaded, now and later."""
        with self._lock:
            self._loop = loop
            for servant in self._servants():
                _lend(servant, loop)

    def take(self, book: Book) -> Servant | None:
        """The model's backend when it is loaded, to be given back by ``give_back``; None while it is loaded in the
        background, which this begins. Never blocks. Raises ``NotReadyError`` when the server is stopping."""
        with self._lock:
            if self._stopping.is_set():
                raise NotReadyError("the server is stopping")
            servant = book.servant
            if servant is not None and servant.state not in {"failed", "stopped"}:
                book.users += 1
                return servant
            if not book.loading:
                self._begin(book)
            return None

    def give_back(self, book: Book) -> None:
        """A request is done with a model."""
        with self._lock:
            book.users -= 1
            book.used_s = time.monotonic()

    def abort(self, message: str) -> None:
        """Fail everything that runs or waits."""
        for servant in self._servants():
            servant.abort(message)

    def stop(self) -> None:
        """Unload everything; waits for loads under way to end."""
        failed = self.failure is not None
        if not failed:
            self._stopping.set()
        with self._one_load:
            for book in self.books.values():
                self._unload(book, "the server stops")
        self._stopping.set()
        if self._reaper.ident is not None:
            self._reaper.join()

    def _servants(self) -> list[Servant]:
        return [servant for book in self.books.values() if (servant := book.servant) is not None]

    def _begin(self, book: Book) -> None:
        """Under the lock."""
        book.loading = True
        threading.Thread(target=self._load, args=(book,), name="load", daemon=True).start()

    def _load(self, book: Book) -> None:
        """One after the other, so that each finds the memory that the one before has left."""
        servant: Servant | None = None
        error: EdgelmError | None = None
        with self._one_load:
            try:
                self._unload(book, "its engine has failed")
                self._make_room(book)
                servant = self._open(book)
            except EdgelmError as refused:
                error = refused
                facts = {"model": book.title.name, "reason": refused.message}
                log_event("model not loaded", facts, level=logging.WARNING)
            with self._lock:
                book.servant, book.error, book.used_s = servant, error, time.monotonic()
                if servant is not None and self._loop is not None:
                    _lend(servant, self._loop)
                book.loading = False
                book.attempts += 1
                self._opened = self._opened or (book is self.first and error is None)
        if error is None:
            self._metrics.model_loads.labels(book.title.name).inc()
        elif self.failure is not None and not self._stopping.is_set():
            self.on_refusal()

    def _open(self, book: Book) -> Servant:
        """A backend that answers. Raises ``EdgelmError``."""
        if self._stopping.is_set():
            raise NotReadyError("the server is stopping")
        servant = book.title.open()
        servant.start()
        deadline = time.monotonic() + LOAD_LIMIT_S
        while servant.state in {"starting", "restarting"}:
            if self._stopping.wait(_POLL_S) or time.monotonic() > deadline:
                servant.stop()
                raise EngineError(f"{book.title.name} was not ready within {LOAD_LIMIT_S:g} s")
        if servant.state != "ready":
            servant.stop()
            raise servant.failure or EngineError(f"{book.title.name} cannot be loaded", hint="the log says why")
        return servant

    def _make_room(self, book: Book) -> None:
        """Unload what is not in use, the longest unused first, until the model fits. Raises ``DoesNotFitError``,
        before anything is unloaded when that would not be enough."""
        needed = book.title.needs()
        book.needed_bytes = needed
        with self._lock:
            loaded = [other for other in self.books.values() if other.servant is not None]
            idle = sorted((other for other in loaded if other.users == 0), key=lambda other: other.used_s)
        room = self._room()
        if needed > room + sum(other.needed_bytes for other in idle):
            busy = [other.title.name for other in loaded if other.users]
            raise DoesNotFitError(
                f"{book.title.name} needs {format_bytes(needed)}, {format_bytes(max(room, 0))} can be used"
                + (f" while {', '.join(busy)} is in use" if busy else ""),
                hint="try again later" if busy else "use a shorter context, a smaller model or free memory",
            )
        for other in idle:
            if needed <= self._room():
                return
            self._unload(other, f"{book.title.name} needs its memory")
        if needed > self._room():
            raise DoesNotFitError(
                f"{book.title.name} needs {format_bytes(needed)}, {format_bytes(max(self._room(), 0))} can be used"
            )

    def _room(self) -> int:
        """Bytes that one more model can take: pages of mapped files count as free although they are in use."""
        mapped = sum(book.title.mapped_bytes for book in self.books.values() if book.servant is not None)
        return self._free() - mapped

    def _unload(self, book: Book, reason: str) -> None:
        """Unless somebody uses it; what has failed goes in any case, and everything at the end."""
        with self._lock:
            servant = book.servant
            dead = self._stopping.is_set() or (servant is not None and servant.state in {"failed", "stopped"})
            if servant is None or (book.users and not dead):
                return
            book.servant = None
        self.on_unload(book.title.name)
        servant.stop()
        self._metrics.model_unloads.labels(book.title.name).inc()
        log_event("model unloaded", {"model": book.title.name, "reason": reason})

    def _reap(self) -> None:
        """Unload what nobody has used for long enough."""
        limit_s = self._unload_after_s
        if limit_s is None:
            return
        while not self._stopping.wait(min(limit_s / 4, _LONGEST_NAP_S)):
            for book in self.books.values():
                if book.servant is not None and not book.users and time.monotonic() - book.used_s >= limit_s:
                    self._unload(book, f"unused for {limit_s:g} s")

    def _gauges(self) -> Iterator[Gauge]:
        for name, book in self.books.items():
            loaded = book.servant is not None
            yield Gauge("edgelm_model_loaded", "1 while a model is in memory", loaded, (("model", name),))


def _lend(servant: Servant, loop: asyncio.AbstractEventLoop) -> None:
    if isinstance(servant, LoopReader):
        servant.lend(loop)
