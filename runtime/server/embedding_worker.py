"""The encoder's one owner: a thread that fills its steps from all requests that wait.

The HTTP side submits lists of token ids and gets a future of their vectors; it never touches the encoder. Requests take
turns, so a long one does not hold up a short one, and short ones share a step. Knows nothing of HTTP or of texts.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from edgelm.errors import EngineError
from runtime.embedding import LoadedEncoder
from runtime.encoder import Vectors
from runtime.engine import DeviceReader, EngineInterruptedError
from runtime.gpu_memory import VramUse, vram_use
from runtime.server.logs import log_event
from runtime.server.metrics import Metrics
from runtime.server.worker import RETRY_AFTER_LIMIT_S, NotReadyError, QueueFullError, State, log_ready

QUEUE_LIMIT = 64
"""Requests under way or waiting; each holds at most what one body can carry."""


@dataclass(eq=False)
class EmbeddingJob:
    """The sequences of one request and what is known of them so far."""

    sequences: Sequence[Sequence[int]]
    vectors: Vectors
    future: Future[Vectors] = field(default_factory=Future)
    submitted_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    taken: int = 0
    done: int = 0


class EmbeddingWorker:
    """Owns an encoder from ``start`` to ``stop``. All methods may be called from any thread."""

    def __init__(self, model: LoadedEncoder, metrics: Metrics, *, queue_limit: int = QUEUE_LIMIT) -> None:
        self._model = model
        self._metrics = metrics
        self._queue_limit = queue_limit
        self._jobs: deque[EmbeddingJob] = deque()
        self._changed = threading.Condition()
        self._state: State = "starting"
        self._stopping = False
        self._failure: EngineError | None = None
        self._abort_message: str | None = None
        self._mean_job_s = 0.1
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)

    @property
    def state(self) -> State:
        """``ready`` only after the encoder computed a first vector and as long as it works."""
        return self._state

    @property
    def model(self) -> LoadedEncoder:
        """What it owns."""
        return self._model

    @property
    def failure(self) -> EngineError | None:
        """Why the encoder cannot work any more, where that is known."""
        return self._failure

    @property
    def running(self) -> int:
        return sum(job.taken > 0 for job in list(self._jobs))

    @property
    def queued(self) -> int:
        return sum(job.taken == 0 for job in list(self._jobs))

    @property
    def kv(self) -> None:
        """Nothing of an encoder lasts longer than a step."""
        return

    @property
    def engine_pids(self) -> tuple[int, ...]:
        """It works in the server's own process."""
        return ()

    def vram(self) -> tuple[VramUse, ...]:
        """What the encoder has on a GPU; nothing where the CPU computes all."""
        encoder = self._model.encoder
        now = encoder.device_now() if isinstance(encoder, DeviceReader) else None
        return vram_use(self._model.name, encoder.info.offload, encoder.info.buffers, now)

    def start(self) -> None:
        """Start the thread; it computes one vector before anything else."""
        self._thread.start()

    def submit(self, sequences: Sequence[Sequence[int]]) -> EmbeddingJob:
        """Queue sequences that the encoder can take. The job's future gets their vectors, or an ``EngineError``.

        Raises ``QueueFullError`` and ``NotReadyError``.
        """
        with self._changed:
            if self._state in {"failed", "stopped"} or self._stopping:
                raise NotReadyError("the engine is not running")
            if len(self._jobs) >= self._queue_limit:
                wait_s = math.ceil(self._mean_job_s * len(self._jobs))
                raise QueueFullError(max(1, min(RETRY_AFTER_LIMIT_S, wait_s)))
            job = EmbeddingJob(sequences, np.empty((len(sequences), self._model.encoder.info.dimensions), np.float32))
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: EmbeddingJob) -> None:
        """Leave the rest of a job uncomputed. Cancelling a job that has ended does nothing."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                job.future.cancel()
                if not self._jobs:  # what is computed just now is wanted by nobody
                    self._model.encoder.interrupt()

    def abort(self, message: str) -> None:
        """Fail every job, running or queued, with ``message``; used when a drain takes too long."""
        with self._changed:
            self._abort_message = message
            self._changed.notify_all()

    def stop(self) -> None:
        """Finish what was submitted, free the encoder and wait until that is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._compute_one_vector()
            self._state = "ready"
            log_ready(self._model.encoder.info)
            while self._wait_for_work():
                self._step()
        except EngineError as error:
            self._failure = error
            log_event("engine failed", {"reason": error.message}, level=logging.ERROR)
        finally:
            with self._changed:
                self._state = "stopped" if self._stopping and self._state == "ready" else "failed"
            self._fail_all("the engine failed")
            self._model.close()

    def _compute_one_vector(self) -> None:
        self._model.embed(["Hello"])

    def _wait_for_work(self) -> bool:
        """Block until there is something to compute; False when the worker is to end."""
        with self._changed:
            while not (self._jobs or self._stopping or self._abort_message):
                self._changed.wait()
            message, self._abort_message = self._abort_message, None
        if message is not None:
            self._fail_all(message)
        return bool(self._jobs) or not self._stopping

    def _step(self) -> None:
        """One step of the encoder, filled by the jobs in turn."""
        with self._changed:
            taken = self._take()
        if not taken:
            return
        sequences = [job.sequences[index] for job, index in taken]
        try:
            vectors = self._model.embed_ids(sequences)
        except EngineInterruptedError:
            return  # whoever wanted these has left
        except EngineError as error:
            log_event("engine error", {"reason": error.message, "running": len(taken)}, level=logging.ERROR)
            self._fail({job for job, _ in taken}, "the engine failed while computing this request")
            # One failed call may have been the requests' fault. An encoder without a first vector is dead.
            self._compute_one_vector()
            return
        self._metrics.prefill_tokens.inc(sum(map(len, sequences)))
        self._metrics.batch_tokens.observe(sum(map(len, sequences)))
        for (job, index), vector in zip(taken, vectors, strict=True):
            job.vectors[index] = vector
            job.done += 1
            if job.done == len(job.sequences):
                self._finish(job)

    def _take(self) -> list[tuple[EmbeddingJob, int]]:
        """Sequences for one step, one of each job in turn, while they fit."""
        info = self._model.encoder.info
        taken: list[tuple[EmbeddingJob, int]] = []
        tokens = 0
        waiting = deque(job for job in self._jobs if job.taken < len(job.sequences))
        while waiting and len(taken) < info.sequences:
            job = waiting.popleft()
            length = len(job.sequences[job.taken])
            if tokens + length > info.batch:
                break
            if job.started_s is None:
                job.started_s = time.monotonic()
                self._metrics.queue_wait_s.observe(job.started_s - job.submitted_s)
            taken.append((job, job.taken))
            tokens += length
            job.taken += 1
            if job.taken < len(job.sequences):
                waiting.append(job)
        return taken

    def _finish(self, job: EmbeddingJob) -> None:
        with self._changed:
            if job not in self._jobs:  # cancelled while its last step ran
                return
            self._jobs.remove(job)
        self._mean_job_s = 0.8 * self._mean_job_s + 0.2 * (time.monotonic() - (job.started_s or job.submitted_s))
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(job.vectors)

    def _fail(self, jobs: set[EmbeddingJob], message: str) -> None:
        with self._changed:
            held = [job for job in jobs if job in self._jobs]
            for job in held:
                self._jobs.remove(job)
        for job in held:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(EngineError(message))

    def _fail_all(self, message: str) -> None:
        self._fail(set(self._jobs), message)
