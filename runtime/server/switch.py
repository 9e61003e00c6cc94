"""The routes of a server with several models: each request goes to the model that it names.

Every model has the routes that it would have alone; what lists, counts or judges all of them is answered here. Knows
HTTP and where requests name their model; nothing of what they ask.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, get_args

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgelm.bundle import TaskKind
from edgelm.errors import DoesNotFitError
from runtime.server.answering import unavailable
from runtime.server.app import Service, guarded, model_routes
from runtime.server.card import card
from runtime.server.embedding_worker import EmbeddingWorker
from runtime.server.embeddings import EmbeddingService, embedding_routes
from runtime.server.errors import ApiError
from runtime.server.exposition import CONTENT_TYPE
from runtime.server.figures import Figures
from runtime.server.limits import Access, parse_json
from runtime.server.metrics import Metrics
from runtime.server.ollama import VERSION_SPOKEN, timestamp
from runtime.server.page import page
from runtime.server.replies import model_document
from runtime.server.shelf import Book, Servant, Shelf
from runtime.server.task_worker import TaskWorker
from runtime.server.tasks import TaskService, task_routes
from runtime.server.worker import NotReadyError

WAITING_LIMIT = 64
WAIT_S = 600.0
_POLL_S = 0.02
BY_MODEL = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/show",
    *(f"/v1/{kind}" for kind in get_args(TaskKind)),
)


class Switch:
    """What the routes share: the shelf, and for each loaded model the application that answers for it."""

    def __init__(self, shelf: Shelf, metrics: Metrics) -> None:
        self._shelf = shelf
        self._metrics = metrics
        self._figures = Figures(shelf, metrics)
        self._created = int(time.time())
        self._apps: dict[str, tuple[Servant, ASGIApp, Callable[[], dict[str, Any]]]] = {}
        self._waiting = 0
        shelf.on_unload = lambda name: self._apps.pop(name, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request for one model; the guard has put its whole body into the first message."""
        body = (await receive())["body"]
        book = self._book(_named(body, scope["path"]))
        servant = await self._taken(book)
        try:
            app, _ = self._app(book, servant)
            await app(scope, _again(body, receive), send)
        finally:
            self._shelf.give_back(book)

    async def page(self, _: Request) -> Response:
        return HTMLResponse(page().html, headers={"Content-Security-Policy": page().policy})

    async def live(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        state = self._shelf.state
        models = {name: book.state for name, book in self._shelf.books.items()}
        return JSONResponse({"status": state, "models": models}, 200 if state == "ready" else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(await run_in_threadpool(self._metrics.text), headers={"Content-Type": CONTENT_TYPE})

    async def status(self, _: Request) -> Response:
        document = await run_in_threadpool(self._figures.document)
        return JSONResponse(document | {"models": [self._card(book) for book in self._shelf.books.values()]})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(book) for book in self._shelf.books.values()]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self._entry(self._book(request.path_params["name"])))

    async def tags(self, _: Request) -> Response:
        return JSONResponse({"models": [self._tag(book) for book in self._shelf.books.values()]})

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": VERSION_SPOKEN})

    def _book(self, name: str | None) -> Book:
        """None is the first model. Raises ``ApiError`` 404."""
        if name is None:
            return self._shelf.first
        book = self._shelf.books.get(name)
        if book is None:
            served = ", ".join(repr(known) for known in self._shelf.books)
            message = f"this server has no model of that name; it serves {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return book

    async def _taken(self, book: Book) -> Servant:
        """The model's backend, loaded now if it is not. Raises ``ApiError`` 429 or 503."""
        before, deadline = book.attempts, time.monotonic() + WAIT_S
        if self._waiting >= WAITING_LIMIT:
            raise ApiError(429, "too many requests wait for models", code="queue_full", headers={"Retry-After": "5"})
        self._waiting += 1
        try:
            while True:
                if book.attempts > before and book.error is not None:
                    code = "does_not_fit" if isinstance(book.error, DoesNotFitError) else "model_not_loaded"
                    raise ApiError(503, book.error.message, param="model", code=code, headers={"Retry-After": "5"})
                servant = self._shelf.take(book)
                if servant is not None:
                    return servant
                if time.monotonic() > deadline:
                    raise unavailable(NotReadyError(f"{book.title.name} is still being loaded"))
                await asyncio.sleep(_POLL_S)
        except NotReadyError as error:
            raise unavailable(error) from error
        finally:
            self._waiting -= 1

    def _app(self, book: Book, servant: Servant) -> tuple[ASGIApp, Callable[[], dict[str, Any]]]:
        """The application around a backend, made once for each; and what tells its card."""
        name = book.title.name
        known = self._apps.get(name)
        if known is None or known[0] is not servant:
            if isinstance(servant, EmbeddingWorker):
                encoder = EmbeddingService(servant.model, servant, self._metrics, self._figures)
                known = (servant, _router(name, embedding_routes(encoder)), lambda: encoder.cards()[0])
            elif isinstance(servant, TaskWorker):
                task = TaskService(servant, self._metrics, self._figures)
                known = (servant, _router(name, task_routes(task, servant.model.kind)), task.card)
            else:
                service = Service(servant, self._metrics, self._figures)  # type: ignore[arg-type]
                known = (servant, _router(name, model_routes(service)), lambda: service.cards()[0])
            self._apps[name] = known
        return known[1:]

    def _card(self, book: Book) -> dict[str, Any]:
        servant = book.servant
        if servant is not None and servant.state == "ready":
            return self._app(book, servant)[1]()
        return card(book.title.name, book.state, None, book.title.manifest)

    def _entry(self, book: Book) -> dict[str, Any]:
        return model_document(book.title.name, self._created, {"state": book.state})

    def _tag(self, book: Book) -> dict[str, Any]:
        name, manifest = book.title.name, book.title.manifest
        records = () if manifest is None else manifest.files
        digest = next((record.sha256 for record in records if manifest and record.name == manifest.artifact), "")
        tag = {"name": name, "model": name, "modified_at": timestamp(self._created), "digest": digest}
        return tag | {"size": book.title.mapped_bytes, "details": {}}


