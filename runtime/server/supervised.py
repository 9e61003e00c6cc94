"""The backend whose engine lives in a process of its own: the server outlives whatever happens to it.

Numbers the requests, sends them over, gives their events to those who wait, and fails them when the process dies. The
process is started again by ``runtime.supervisor``; what it does is ``runtime.server.engine_process``. Knows neither
HTTP nor engines: the only thing of the model's that is used here is its chat template, in its sandbox.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswerError
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import BundleError, EdgelmError, EngineError, UsageError
from runtime.chat import ChatTemplate
from runtime.engine import EngineInfo, EngineOptions
from runtime.generate import GenerationRequest, TokenEvent
from runtime.gpu_memory import VramUse, vram_use
from runtime.model import PromptingModel
from runtime.server import wire
from runtime.server.logs import log_event
from runtime.server.metrics import Metrics
from runtime.server.pace import SILENCE_FLOOR_S, Pace
from runtime.server.prompt_files import PromptCacheOptions
from runtime.server.scheduler import Failure, Job, JobEvent
from runtime.server.worker import (
    QUEUED_PER_SEQUENCE,
    KvUse,
    NotReadyError,
    QueueFullError,
    State,
    kv_use,
    log_ready,
    retry_after_s,
)
from runtime.supervisor import Death, FrameError, Supervisor

CALL_TIMEOUT_S = 60.0
LOOK_TIMEOUT_S = 2.0
"""Figures are not worth a longer wait: an engine that is read from a swapping disk answers later."""
LOAD_TIMEOUT_S = 1800.0
"""Longer than a model that fills a board's memory takes to be hashed and read from a slow card."""
WATCH_S = 1.0
STOP_GRACE_S = 10.0
_RESERVED_FACTS = frozenset({"time", "level", "event", "exception"})


@dataclass(frozen=True, slots=True)
class RemoteModel(PromptingModel):
    """A model whose engine and tokenizer are in the engine process."""

    info: EngineInfo


class RemoteTokenizer:
    """``TextTokenizer`` in the engine process. Raises ``NotReadyError`` when the process is not there."""

    def __init__(self, call: Callable[[Callable[[int], wire.ToEngine]], wire.Answer]) -> None:
        self._call = call

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        answer = self._call(lambda call: wire.Encode(call, text, special))
        assert isinstance(answer, wire.Encoded)
        if answer.refusal is not None:
            raise UsageError(answer.refusal)
        return answer.ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return self._decoded(wire.Decode(0, list(ids), special))

    def token_bytes(self, token: int) -> bytes:
        return bytes.fromhex(self._decoded(wire.Decode(0, [token], raw=True)))

    def _decoded(self, wanted: wire.Decode) -> str:
        answer = self._call(lambda call: wire.Decode(call, wanted.ids, wanted.special, wanted.raw))
        assert isinstance(answer, wire.Decoded)
        return answer.text


def engine_command() -> list[str]:
    """The command line of the engine process, without the number of its socket.

    It imports from where this process imports and from nowhere else: ``-m`` would put the working directory first.
    """
    code = f"import sys; sys.path[:] = {sys.path!r}; from runtime.server.engine_process import main; main()"
    return [sys.executable, "-c", code]


