"""The one owner of a model with a task: a thread that answers text after text, requests in turn.

The HTTP side submits texts and gets a future of their answers. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from edgelm.errors import ContextOverflowError, EdgelmError, EngineError, UsageError
from runtime.engine import EngineInterruptedError
from runtime.gpu_memory import VramUse
from runtime.server.logs import log_event
from runtime.server.metrics import Metrics
from runtime.server.worker import RETRY_AFTER_LIMIT_S, NotReadyError, QueueFullError, State
from runtime.tasks import Asked, TaskAnswer, TaskModel

QUEUE_LIMIT = 64
"""Requests under way or waiting; each holds at most what one body can carry."""


@dataclass(eq=False)
class TaskJob:
    """The texts of one request and their answers so far."""

    asked: Sequence[Asked]
    future: Future[list[TaskAnswer]] = field(default_factory=Future)
    answers: list[TaskAnswer] = field(default_factory=list)
    submitted_s: float = field(default_factory=time.monotonic)


class TaskWorker:
    """Owns a model from ``start`` to ``stop``. All methods may be called from any thread."""

    def __init__(self, model: TaskModel, metrics: Metrics, *, queue_limit: int = QUEUE_LIMIT) -> None:
        self.model = model
        self._metrics = metrics
        self._queue_limit = queue_limit
        self._jobs: deque[TaskJob] = deque()
        self._current: TaskJob | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._mean_job_s = 0.2
        self._thread = threading.Thread(target=self._run, name="task", daemon=True)
        self._state: State = "starting"
        self._failure: EngineError | None = None

    @property
    def state(self) -> State:
        """``ready`` only after the model computed something and as long as it works."""
        return self._state

    @property
    def failure(self) -> EngineError | None:
        """Why the model cannot work any more, where that is known."""
        return self._failure

    @property
    def kv(self) -> None:
        """Nothing of a text lasts longer than its answer."""
        return

    @property
    def engine_pids(self) -> tuple[int, ...]:
        """It works in the server's own process."""
        return ()

    def vram(self) -> tuple[VramUse, ...]:
        """The CPU computes all of it."""
        return ()

    @property
    def running(self) -> int:
        return int(self._current is not None)

    @property
    def queued(self) -> int:
        return len(self._jobs)

    def start(self) -> None:
        """Start the thread; it computes something small before anything else."""
        self._thread.start()

    def submit(self, asked: Sequence[Asked]) -> TaskJob:
        """Queue texts. The job's future gets their answers, or ``UsageError``, ``ContextOverflowError`` for a text that
        cannot be answered, or ``EngineError``. Raises ``QueueFullError`` and ``NotReadyError``."""
        with self._changed:
            if self._state in {"failed", "stopped"} or self._stopping:
                raise NotReadyError("the engine is not running")
            if len(self._jobs) + self.running >= self._queue_limit:
                wait_s = round(self._mean_job_s * len(self._jobs))
                raise QueueFullError(max(1, min(RETRY_AFTER_LIMIT_S, wait_s)))
            job = TaskJob(asked)
            self._jobs.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: TaskJob) -> None:
        """Leave the rest of a job uncomputed. Cancelling a job that has ended does nothing."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            job.future.cancel()
            if job is self._current:
                self.model.interrupt()

    def abort(self, message: str) -> None:
        """Fail every job, running or queued, with ``message``; used when a drain takes too long."""
        with self._changed:
            held = [*self._jobs, *([self._current] if self._current else [])]
            self._jobs.clear()
            self.model.interrupt()
        for job in held:
            _fail(job, EngineError(message))

    def stop(self) -> None:
        """Finish what was submitted, free the model and wait until that is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self.model.warm_up()
            self._state = "ready"
            log_event("ready", {"model": self.model.name})
            while self._wait():
                self._step()
        except EngineError as error:
            self._failure = error
            log_event("engine failed", {"reason": error.message}, level=logging.ERROR)
        finally:
            with self._changed:
                self._state = "stopped" if self._stopping and self._state == "ready" else "failed"
                held = list(self._jobs)
                self._jobs.clear()
            for job in held:
                _fail(job, EngineError("the engine failed"))
            self.model.close()

    def _wait(self) -> bool:
        """Block until there is something to compute; False when the worker is to end."""
        with self._changed:
            while not (self._jobs or self._stopping):
                self._changed.wait()
            if not self._jobs:
                return False
            self._current = self._jobs.popleft()
        return True

    def _step(self) -> None:
        """Answer the next text of the job whose turn it is; with more to do it goes to the end of the line."""
        job = self._current
        assert job is not None
        if not job.answers:
            self._metrics.queue_wait_s.observe(time.monotonic() - job.submitted_s)
        broken = False
        try:
            if not job.future.done():
                job.answers.append(self.model.answer(job.asked[len(job.answers)]))
        except EngineInterruptedError:
            job.future.cancel()
        except (UsageError, ContextOverflowError) as error:
            _fail(job, error)
        except EngineError as error:
            log_event("engine error", {"reason": error.message}, level=logging.ERROR)
            _fail(job, EngineError("the engine failed while computing this request"))
            broken = True
        self._done_with(job)
        if broken:  # one failed call may have been the request's fault; without an answer the model is dead
            self.model.warm_up()

    def _done_with(self, job: TaskJob) -> None:
        finished = len(job.answers) == len(job.asked)
        with self._changed:
            self._current = None
            if not finished and not job.future.done():
                self._jobs.append(job)
                return
        if not finished or job.future.done():
            return
        self._metrics.prefill_tokens.inc(sum(answer.prompt_tokens for answer in job.answers))
        self._mean_job_s = 0.8 * self._mean_job_s + 0.2 * (time.monotonic() - job.submitted_s)
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(job.answers)


def _fail(job: TaskJob, error: EdgelmError) -> None:
    if not job.future.done() and job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
