"""A server's life: bind, start the engine, serve, drain on SIGTERM or SIGINT, stop.

Knows sockets, signals and uvicorn; not what is served.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from edgelm.errors import EdgelmError, EngineError, UsageError
from runtime.embedding import LoadedEncoder
from runtime.model import LoadedModel
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
from runtime.server.worker import Worker

DRAIN_S = 30.0
KEEP_ALIVE_S = 5
BACKLOG = 128
CONNECTION_LIMIT = 256
QUEUED_PER_SEQUENCE = 8
_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - recognised here, bound only on request


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and for whom to serve. ``allowed_hosts`` are names beyond loopback's and the address itself."""

    host: str = "127.0.0.1"
    port: int = 8080
    allowed_hosts: tuple[str, ...] = ()
    key_file: Path | None = None
    drain_s: float = DRAIN_S


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
        return Access(hosts)
    key, created = read_or_create_key(options.key_file)
    if created:
        log_event("API key generated", {"file": str(options.key_file)})
    return Access(hosts, key)


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


class _DrainingServer(uvicorn.Server):
    """uvicorn's server; when the drain deadline has passed, what still runs ends with an error its clients can read."""

    def __init__(self, config: uvicorn.Config, worker: Worker | EmbeddingWorker, drain_s: float) -> None:
        super().__init__(config)
        self._worker = worker
        self._drain_s = drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            log_event("listening", {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        facts = {"running": self._worker.running, "queued": self._worker.queued, "deadline_s": self._drain_s}
        log_event("draining", facts)
        deadline = asyncio.get_running_loop().call_later(
            self._drain_s, self._worker.abort, "the server is stopping and the drain deadline has passed"
        )
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()


def make_server(model: LoadedModel, access: Access, *, drain_s: float = DRAIN_S) -> tuple[uvicorn.Server, Worker]:
    """A server that is not running yet and the worker it uses; the caller starts and stops the worker."""
    metrics = Metrics()
    queue_limit = QUEUED_PER_SEQUENCE * model.engine.info.sequences
    worker = Worker(model.engine, model.tokenizer, metrics, queue_limit=queue_limit)
    return _draining(create_app(model, worker, metrics, access), worker, drain_s), worker


def make_embedding_server(
    model: LoadedEncoder, access: Access, *, drain_s: float = DRAIN_S
) -> tuple[uvicorn.Server, EmbeddingWorker]:
    """The same around an encoder."""
    metrics = Metrics()
    worker = EmbeddingWorker(model, metrics)
    return _draining(create_embedding_app(model, worker, metrics, access), worker, drain_s), worker


def _draining(app: ASGIApp, worker: Worker | EmbeddingWorker, drain_s: float) -> uvicorn.Server:
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
    return _DrainingServer(config, worker, drain_s)


def serve(
    model: LoadedModel | LoadedEncoder, listener: socket.socket, access: Access, *, drain_s: float = DRAIN_S
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs (at most ``drain_s``) and free the engine.

    Raises ``EngineError`` at the end when the engine did not live to see it. Main thread only.
    """
    server: uvicorn.Server
    worker: Worker | EmbeddingWorker
    if isinstance(model, LoadedEncoder):
        server, worker = make_embedding_server(model, access, drain_s=drain_s)
    else:
        server, worker = make_server(model, access, drain_s=drain_s)
    # uvicorn raises the signal again when it is done, for whoever was there before it; here nobody waits for it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    worker.start()
    try:
        server.run(sockets=[listener])
    finally:
        worker.stop()
    if worker.state == "failed":
        raise EngineError("the engine failed while serving", hint="the log says why; see also: edgelm doctor")
    log_event("stopped")
