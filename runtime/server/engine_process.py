"""The engine's process: loads a model, computes what the server asks for, and dies alone when something goes wrong.

A worker and its scheduler as they run in the server with ``--in-process``, behind a socket instead of a method call.
Knows no HTTP and no clients.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgelm.errors import EdgelmError, UsageError
from runtime.constraint import ConstraintError
from runtime.engine import EngineOptions
from runtime.generate import prepare_grammar
from runtime.model import LoadedModel, open_model
from runtime.server import wire
from runtime.server.logs import log_event, start_logging
from runtime.server.metrics import Metrics, Observation
from runtime.server.scheduler import Failure, Job, JobEvent
from runtime.server.worker import NotReadyError, QueueFullError, Worker, device_now, keep_prompts
from runtime.supervisor import Channel, tie_to_parent

TOKENS_EVERY_S = 0.025
"""Tokens that come faster are sent together. Each message wakes the server and its client on cores that an engine on a
small board needs for itself; of 40 messages per second nobody sees that they are not 100."""
OBSERVATIONS_EVERY_S = 0.25
"""While tokens are computed, what was counted is sent so often: token by token it would cost more than the tokens."""
LONG_TEXT = 20_000
"""Characters that take longer than some milliseconds to encode, so that it is worth waking a thread."""

Open = Callable[[Path, EngineOptions], LoadedModel]


def main(open_served: Open = open_model) -> None:
    """What the process does; the last argument is the number of its socket. Ends the process, never returns."""
    tie_to_parent()
    start_logging()
    channel = Channel(socket.socket(fileno=int(sys.argv[-1])))
    status = EngineProcess(channel).serve(open_served)
    # No destructor of a half-dead engine, no thread that still computes may keep the process from ending.
    sys.stderr.flush()
    os._exit(status)


class EngineProcess:
    """The child's side of the conversation."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._jobs: dict[int, Job] = {}
        self._deliveries: list[wire.Delivery] = []
        # Appended without the lock: the worker observes while it holds a lock of its own.
        self._observations: deque[Observation] = deque()
        self._lock = threading.Lock()
        self._told_ready = False
        self._told_steps = 0
        self._told_s = 0.0
        self._told_observations_s = 0.0
        # A long text must not keep a cancellation waiting.
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        # A driver that does not answer must not keep anything waiting.
        self._looking = ThreadPoolExecutor(1, "look")

    def serve(self, open_served: Open) -> int:
        """Load, compute, and stop when told to or when the server is gone; the exit status."""
        first = self._channel.receive()
        load = wire.unpack_to_engine(first) if first is not None else None
        if not isinstance(load, wire.Load):
            return 1
        metrics = Metrics(forward=self._observations.append)
        try:
            model = open_served(Path(load.path), load.options)
            prompts = keep_prompts(model, load.options, load.prompts, metrics)
        except EdgelmError as error:
            self._say(wire.Refused(error.message, error.hint, error.exit_code))
            return 1
        self._say(_loaded(model))
        self._worker = Worker(model, metrics, after_step=self._after_step, prompts=prompts)
        self._worker.start()
        threading.Thread(target=self._end_with_worker, name="end", daemon=True).start()
        while (frame := self._channel.receive()) is not None:
            message = wire.unpack_to_engine(frame)
            if isinstance(message, wire.Stop):
                self._worker.stop()
                return 0 if self._worker.state == "stopped" else 1
            self._obey(message, model)
            self._flush()
        return 1  # the server died

    def _obey(self, message: wire.ToEngine, model: LoadedModel) -> None:
        if isinstance(message, wire.Submit):
            self._submit(message, model)
        elif isinstance(message, wire.Cancel):
            job = self._jobs.get(message.job)
            if job is not None:
                self._worker.cancel(job)
        elif isinstance(message, wire.Abort):
            self._worker.abort(message.message)
        elif isinstance(message, wire.Encode) and len(message.text) > LONG_TEXT:
            self._tokenizing.submit(self._answer, message, model)
        elif isinstance(message, wire.Encode | wire.Decode):
            self._answer(message, model)
        elif isinstance(message, wire.LookAtDevice):
            self._looking.submit(self._look, message, model)

    def _look(self, message: wire.LookAtDevice, model: LoadedModel) -> None:
        self._say(wire.DeviceSeen(message.call, device_now(model.engine)))

    def _submit(self, message: wire.Submit, model: LoadedModel) -> None:
        number, ended = message.job, False
        with contextlib.suppress(ConstraintError):  # told to the request when its turn comes
            prepare_grammar(message.request, model.tokenizer, model.info.vocabulary)

        def deliver(event: JobEvent) -> None:
            nonlocal ended
            failure = event if isinstance(event, Failure) else None
            token = None if isinstance(event, Failure) else event
            with self._lock:
                job = self._jobs.get(number)
                queue_s = job.queue_s if job is not None else 0.0  # so early that it cannot have waited
                self._deliveries.append(wire.Delivery(number, queue_s, token, failure))
                if token is None or token.finish_reason is not None:
                    ended = True
                    self._jobs.pop(number, None)

        # Not under the lock: the worker delivers while it holds a lock of its own.
        try:
            job = self._worker.submit(message.request, deliver)
        except (NotReadyError, QueueFullError) as error:
            deliver(Failure(error.message))
            return
        with self._lock:
            if not ended:
                self._jobs[number] = job

    def _answer(self, message: wire.Encode | wire.Decode, model: LoadedModel) -> None:
        if isinstance(message, wire.Encode):
            try:
                ids, refusal = model.tokenizer.encode(message.text, special=message.special), None
            except UsageError as error:
                ids, refusal = [], error.message
            self._say(wire.Encoded(message.call, ids, refusal))
        elif message.raw:
            raw = b"".join(model.tokenizer.token_bytes(token) for token in message.ids)
            self._say(wire.Decoded(message.call, raw.hex()))
        else:
            self._say(wire.Decoded(message.call, model.tokenizer.decode(message.ids, special=message.special)))

    def _after_step(self) -> None:
        if self._worker.state == "ready" and not self._told_ready:
            self._told_ready = True
            self._say(wire.Ready())
        self._flush()

    def _flush(self) -> None:
        """Send what came since the last time, whatever number of steps and streams it is of."""
        with self._lock:
            now = time.monotonic()
            if self._can_wait(now):
                return
            pace = self._worker.pace
            moved = pace.steps != self._told_steps
            observations = self._due_observations(now)
            if not self._deliveries and not observations and not moved:
                return
            worker, self._told_steps, self._told_s = self._worker, pace.steps, now
            progress = wire.Progress(
                worker.running, self._deliveries, observations, worker.kv_tokens, pace if moved else None
            )
            self._deliveries = []
            # Sent under the lock: events of one job must not overtake one another.
            self._say(progress)

    def _can_wait(self, now: float) -> bool:
        """Whether all that there is to tell is the middle of answers, which soon goes on, and it was told just now."""
        if now - self._told_s >= TOKENS_EVERY_S or not self._worker.only_decodes:
            return False
        return bool(self._deliveries) and all(map(wire.is_plain, self._deliveries))

    def _due_observations(self, now: float) -> list[Observation]:
        """What was counted, when nothing is computed any more or some time after the last time."""
        if self._jobs and now - self._told_observations_s < OBSERVATIONS_EVERY_S:
            return []
        self._told_observations_s = now
        return [self._observations.popleft() for _ in range(len(self._observations))]

    def _end_with_worker(self) -> None:
        """An engine that cannot compute ends its process: the server starts another."""
        self._worker.wait()
        if self._worker.state != "failed":
            return
        failure = self._worker.failure
        if failure is not None:
            self._say(wire.Refused(failure.message, failure.hint, failure.exit_code))
        sys.stderr.flush()
        os._exit(1)

    def _say(self, message: wire.FromEngine) -> None:
        try:
            self._channel.send(wire.pack_from_engine(message))
        except OSError:
            log_event("server gone")
            os._exit(1)


def _loaded(model: LoadedModel) -> wire.Loaded:
    template = model.chat_template
    return wire.Loaded(
        name=model.name,
        info=model.info,
        template=template.source if template else None,
        special_tokens=template.special_tokens if template else {},
        stop_tokens=model.stop_tokens,
        bos=model.bos,
        manifest=model.manifest,
    )