def _named(body: bytes, path: str) -> str | None:
    """The model that a body names, None for none. What else may be wrong is for the model's own route to say."""
    document = parse_json(body)
    if not isinstance(document, dict):
        return None
    name = document.get("model")
    if name is None and path == "/api/show":
        name = document.get("name")
    if not isinstance(name, str):
        return None
    # Ollama's clients add a tag to every name that has none.
    return name.removesuffix(":latest") if path.startswith("/api/") else name


def _router(name: str, routes: list[Route]) -> Router:
    """The routes of one model. The others of the server are refused by name: they exist, for other models."""

    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        raise ApiError(400, f"{name!r} does not answer {scope['path']}", param="model", code="model_not_supported")

    return Router(routes=routes, default=other)


def _again(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again


def create_switch_app(shelf: Shelf, metrics: Metrics, access: Access) -> ASGIApp:
    """The ASGI application for several models. The caller starts and stops the shelf."""
    switch = Switch(shelf, metrics)
    routes = [
        Route("/", switch.page, methods=["GET"]),
        Route("/health/live", switch.live, methods=["GET"]),
        Route("/health/ready", switch.ready, methods=["GET"]),
        Route("/metrics", switch.metrics, methods=["GET"]),
        Route("/status", switch.status, methods=["GET"]),
        Route("/v1/models", switch.models, methods=["GET"]),
        Route("/v1/models/{name:path}", switch.one_model, methods=["GET"]),
        Route("/api/tags", switch.tags, methods=["GET"]),
        Route("/api/version", switch.version, methods=["GET"]),
        *(Route(path, switch, methods=["POST"]) for path in BY_MODEL),
    ]
    return guarded(routes, metrics, access, lambda: list(shelf.books))
