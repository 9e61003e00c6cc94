"""The engine's one owner: a thread with a bounded queue in front of a scheduler.

The HTTP side submits token ids and gets token events back through a callback; it never touches the engine. Knows
nothing of HTTP or of texts' meaning. A worker in another process can take this one's place: everything that crosses
the border is a small frozen value.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import numpy as np

from edgelm.errors import EdgelmError, EngineError
from runtime.engine import Chunk, Engine, EngineInterruptedError
from runtime.generate import GenerationRequest, TokenEvent
from runtime.server.logs import log_event
from runtime.server.metrics import Metrics
from runtime.server.scheduler import Failure, Job, JobEvent, Scheduler
from runtime.tokenizer import TextTokenizer

State = Literal["starting", "ready", "failed", "stopped"]
RETRY_AFTER_LIMIT_S = 60


class QueueFullError(EdgelmError):
    """All sequences are busy and the queue is full; ``retry_after_s`` is when a place is likely to be free."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the server is busy and its queue is full", hint=f"try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class NotReadyError(EdgelmError):
    """The engine is not there: it is still starting, it failed, or the server is stopping."""


class Worker:
    """Owns an engine from ``start`` to ``stop``. All methods may be called from any thread."""

    def __init__(self, engine: Engine, tokenizer: TextTokenizer, metrics: Metrics, *, queue_limit: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._scheduler = Scheduler(engine, tokenizer, metrics)
        self._queue: deque[Job] = deque()
        self._queue_limit = queue_limit
        self._changed = threading.Condition()
        self._state: State = "starting"
        self._stopping = False
        self._abort_message: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.gauge("edgelm_requests_running", "Generations under way", lambda: self.running)
        metrics.gauge("edgelm_requests_queued", "Requests waiting for a sequence", lambda: self.queued)
        metrics.gauge("edgelm_engine_ready", "1 when the engine answers", lambda: self.state == "ready")

    @property
    def state(self) -> State:
        """``ready`` only after the engine computed a first token and as long as it works."""
        return self._state

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def queued(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        """Start the thread; it computes one token before anything else."""
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Callable[[JobEvent], None]) -> Job:
        """Queue a generation. ``deliver`` gets its events in the engine's thread; the last one has a finish reason.

        Raises ``QueueFullError`` and ``NotReadyError``.
        """
        with self._changed:
            if self._state in {"failed", "stopped"} or self._stopping:
                raise NotReadyError("the engine is not running")
            free = self._engine.info.sequences - self._scheduler.running
            if len(self._queue) >= self._queue_limit + max(free, 0):
                self._metrics.refusals.inc()
                raise QueueFullError(self._retry_after_s())
            job = Job(request, deliver)
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """End a job before its next token. Cancelling a job that has ended does nothing."""
        with self._changed:
            job.cancelled = True
            if job not in self._queue:
                # Alone, a long prompt is not even finished. With others the step is short and theirs too.
                if self._scheduler.runs_only(job):
                    self._engine.interrupt()
                return
            self._queue.remove(job)
        self._end_queued(job)

    def abort(self, message: str) -> None:
        """Fail every job, running or queued, with ``message``; used when a drain takes too long."""
        with self._changed:
            self._abort_message = message
            self._changed.notify_all()

    def stop(self) -> None:
        """Finish what was submitted, free the engine and wait until that is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _retry_after_s(self) -> int:
        wait_s = self._scheduler.mean_job_s * (len(self._queue) + 1) / self._engine.info.sequences
        return max(1, min(RETRY_AFTER_LIMIT_S, math.ceil(wait_s)))

    def _run(self) -> None:
        try:
            self._compute_one_token()
            self._state = "ready"
            info = self._engine.info
            log_event("ready", {"model": info.model_name, "load_s": round(info.load_s, 3)})
            while self._wait_for_work():
                self._step()
        except EngineError as error:
            log_event("engine failed", {"reason": error.message}, level=logging.ERROR)
        finally:
            # Reached by an unexpected exception too: then nobody else would ever answer the clients that wait.
            with self._changed:
                self._state = "stopped" if self._stopping and self._state == "ready" else "failed"
            self._fail_all("the engine failed")
            self._engine.close()

    def _wait_for_work(self) -> bool:
        """Block until there is something to compute and admit what fits; False when the worker is to end."""
        with self._changed:
            while not (self._queue or self._scheduler.running or self._stopping or self._abort_message):
                self._changed.wait()
            while self._queue and self._scheduler.has_room:
                self._scheduler.admit(self._queue.popleft())
            message, self._abort_message = self._abort_message, None
        if message is not None:
            self._fail_all(message)
        return self._scheduler.running > 0 or not self._stopping

    def _step(self) -> None:
        try:
            self._scheduler.step()
        except EngineInterruptedError:
            return  # nothing was computed and nothing lost: the next step leaves out what was cancelled
        except EngineError as error:
            facts = {"reason": error.message, "running": self._scheduler.running}
            log_event("engine error", facts, level=logging.ERROR)
            self._scheduler.fail(Failure("the engine failed while computing this request"))
            # One failed call may have been the requests' fault. An engine that cannot compute one token is dead.
            self._compute_one_token()

    def _compute_one_token(self) -> None:
        """Raises ``EngineError`` when the engine cannot compute finite logits for one token."""
        tokens = self._tokenizer.encode("Hello")[:1] or [0]
        logits = self._engine.forward([Chunk(0, tokens, "last")])
        finite = bool(np.isfinite(logits).all())
        self._engine.truncate(0, 0)
        if not finite:
            raise EngineError("the engine computes values that are not finite", hint="try: edgelm doctor")

    def _fail_all(self, message: str) -> None:
        self._scheduler.fail(Failure(message))
        with self._changed:
            queued = list(self._queue)
            self._queue.clear()
        for job in queued:
            self._metrics.generations.labels("failed").inc()
            job.deliver(Failure(message))

    def _end_queued(self, job: Job) -> None:
        self._metrics.generations.labels("cancelled").inc()
        elapsed_s = time.monotonic() - job.submitted_s
        job.deliver(TokenEvent(token=None, text="", index=0, elapsed_s=elapsed_s, finish_reason="cancelled"))
