"""The engine's one owner: a thread with a bounded queue in front of a scheduler.

The HTTP side submits token ids and gets token events back through a callback; it never touches the engine. Knows
nothing of HTTP or of texts' meaning. ``Backend`` is what the HTTP side sees; the other implementation of it keeps a
worker like this one in a process of its own (``runtime.server.supervised``).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from edgelm.bundle import file_record
from edgelm.errors import EdgelmError, EngineError, UsageError
from runtime.encoder import EncoderInfo
from runtime.engine import Chunk, DeviceReader, Engine, EngineInfo, EngineInterruptedError, EngineOptions, StateKeeper
from runtime.generate import GenerationRequest, TokenEvent
from runtime.gpu_memory import VramUse, vram_use
from runtime.model import LoadedModel, PromptingModel
from runtime.server.logs import log_event
from runtime.server.metrics import Metrics
from runtime.server.pace import Pace
from runtime.server.prompt_files import PromptCacheOptions, PromptFiles
from runtime.server.scheduler import Failure, Job, JobEvent, Scheduler
from targets.vram import Device

State = Literal["starting", "ready", "restarting", "failed", "stopped"]
RETRY_AFTER_LIMIT_S = 60
QUEUED_PER_SEQUENCE = 8


class QueueFullError(EdgelmError):
    """All sequences are busy and the queue is full; ``retry_after_s`` is when a place is likely to be free."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the server is busy and its queue is full", hint=f"try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class NotReadyError(EdgelmError):
    """The engine is not there: it is still starting, it failed, or the server is stopping."""


@dataclass(frozen=True, slots=True)
class KvUse:
    """How much of the KV cache is taken: tokens of running requests, and of earlier ones that are kept as prefixes."""

    tokens: int
    capacity_tokens: int
    reserved_bytes: int


def device_now(engine: Engine) -> Device | None:
    """The GPU that an engine computes on, with the memory that is free there now; None where there is none."""
    return engine.device_now() if isinstance(engine, DeviceReader) else None


def kv_use(tokens: int, info: EngineInfo) -> KvUse:
    """``tokens`` beside what the engine has room for."""
    return KvUse(tokens, info.context * info.sequences, info.kv_bytes)


class Backend(Protocol):
    """Whoever computes for the server. All methods may be called from any thread; none blocks but ``stop``."""

    @property
    def model(self) -> PromptingModel:
        """What writes prompts for the engine's model. Raises ``NotReadyError`` before it was loaded once."""
        ...

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself. Raises ``NotReadyError`` before it was loaded once."""
        ...

    @property
    def state(self) -> State:
        """``ready`` only after the engine computed a first token and as long as it works."""
        ...

    @property
    def failure(self) -> EdgelmError | None:
        """Why the state is ``failed``, as far as it is known."""
        ...

    @property
    def running(self) -> int:
        """Generations under way."""
        ...

    @property
    def queued(self) -> int:
        """Generations that wait for a sequence."""
        ...

    @property
    def kv(self) -> KvUse | None:
        """How much of the KV cache is taken; None before the model was loaded."""
        ...

    @property
    def engine_pids(self) -> tuple[int, ...]:
        """Processes of engines; none for an engine in the server's own."""
        ...

    def vram(self) -> tuple[VramUse, ...]:
        """What its models have on GPUs; nothing where none takes part. Asks a driver: not for the event loop."""
        ...

    @property
    def keeps_prompts(self) -> bool:
        """Whether it is of use to tell which tokens of a prompt others share."""
        ...

    def start(self) -> None:
        """Begin; the state turns to ``ready`` later."""
        ...

    def submit(self, request: GenerationRequest, deliver: Callable[[JobEvent], None]) -> Job:
        """Queue a generation. ``deliver`` gets its events in any thread and must not block; the last one
        has a finish reason or is a ``Failure``. Raises ``QueueFullError`` and ``NotReadyError``."""
        ...

    def cancel(self, job: Job) -> None:
        """End a job before its next token. Cancelling a job that has ended does nothing."""
        ...

    def abort(self, message: str) -> None:
        """Fail every job, running or queued, with ``message``; used when a drain takes too long."""
        ...

    def stop(self) -> None:
        """Finish what was submitted, free the engine and wait until that is done."""
        ...