class SupervisedWorker:
    """``Backend`` with its engine in a child process. ``command`` is for tests that bring an engine of their own, and
    ``silence_floor_s`` for those whose engine stands still: see ``Pace.silence_limit_s``.

    ``on_refusal`` is called once when the engine process says before it ever worked why it never will: a damaged
    bundle, too little memory. ``failure`` then tells what it said.
    """

    def __init__(
        self,
        path: Path,
        options: EngineOptions,
        metrics: Metrics,
        *,
        prompts: PromptCacheOptions | None = None,
        command: Sequence[str] | None = None,
        silence_floor_s: float = SILENCE_FLOOR_S,
    ) -> None:
        self._load = wire.Load(str(path), options, prompts)
        self._metrics = metrics
        self._lock = threading.Lock()
        self._state: State = "starting"
        self._model: RemoteModel | None = None
        self._jobs: dict[int, Job] = {}
        self._calls: dict[int, Future[wire.Answer]] = {}
        self._numbers = itertools.count(1)
        self._running = 0
        self._kv_tokens = 0
        self._mean_job_s = 1.0
        self._started = False
        self._stopping = False
        self._supervisor = Supervisor(list(command or engine_command()), self)
        self._failure: EdgelmError | None = None
        self.on_refusal: Callable[[], None] = lambda: None
        self._silence_floor_s = silence_floor_s
        self._pace = Pace()
        self._silent_s = 0.0
        self._stopped = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def model(self) -> RemoteModel:
        if self._model is None:
            raise NotReadyError("the model is still being loaded")
        return self._model

    @property
    def info(self) -> EngineInfo:
        return self.model.info

    @property
    def state(self) -> State:
        return self._state

    @property
    def failure(self) -> EdgelmError | None:
        return self._failure

    @property
    def running(self) -> int:
        return min(self._running, len(self._jobs))

    @property
    def queued(self) -> int:
        return len(self._jobs) - self.running

    @property
    def pid(self) -> int | None:
        """Process id of the engine process, None while there is none."""
        return self._supervisor.pid

    @property
    def engine_pids(self) -> tuple[int, ...]:
        pid = self.pid
        return () if pid is None else (pid,)

    @property
    def keeps_prompts(self) -> bool:
        return self._load.prompts is not None

    @property
    def kv(self) -> KvUse | None:
        return None if self._model is None else kv_use(self._kv_tokens, self._model.info)

    def vram(self) -> tuple[VramUse, ...]:
        model = self._model
        if model is None or model.info.offload is None or model.info.offload.device is None:
            return ()
        try:
            answer = self._ask(wire.LookAtDevice, LOOK_TIMEOUT_S)
        except NotReadyError:
            return ()  # nothing of it lies anywhere now
        now = answer.device if isinstance(answer, wire.DeviceSeen) else None
        return vram_use(model.name, model.info.offload, model.info.buffers, now)

    def start(self) -> None:
        self._supervisor.start()
        self._watchdog.start()

    def lend(self, loop: asyncio.AbstractEventLoop) -> None:
        self._supervisor.lend(loop)

    def submit(self, request: GenerationRequest, deliver: Callable[[JobEvent], None]) -> Job:
        job = Job(request, deliver)
        with self._lock:
            model = self._model
            if self._state != "ready" or model is None or self._stopping:
                raise NotReadyError(_WHY_NOT.get(self._state, "the server is stopping"))
            sequences = model.info.sequences
            if len(self._jobs) >= sequences * (1 + QUEUED_PER_SEQUENCE):
                self._metrics.refusals.labels("queue_full").inc()
                raise QueueFullError(retry_after_s(self._mean_job_s, len(self._jobs) - sequences, sequences))
            number = next(self._numbers)
            self._jobs[number] = job
            self._send(wire.Submit(number, request))
        return job

    def cancel(self, job: Job) -> None:
        with self._lock:
            job.cancelled = True
            number = next((number for number, present in self._jobs.items() if present is job), None)
            if number is not None:
                self._send(wire.Cancel(number))

    def abort(self, message: str) -> None:
        self._send(wire.Abort(message))

    def stop(self) -> None:
        self._stopping = True
        self._send(wire.Stop())
        self._supervisor.stop(STOP_GRACE_S if self._state == "ready" else 0.0)
        self._stopped.set()
        if self._watchdog.ident is not None:
            self._watchdog.join()
        self._state = "failed" if self._failure is not None else "stopped"

    def child_started(self) -> None:
        """See ``runtime.supervisor.Watcher``."""
        self._pace, self._silent_s = Pace(), 0.0
        self._metrics.engine_starts.inc()
        log_event("engine started", {"pid": self.pid})
        self._send(self._load)

    def child_said(self, message: bytes) -> None:
        """See ``runtime.supervisor.Watcher``."""
        said = wire.unpack_from_engine(message)
        if isinstance(said, wire.Progress):
            self._progress(said)
        elif isinstance(said, wire.Answer):
            with self._lock:
                waiting = self._calls.pop(said.call, None)
            if waiting is not None:
                waiting.set_result(said)
        elif isinstance(said, wire.Loaded):
            self._model = self._remote_model(said)
        elif isinstance(said, wire.Refused):
            self._refused(said)
        elif self._model is not None:
            with self._lock:
                self._state, self._started, self._silent_s = "ready", True, 0.0
            log_ready(self._model.info)

    def child_wrote(self, line: str) -> None:
        """See ``runtime.supervisor.Watcher``. Its own log lines keep their form; others are quoted."""
        try:
            document = json.loads(line)
        except ValueError:
            document = None
        if not isinstance(document, dict) or not isinstance(document.get("event"), str):
            log_event("engine output", {"line": line}, level=logging.WARNING)
            return
        if document["event"] == "ready":
            return  # said here, once requests are taken
        level = logging.getLevelName(str(document.get("level", "info")).upper())
        facts = {name: fact for name, fact in document.items() if name not in _RESERVED_FACTS}
        if "exception" in document:
            facts["engine_exception"] = document["exception"]
        log_event(document["event"], facts, level=level if isinstance(level, int) else logging.INFO)

    def child_died(self, death: Death) -> None:
        """See ``runtime.supervisor.Watcher``. Whoever waits for it is told so."""
        lost = self._lose("the engine ended while computing this request; it is being started again")
        if self._failure is not None:
            self.on_refusal()
        elif not self._stopping:
            self._metrics.engine_deaths.inc()
            facts = {"reason": death.reason, "lived_s": round(death.lived_s, 3), "requests_lost": lost}
            facts |= {"last_line": death.last_line or None, "restart_in_s": death.pause_s}
            log_event("engine died", facts, level=logging.ERROR)

    def _lose(self, told: str) -> int:
        """Fail everybody who waits for the engine process, which is gone or good for nothing; how many jobs there were.

        From here on until another one works, readiness is denied.
        """
        with self._lock:
            jobs, calls = list(self._jobs.values()), list(self._calls.values())
            self._jobs.clear()
            self._calls.clear()
            self._running = self._kv_tokens = 0
            if self._failure is not None:
                self._state = "failed"
            elif not self._stopping:
                self._state = "restarting" if self._started else "starting"
        for waiting in calls:
            waiting.set_exception(NotReadyError("the engine ended while it was asked"))
        for job in jobs:
            self._metrics.generations.labels("failed").inc()
            job.deliver(Failure(told))
        return len(jobs)

    def _watch(self) -> None:
        """End an engine process that stands still: it is stopped, or its computation never returns.

        Seconds are counted while this thread runs, so that a server which was itself stopped for long blames nobody.
        """
        nap_s = min(WATCH_S, self._silence_floor_s / 8)
        before = time.monotonic()
        while not self._stopped.wait(nap_s):
            now = time.monotonic()
            with self._lock:
                ready = self._state == "ready"
                idle = not self._jobs if ready else self.pid is None
                self._silent_s = 0.0 if idle else self._silent_s + min(now - before, 2 * nap_s)
                limit_s = self._pace.silence_limit_s(self._silence_floor_s) if ready else LOAD_TIMEOUT_S
                hung = self._silent_s > limit_s
            before = now
            if hung:
                self._end_hung(limit_s)

    def _end_hung(self, limit_s: float) -> None:
        """Kill the engine process and tell those who wait, at once: one that is stuck in the kernel dies later."""
        self._silent_s = 0.0
        self._metrics.engine_hangs.inc()
        self._supervisor.kill()
        lost = self._lose("the engine stood still while computing this request; it is being started again")
        log_event("engine hung", {"silent_s": round(limit_s, 1), "requests_lost": lost}, level=logging.ERROR)

    def _send(self, message: wire.ToEngine) -> None:
        self._supervisor.send(wire.pack_to_engine(message))

    def _call(self, make: Callable[[int], wire.ToEngine]) -> wire.Answer:
        """Ask the engine process and wait for its answer; not for the event loop."""
        answer = self._ask(make, CALL_TIMEOUT_S)
        if answer is None:
            self._end_hung(CALL_TIMEOUT_S)
            raise NotReadyError("the engine process does not answer")
        return answer

    def _ask(self, make: Callable[[int], wire.ToEngine], patience_s: float) -> wire.Answer | None:
        """As ``_call``, but None when no answer has come in time, for which nobody is blamed."""
        waiting: Future[wire.Answer] = Future()
        with self._lock:
            if self._state != "ready" or self._stopping:
                raise NotReadyError(_WHY_NOT.get(self._state, "the server is stopping"))
            number = next(self._numbers)
            self._calls[number] = waiting
            self._send(make(number))
        try:
            return waiting.result(patience_s)
        except NoAnswerError:
            with self._lock:
                unanswered = self._calls.pop(number, None) is not None
            return None if unanswered else waiting.result()

    def _progress(self, progress: wire.Progress) -> None:
        self._running, self._kv_tokens = progress.running, progress.kv_tokens
        with self._lock:
            if progress.deliveries or progress.pace is not None:
                self._silent_s = 0.0
            self._pace = progress.pace or self._pace
        try:
            for observation in progress.observations:
                self._metrics.apply(observation)
        except ValueError as error:
            raise FrameError(str(error)) from error
        for delivery in progress.deliveries:
            event: JobEvent | None = delivery.failure or delivery.token
            if event is None:
                raise FrameError("a delivery of nothing")
            ended = not isinstance(event, TokenEvent) or event.finish_reason is not None
            with self._lock:
                job = self._jobs.pop(delivery.job, None) if ended else self._jobs.get(delivery.job)
            if job is None:
                continue
            if job.admitted_s is None:
                job.admitted_s = job.submitted_s + delivery.queue_s
                self._supervisor.mark_working()
            if ended:
                self._mean_job_s += 0.2 * (time.monotonic() - job.admitted_s - self._mean_job_s)
            job.deliver(event)

    def _remote_model(self, loaded: wire.Loaded) -> RemoteModel:
        try:
            template = ChatTemplate(loaded.template, loaded.special_tokens) if loaded.template else None
        except BundleError as error:
            raise FrameError(error.message) from error
        return RemoteModel(
            name=loaded.name,
            tokenizer=RemoteTokenizer(self._call),
            chat_template=template,
            stop_tokens=loaded.stop_tokens,
            bos=loaded.bos,
            manifest=loaded.manifest,
            info=loaded.info,
        )

    def _refused(self, refused: wire.Refused) -> None:
        """A refusal ends a server that never worked. Later it may be a lack of memory that passes."""
        log_event("engine refused", {"reason": refused.message, "hint": refused.hint}, level=logging.ERROR)
        if not self._started:
            self._failure = EngineError(refused.message, hint=refused.hint)
            self._failure.exit_code = refused.exit_code
            self._supervisor.forgo()


_WHY_NOT = {
    "starting": "the model is still being loaded",
    "restarting": "the engine has ended unexpectedly and is being started again",
    "failed": "the engine is not running",
}
