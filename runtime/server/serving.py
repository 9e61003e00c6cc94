"""A server's life: bind, start the engine, serve, drain on SIGTERM or SIGINT, stop.

Knows sockets, signals and uvicorn; not what is served.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from edgelm.errors import EdgelmError, EngineError, UsageError
from runtime.embedding import open_encoder
from runtime.encoder import EncoderOptions
from runtime.engine import EngineOptions
from runtime.model import artifact_of, holds_encoder, is_encoder, open_model
from runtime.notify import Notifier
from runtime.server.app import create_app
from runtime.server.embedding_worker import EmbeddingWorker
from runtime.server.embeddings import create_embedding_app
from runtime.server.limits import (
    HEADER_LIMIT_BYTES,
    LOOPBACK_NAMES,
    Access,
    TimedH11Protocol,
    is_loopback,
    read_or_create_key,
)
from runtime.server.logs import log_event
from runtime.server.metrics import Metrics
from runtime.server.prompt_files import PromptCacheOptions, check_directory
from runtime.server.shelf import Shelf, Title
from runtime.server.supervised import SupervisedWorker
from runtime.server.switch import create_switch_app
from runtime.server.task_worker import TaskWorker
from runtime.server.tasks import create_task_app
from runtime.server.worker import QUEUED_PER_SEQUENCE, Backend, LoopReader, Worker, keep_prompts
from runtime.settings import SPARE_SHARE, predicted_bytes
from runtime.tasks import TaskOptions, holds_task, open_task
from runtime.turns import ask_for_short_turns
from targets.host import available_memory
from targets.predict import PROCESS_BYTES

DRAIN_S = 30.0
KEEP_ALIVE_S = 5
BACKLOG = 128
CONNECTION_LIMIT = 256
_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - recognised here, bound only on request


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and for whom to serve. ``allowed_hosts`` are names beyond loopback's and the address itself,
    ``per_client`` is how many requests one address may have under way."""

    host: str = "127.0.0.1"
    port: int = 8080
    allowed_hosts: tuple[str, ...] = ()
    key_file: Path | None = None
    per_client: int | None = None
    drain_s: float = DRAIN_S