@runtime_checkable
class LoopReader(Protocol):
    """A backend whose events come from another process: the event loop that waits for them can read them itself."""

    def lend(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read in ``loop`` as long as it runs, and deliver in its thread, as far as it makes sense."""
        ...


def retry_after_s(mean_job_s: float, queued: int, sequences: int) -> int:
    """Whole seconds until a place is likely to be free."""
    return max(1, min(RETRY_AFTER_LIMIT_S, math.ceil(mean_job_s * (queued + 1) / sequences)))


def log_ready(info: EngineInfo | EncoderInfo) -> None:
    """Tell that requests are answered from now on."""
    layers = {} if info.offload is None else {"layers": info.offload.sentence()}
    attention = info.attention if isinstance(info, EngineInfo) else None
    kind = {} if attention is None else {"flash_attention": f"{attention.value}: {attention.reason}"}
    log_event("ready", {"model": info.model_name, "load_s": round(info.load_s, 3), **layers, **kind})


def keep_prompts(
    model: LoadedModel, options: EngineOptions, wanted: PromptCacheOptions | None, metrics: Metrics
) -> PromptFiles | None:
    """Files in which shared beginnings of a model's prompts are kept; ``options`` are those that it was loaded with.

    A directory that has become unfit since it was checked is told in the log and not used. Raises ``UsageError`` for a
    model whose engine does not give its state away.
    """
    if wanted is None:
        return None
    info = model.info
    if not isinstance(model.engine, StateKeeper):
        raise UsageError(
            f"--prompt-cache: the engine of {model.name} keeps no state between starts",
            hint="leave it out; an ONNX decoder that EdgeLM exported can do it, and every GGUF",
        )
    identity = {
        "model": _model_hash(model),
        "engine": info.engine,
        "versions": json.dumps(info.versions, sort_keys=True),
        "architecture": info.architecture,
        "kv_type": options.kv_type,
        # Values lie transposed without it: a state of one kind is none of the other. Files of before had it on.
        **({"flash_attention": "off"} if info.attention is not None and info.attention.value == "off" else {}),
        "context": str(info.context),
        "sequences": str(info.sequences),
        "machine": f"{platform.machine()} {sys.byteorder}",
    }
    try:
        return PromptFiles(wanted, identity, metrics.prompt_files, whole=not info.truncates)
    except UsageError as error:
        log_event("prompt cache: not used", {"reason": error.message}, level=logging.WARNING)
        return None


def _model_hash(model: LoadedModel) -> str:
    """SHA-256 of what a model consists of: by its manifest, which was checked when it was opened, or of a bare file."""
    if model.manifest is None:
        return file_record(model.artifact).sha256
    records = sorted((record.name, record.sha256) for record in model.manifest.files)
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()


class Worker:
    """The backend in this process: owns an engine from ``start`` to ``stop``. ``after_step`` is called in its thread
    whenever something was computed or the state has changed, and in another when one of ``prompts`` was written."""

    def __init__(
        self,
        model: LoadedModel,
        metrics: Metrics,
        *,
        after_step: Callable[[], None] = lambda: None,
        prompts: PromptFiles | None = None,
    ) -> None:
        self._model = model
        self._engine = model.engine
        self._tokenizer = model.tokenizer
        self._metrics = metrics
        self._after_step = after_step
        self._prompts = prompts
        if prompts is not None:
            prompts.after_write = after_step
        self._scheduler = Scheduler(
            self._engine, self._tokenizer, metrics, speculation=model.speculation, prompts=prompts
        )
        self._queue: deque[Job] = deque()
        self._queue_limit = QUEUED_PER_SEQUENCE * self._engine.info.sequences
        self._changed = threading.Condition()
        self._state: State = "starting"
        self._stopping = False
        self._abort_message: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._failure: EngineError | None = None
        self._pace = Pace()

    @property
    def model(self) -> LoadedModel:
        return self._model

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def state(self) -> State:
        return self._state

    @property
    def failure(self) -> EngineError | None:
        return self._failure

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def pace(self) -> Pace:
        """How its steps went so far, that of the first token among them."""
        return self._pace

    @property
    def only_decodes(self) -> bool:
        """Whether the next step will be a short one: no prompt is being read, and none waits."""
        return not self._queue and self._scheduler.only_decodes

    @property
    def kv_tokens(self) -> int:
        """Tokens that the engine's sequences hold."""
        return self._scheduler.kv_tokens

    @property
    def kv(self) -> KvUse:
        return kv_use(self.kv_tokens, self._engine.info)

    @property
    def engine_pids(self) -> tuple[int, ...]:
        return ()

    def vram(self) -> tuple[VramUse, ...]:
        info = self._engine.info
        return vram_use(self._model.name, info.offload, info.buffers, device_now(self._engine))

    @property
    def keeps_prompts(self) -> bool:
        return self._prompts is not None

    def start(self) -> None:
        """Start the thread; it computes one token before anything else."""
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Callable[[JobEvent], None]) -> Job:
        with self._changed:
            if self._state in {"failed", "stopped"} or self._stopping:
                raise NotReadyError("the engine is not running")
            free = self._engine.info.sequences - self._scheduler.running
            if len(self._queue) >= self._queue_limit + max(free, 0):
                self._metrics.refusals.labels("queue_full").inc()
                sequences = self._engine.info.sequences
                raise QueueFullError(retry_after_s(self._scheduler.mean_job_s, len(self._queue), sequences))
            job = Job(request, deliver)
            self._queue.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
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
        with self._changed:
            self._abort_message = message
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.wait()

    def wait(self) -> None:
        """Wait for the end of the thread: after ``stop``, or when the engine failed."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            started = time.monotonic()
            self._compute_one_token()
            self._pace = self._pace.after(time.monotonic() - started, 1)
            self._state = "ready"
            log_ready(self._engine.info)
            self._after_step()
            while self._wait_for_work():
                started = time.monotonic()
                tokens = self._step()
                self._pace = self._pace.after(time.monotonic() - started, tokens)
                self._after_step()
        except EngineError as error:
            self._failure = error
            log_event("engine failed", {"reason": error.message}, level=logging.ERROR)
        finally:
            # Reached by an unexpected exception too: then nobody else would ever answer the clients that wait.
            with self._changed:
                self._state = "stopped" if self._stopping and self._state == "ready" else "failed"
            self._fail_all("the engine failed")
            if self._prompts is not None:
                self._prompts.close()
            self._model.close()
            self._after_step()

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
            self._after_step()
        return self._scheduler.running > 0 or not self._stopping

    def _step(self) -> int:
        try:
            return self._scheduler.step()
        except EngineInterruptedError:
            return 0  # nothing was computed and nothing lost: the next step leaves out what was cancelled
        except EngineError as error:
            facts = {"reason": error.message, "running": self._scheduler.running}
            log_event("engine error", facts, level=logging.ERROR)
            self._scheduler.fail(Failure("the engine failed while computing this request"))
            # One failed call may have been the requests' fault. An engine that cannot compute one token is dead.
            self._compute_one_token()
            return 0

    def _compute_one_token(self) -> None:
        """Raises ``EngineError`` when the engine cannot compute finite logits for one token, or a drafting one none."""
        tokens = self._tokenizer.encode("Hello")[:1] or [0]
        logits = self._engine.forward([Chunk(0, tokens, "last")])
        finite = bool(np.isfinite(logits).all())
        self._engine.truncate(0, 0)
        if not finite:
            raise EngineError("the engine computes values that are not finite", hint="try: edgelm doctor")
        if self._model.speculation is not None:
            self._model.speculation.check()

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
        job.deliver(TokenEvent(token=None, text="", number=0, elapsed_s=elapsed_s, finish_reason="cancelled"))
