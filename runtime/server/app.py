"""The routes: requests in, generations submitted, answers out.

Builds a Starlette application around one backend. Knows HTTP and the model's words; not engines, batches or sockets.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.engine import EngineInfo
from runtime.model import PromptingModel
from runtime.server.answering import Generation, GenerationResponse, unavailable
from runtime.server.card import card
from runtime.server.errors import ApiError
from runtime.server.exposition import CONTENT_TYPE
from runtime.server.figures import Figures
from runtime.server.limits import Access, Guard, parse_json
from runtime.server.logs import log_event
from runtime.server.metrics import Metrics
from runtime.server.ollama import error_document
from runtime.server.openai import ChatRequest, CompletionRequest, parse_request
from runtime.server.page import page
from runtime.server.prepare import Prepared, Preparer
from runtime.server.replies import Answer, Form, Writer, model_document
from runtime.server.routes import OllamaRoutes, TokenRoutes
from runtime.server.worker import Backend, NotReadyError

_Made = TypeVar("_Made")
QUIET_ROUTES = frozenset({"/status"})
_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}


class Service:
    """What the routes share: the backend, the counters and one thread for templates, tokens and grammars."""

    def __init__(self, backend: Backend, metrics: Metrics, figures: Figures) -> None:
        self._backend = backend
        self._figures = figures
        self._metrics = metrics
        self.created = int(time.time())
        # Encoding a long prompt must not hold up the event loop, and one core is enough for it.
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._preparer: Preparer | None = None

    @property
    def model(self) -> PromptingModel:
        """The model that is served. Raises ``ApiError`` 503 while it is loaded for the first time."""
        try:
            return self._backend.model
        except NotReadyError as error:
            raise unavailable(error) from error

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself. Raises ``ApiError`` 503 while it is loaded for the first time."""
        try:
            return self._backend.info
        except NotReadyError as error:
            raise unavailable(error) from error

    @property
    def preparer(self) -> Preparer:
        """Prepares requests for the model. Raises ``ApiError`` 503 as ``model`` does."""
        if self._preparer is None or self._preparer.model is not self.model:
            self._preparer = Preparer(self.model, self.info, marks_shared=self._backend.keeps_prompts)
        return self._preparer

    async def page(self, _: Request) -> Response:
        return HTMLResponse(page().html, headers={"Content-Security-Policy": page().policy})

    async def live(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        state = self._backend.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(await run_in_threadpool(self._metrics.text), headers={"Content-Type": CONTENT_TYPE})

    async def status(self, _: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._figures.document) | {"models": self.cards()})

    def names(self) -> list[str]:
        """The model's name, once it was loaded."""
        try:
            return [self._backend.model.name]
        except NotReadyError:
            return []

    def cards(self) -> list[dict[str, Any]]:
        """The model's card, once it was loaded."""
        try:
            model, info = self._backend.model, self._backend.info
        except NotReadyError:
            return []
        return [card(model.name, self._backend.state, info, model.manifest)]

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_document()]})

    async def one_model(self, request: Request) -> Response:
        self.check_model(request.path_params["name"])
        return JSONResponse(self._model_document())

    async def chat(self, request: Request) -> GenerationResponse:
        wanted = parse_request(ChatRequest, parse_json(await request.body()))
        self.check_model(wanted.model)
        prepared = await self.in_thread(lambda: self.preparer.chat(wanted))
        return self._answer(request, prepared, wanted, chat=True)

    async def complete(self, request: Request) -> GenerationResponse:
        wanted = parse_request(CompletionRequest, parse_json(await request.body()))
        self.check_model(wanted.model)
        prepared = await self.in_thread(lambda: self.preparer.complete(wanted))
        return self._answer(request, prepared, wanted, chat=False)

    def _answer(
        self, request: Request, prepared: Prepared, wanted: ChatRequest | CompletionRequest, *, chat: bool
    ) -> GenerationResponse:
        form = Form(
            model=self.model.name,
            chat=chat,
            include_usage=wanted.stream_options.include_usage,
            echo=prepared.echo,
            calls=prepared.calls,
        )
        return self.respond(request, prepared, Answer(form), stream=wanted.stream)

    def respond(self, request: Request, prepared: Prepared, writer: Writer, *, stream: bool) -> GenerationResponse:
        """Submit what was prepared and answer with it. Raises ``ApiError``."""
        generation = Generation(self._backend, prepared.requests, dropped_messages=prepared.dropped_messages)
        return GenerationResponse(generation, writer, stream, request.state.facts)

    async def embed(self, _: Request) -> Response:
        message = f"{self.model.name!r} generates text and makes no vectors of it; serve an encoder for embeddings"
        raise ApiError(400, message, param="model", code="model_not_supported")

    async def in_thread(self, make: Callable[[], _Made]) -> _Made:
        """Run what takes a while beside the event loop. Raises ``ApiError`` 503 when it needs an engine that is not
        there."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, make)
        except NotReadyError as error:
            raise unavailable(error) from error

    def check_model(self, name: str | None) -> None:
        """Raise ``ApiError`` 404 for any name but the model's; None means whichever there is."""
        if name is not None and name != self.model.name:
            message = f"this server has no model of that name; it serves {self.model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model_document(self) -> dict[str, object]:
        facts = {"context": self.info.context, "parameters": self.info.parameters, "engine": self.info.engine}
        return model_document(self.model.name, self.created, facts)