def default_per_client(sequences: int) -> int:
    """Half of the requests that can run or wait: no single client can take all places."""
    return max(1, sequences * (1 + QUEUED_PER_SEQUENCE) // 2)


def resolve_access(options: ServerOptions) -> Access:
    """Who may come in. Raises ``UsageError`` for an address beyond loopback without a key, ``EdgelmError`` for a bad
    key file."""
    if options.key_file is None and not is_loopback(options.host):
        raise UsageError(
            f"{options.host} can be reached from other machines, so an API key is needed",
            hint="add --api-key-file FILE (a key is generated when FILE does not exist)",
        )
    own = frozenset() if options.host in _WILDCARDS else frozenset({options.host.lower()})
    hosts = LOOPBACK_NAMES | own | {name.lower().removesuffix(".") for name in options.allowed_hosts}
    if options.key_file is None:
        return Access(hosts, per_client=options.per_client)
    key, created = read_or_create_key(options.key_file)
    if created:
        log_event("API key generated", {"file": str(options.key_file)})
    return Access(hosts, key, options.per_client)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises ``EdgelmError`` when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (socket.gaierror, UnicodeError, OverflowError) as error:
        raise EdgelmError(f"{host} port {port} is not an address of this machine") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Listening at once makes the address ours for certain; clients that come while the model loads wait in line.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_error(host, port, error) from error
    return listener


def _bind_error(host: str, port: int, error: OSError) -> EdgelmError:
    if error.errno == errno.EADDRINUSE:
        return EdgelmError(f"port {port} on {host} is in use", hint="choose another with --port, 0 takes any free one")
    if error.errno == errno.EACCES:
        return EdgelmError(f"port {port} needs more rights than this user has", hint="choose a --port above 1023")
    return EdgelmError(f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}")


Served = Backend | EmbeddingWorker | TaskWorker | Shelf


class _DrainingServer(uvicorn.Server):
    """uvicorn's server; when the drain deadline has passed, what still runs ends with an error its clients can read."""

    def __init__(self, config: uvicorn.Config, backend: Served, drain_s: float) -> None:
        super().__init__(config)
        self._backend = backend
        self._drain_s = drain_s
        self._notifier = Notifier()
        self._told_state = ""
        self._told_alive_s = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second in the event loop: what is told from here proves that it turns."""
        state, now = self._backend.state, time.monotonic()
        if state != self._told_state:
            self._told_state = state
            self._notifier.send(*(["READY=1"] if state == "ready" else []), f"STATUS={state}")
        if self._notifier.watchdog_s is not None and now - self._told_alive_s >= self._notifier.watchdog_s:
            self._told_alive_s = now
            self._notifier.send("WATCHDOG=1")
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        ask_for_short_turns()
        if isinstance(self._backend, LoopReader):
            self._backend.lend(asyncio.get_running_loop())
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            log_event("listening", {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        facts = {"running": self._backend.running, "queued": self._backend.queued, "deadline_s": self._drain_s}
        log_event("draining", facts)
        # A stopping service is no longer watched by systemd's watchdog but by its time to stop.
        self._notifier.send("STOPPING=1", "STATUS=draining")
        deadline = asyncio.get_running_loop().call_later(
            self._drain_s, self._backend.abort, "the server is stopping and the drain deadline has passed"
        )
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()


def make_server(backend: Served, metrics: Metrics, access: Access, *, drain_s: float = DRAIN_S) -> uvicorn.Server:
    """A server that is not running yet; the caller starts and stops the backend."""
    app: ASGIApp
    if isinstance(backend, Shelf):
        app = create_switch_app(backend, metrics, access)
    elif isinstance(backend, EmbeddingWorker):
        app = create_embedding_app(backend.model, backend, metrics, access)
    elif isinstance(backend, TaskWorker):
        app = create_task_app(backend, metrics, access)
    else:
        app = create_app(backend, metrics, access)
    config = uvicorn.Config(
        app,
        http=TimedH11Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_LIMIT_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        limit_concurrency=CONNECTION_LIMIT,
        timeout_graceful_shutdown=int(drain_s) + 3,
    )
    return _DrainingServer(config, backend, drain_s)


def make_backend(
    path: Path,
    options: EngineOptions,
    metrics: Metrics,
    *,
    in_process: bool,
    prompts: PromptCacheOptions | None = None,
) -> Worker | SupervisedWorker | EmbeddingWorker | TaskWorker:
    """The backend for a bundle or model file. ``in_process`` loads it here and now, else a child process does later.
    ``prompts`` tells where beginnings of prompts are kept between starts.

    Encoders and models with a task always run here: nothing of theirs outlasts a request.

    Raises what ``runtime.model.open_model`` raises, without a child for what is wrong with the path.
    """
    if (options.lookup or options.draft) and (holds_task(path) is not None or holds_encoder(path)):
        raise UsageError(f"--lookup and --draft are for models that generate, which {path} does not")
    if prompts is not None:
        if holds_task(path) is not None or holds_encoder(path):
            raise UsageError(f"--prompt-cache is for models that generate, which {path} does not")
        check_directory(Path(prompts.directory))
    if holds_task(path) is not None:
        if options.sequences > 1:
            raise UsageError("--parallel is for models that generate", hint="this one answers text after text")
        if options.gpu_layers > 0 or options.gpu:
            raise UsageError(f"{path} is an ONNX model: --gpu-layers and --gpu are for GGUF", hint="leave them out")
        return TaskWorker(open_task(path, TaskOptions(options.context, options.threads_prefill)), metrics)
    if holds_encoder(path):
        if options.sequences > 1:
            raise UsageError("--parallel is for models that generate", hint="an encoder shares its steps by itself")
        wanted = EncoderOptions(
            options.context, threads=options.threads_prefill, gpu_layers=options.gpu_layers, gpu=options.gpu
        )
        return EmbeddingWorker(open_encoder(path, wanted), metrics)
    if in_process:
        loaded = open_model(path, options)
        return Worker(loaded, metrics, prompts=keep_prompts(loaded, options, prompts, metrics))
    for model in (path, *([Path(options.draft)] if options.draft else [])):
        artifact_of(model, check_hashes=False)
    return SupervisedWorker(path, options, metrics, prompts=prompts)


Settle = Callable[[Path], tuple[EngineOptions, bool]]


def make_shelf(
    paths: Sequence[Path],
    settle: Settle,
    metrics: Metrics,
    *,
    unload_after_s: float | None,
    prompts: PromptCacheOptions | None = None,
) -> Shelf:
    """Several models behind one server; ``settle`` tells the options for one and whether its engine runs in this
    process, when it is loaded. Those that generate keep ``prompts``.

    Raises ``UsageError`` for two models of one name, and ``BundleError`` for a path that is no model.
    """
    if prompts is not None:
        check_directory(Path(prompts.directory))
    titles = [_title(path, settle, metrics, prompts) for path in paths]
    names = [title.name for title in titles]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two of the models are named {name!r}", hint="requests choose a model by its name")
    return Shelf(titles, metrics, _free_bytes, unload_after_s=unload_after_s)


def _title(path: Path, settle: Settle, metrics: Metrics, prompts: PromptCacheOptions | None) -> Title:
    """Reads headers only; hashes are checked when the model is loaded."""
    artifact, bundle = artifact_of(path, check_hashes=False)
    task = bundle.manifest if bundle is not None and bundle.manifest.task is not None else None
    encoder = is_encoder(artifact, bundle.manifest if bundle else None)
    foreign = bundle is None and artifact.suffix == ".onnx"

    def needs() -> int:
        if task is not None:  # whose plan has no shape to predict from again; its process is this one
            return task.plan.predicted.ram_bytes - PROCESS_BYTES
        options, _ = settle(path)
        if encoder:  # it computes whole texts at once, in steps of a batch
            options = replace(options, context=max(options.context, options.batch), sequences=1)
        # The server's own memory is taken already.
        return predicted_bytes(path, options, in_process=True)

    def open_servant() -> Worker | SupervisedWorker | EmbeddingWorker | TaskWorker:
        options, in_process = settle(path)
        if encoder or task is not None:
            options = replace(options, sequences=1, lookup=False)
            return make_backend(path, options, metrics, in_process=in_process)
        return make_backend(path, options, metrics, in_process=in_process, prompts=prompts)

    if foreign:
        raise UsageError(
            f"{path} tells nothing of the memory that it takes, so it cannot be one of several models",
            hint="serve it alone, or export it again",
        )
    name = bundle.manifest.name if bundle else artifact.stem
    return Title(name, bundle.manifest if bundle else None, artifact.stat().st_size, needs, open_servant)


def _free_bytes() -> int:
    return int(int(available_memory().value) * (1 - SPARE_SHARE))


def serve(
    backend: Served, metrics: Metrics, listener: socket.socket, access: Access, *, drain_s: float = DRAIN_S
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs (at most ``drain_s``) and free the engine.

    Raises ``EngineError`` at the end when the engine never worked or did not live to see it. Main thread only.
    """
    server = make_server(backend, metrics, access, drain_s=drain_s)
    # uvicorn raises the signal again when it is done, for whoever was there before it; here nobody waits for it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def end() -> None:
        server.should_exit = True

    if isinstance(backend, SupervisedWorker | Shelf):
        backend.on_refusal = end
    backend.start()
    try:
        server.run(sockets=[listener])
    finally:
        backend.stop()
    if backend.state == "failed":
        raise backend.failure or EngineError(
            "the engine failed while serving", hint="the log says why; see also: edgelm doctor"
        )
    log_event("stopped")