def refusal(error: ApiError, path: str) -> JSONResponse:
    """An ``ApiError`` as a response in the words of the API that ``path`` belongs to."""
    document = error_document(error) if path.startswith("/api/") else error.document
    return JSONResponse(document, error.status, headers=error.headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refusal(error, request.url.path)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    missing = ApiError(error.status_code, error.detail.lower(), code="no_such_route", headers=error.headers)
    return refusal(missing, request.url.path)


async def _on_fault(request: Request, _: Exception) -> Response:
    return refusal(ApiError(500, "the server failed; its log says why", code="internal_error"), request.url.path)


class Observer:
    """Outermost ASGI middleware: counts and logs every answer, and adds the headers that every answer carries."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        route = scope["path"] if scope["path"] in self._routes else "other"
        facts: dict[str, object] = {}
        scope.setdefault("state", {})["facts"] = facts
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            # 499, nginx's number for a client that left, when nobody was there to get a status.
            self._metrics.requests.labels(route, str(status or 499)).inc()
            elapsed_s = round(time.monotonic() - started, 6)
            method = scope["method"] if scope["method"] in {"GET", "POST", "HEAD", "OPTIONS"} else "other"
            request = {"route": route, "method": method, "status": status or 499, "elapsed_s": elapsed_s}
            # The page asks for figures every second; a log on a card should not grow by that.
            if route not in QUIET_ROUTES or status != 200:
                log_event("request", request | facts)


def create_app(backend: Backend, metrics: Metrics, access: Access) -> ASGIApp:
    """The ASGI application for one model. The caller starts and stops the backend."""
    service = Service(backend, metrics, Figures(backend, metrics))
    return guarded(model_routes(service), metrics, access, service.names)


def model_routes(service: Service) -> list[Route]:
    """Everything that a model answers."""
    tokens, ollama = TokenRoutes(service), OllamaRoutes(service)
    return [
        Route("/", service.page, methods=["GET"]),
        Route("/health/live", service.live, methods=["GET"]),
        Route("/health/ready", service.ready, methods=["GET"]),
        Route("/metrics", service.metrics, methods=["GET"]),
        Route("/status", service.status, methods=["GET"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.one_model, methods=["GET"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/embeddings", service.embed, methods=["POST"], include_in_schema=False),
        Route("/api/embed", service.embed, methods=["POST"], include_in_schema=False),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/api/chat", ollama.chat, methods=["POST"]),
        Route("/api/generate", ollama.generate, methods=["POST"]),
        Route("/api/show", ollama.show, methods=["POST"]),
        Route("/api/tags", ollama.tags, methods=["GET"]),
        Route("/api/version", ollama.version, methods=["GET"]),
    ]


def guarded(routes: list[Route], metrics: Metrics, access: Access, names: Callable[[], list[str]]) -> ASGIApp:
    """Routes behind everything that protects and observes them, and one for the document that describes them.

    ``names`` tells the models' names as far as they are known.
    """
    written: dict[tuple[str, ...], bytes] = {}

    def describe(known: tuple[str, ...]) -> bytes:
        from runtime.server.openapi import openapi_document  # a tenth of a second that few servers are asked for

        return json.dumps(openapi_document(routes, known, keyed=access.key is not None)).encode()

    async def openapi(_: Request) -> Response:
        known = tuple(names())
        if known not in written:
            written[known] = await run_in_threadpool(describe, known)
        return Response(written[known], media_type="application/json")

    routes = [*routes, Route("/openapi.json", openapi, methods=["GET"])]

    def refused(error: ApiError, path: str) -> JSONResponse:
        metrics.refusals.labels(error.code or "other").inc()
        return refusal(error, path)

    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Observer, metrics, frozenset(route.path for route in routes)),
            Middleware(Guard, access, refused),
        ],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_fault},
    )
