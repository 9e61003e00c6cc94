"""The routes: requests in, generations submitted, answers out.

Builds a Starlette application around one backend. Knows HTTP and the model's words; not engines,
batches or sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgelm.errors import ContextOverflowError, EdgelmError
from edgelm.units import format_bytes
from runtime.engine import EngineInfo
from runtime.generate import GenerationRequest, check_request
from runtime.model import PromptingModel
from runtime.server.answering import Generation, GenerationResponse, unavailable
from runtime.server.errors import ApiError
from runtime.server.limits import Access, Guard, parse_json, prompt_characters_limit
from runtime.server.logs import log_event
from runtime.server.metrics import CONTENT_TYPE, Metrics
from runtime.server.openai import Answer, ChatRequest, CompletionRequest, model_document, parse_request
from runtime.server.page import Page
from runtime.server.worker import Backend, NotReadyError

_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}


class Service:
    """What the routes share: the backend, the counters and one thread for templates and tokenizing."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._created = int(time.time())
        # Encoding a long prompt must not hold up the event loop, and one core is enough for it.
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._page: Page | None = None

    @property
    def _model(self) -> PromptingModel:
        """The model that is served. Raises ``ApiError`` 503 while it is loaded for the first time."""
        try:
            return self._backend.model
        except NotReadyError as error:
            raise unavailable(error) from error

    @property
    def _info(self) -> EngineInfo:
        """What the engine says of itself. Raises ``ApiError`` 503 while it is loaded for the first time."""
        try:
            return self._backend.info
        except NotReadyError as error:
            raise unavailable(error) from error

    async def page(self, _: Request) -> Response:
        if self._page is None:
            self._page = Page(self._model.name, self._facts())
        return HTMLResponse(self._page.html, headers={"Content-Security-Policy": self._page.policy})

    async def live(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        state = self._backend.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_document()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_document())

    async def chat(self, request: Request) -> GenerationResponse:
        wanted = parse_request(ChatRequest, parse_json(await request.body()))
        self._check_model(wanted.model)
        prompt = await self._encode(lambda: self._chat_prompt(wanted), "messages")
        answer = Answer(self._model.name, chat=True, include_usage=wanted.stream_options.include_usage)
        return self._generate(request, prompt, wanted, answer)

    async def complete(self, request: Request) -> GenerationResponse:
        wanted = parse_request(CompletionRequest, parse_json(await request.body()))
        self._check_model(wanted.model)
        prompt = await self._encode(lambda: self._completion_prompt(wanted), "prompt")
        answer = Answer(self._model.name, chat=False, include_usage=wanted.stream_options.include_usage)
        return self._generate(request, prompt, wanted, answer)

    async def embed(self, _: Request) -> Response:
        message = f"{self._model.name!r} generates text and makes no vectors of it; serve an encoder for embeddings"
        raise ApiError(400, message, param="model", code="model_not_supported")

    def _generate(
        self, request: Request, prompt: list[int], wanted: ChatRequest | CompletionRequest, answer: Answer
    ) -> GenerationResponse:
        """Submit what was asked for, as far as the context reaches. Raises ``ApiError``."""
        # The last token is sampled but never computed, so one more than the free places can be generated.
        room = self._info.context - len(prompt) + 1
        generation = GenerationRequest(
            prompt=prompt,
            max_tokens=max(1, min(wanted.tokens_wanted or room, room)),
            sampling=wanted.sampling,
            stop=tuple(wanted.stop),
            stop_tokens=self._model.stop_tokens,
        )
        try:
            check_request(generation, self._info.context)
        except ContextOverflowError as error:
            param = "messages" if isinstance(wanted, ChatRequest) else "prompt"
            raise ApiError(400, error.message, param=param, code="context_length_exceeded") from error
        return GenerationResponse(Generation(self._backend, generation), answer, wanted.stream, request.state.facts)

    def _chat_prompt(self, wanted: ChatRequest) -> list[int]:
        self._check_length(sum(len(message.text) for message in wanted.messages), "messages")
        return self._model.chat_prompt([message.template_message for message in wanted.messages])

    def _completion_prompt(self, wanted: CompletionRequest) -> list[int]:
        prompt = wanted.prompt_text_or_ids
        if isinstance(prompt, str):
            self._check_length(len(prompt), "prompt")
            return self._model.text_prompt(prompt)
        outside = next((token for token in prompt if token >= self._info.vocabulary), None)
        if outside is not None:
            message = f"prompt: token {outside} is outside the vocabulary of {self._info.vocabulary}"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        return prompt

    def _check_length(self, characters: int, param: str) -> None:
        limit = prompt_characters_limit(self._info.context)
        if characters > limit:
            message = (
                f"{param}: {characters} characters are more than fit; the context holds {self._info.context} tokens"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    async def _encode(self, make: Callable[[], list[int]], param: str) -> list[int]:
        try:
            prompt = await asyncio.get_running_loop().run_in_executor(self._encoder, make)
        except NotReadyError as error:
            raise unavailable(error) from error
        except EdgelmError as error:
            raise ApiError(400, f"{param}: {error.message}", param=param, code="invalid_value") from error
        if not prompt:
            raise ApiError(400, f"{param}: it is empty", param=param, code="invalid_value")
        return prompt

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            message = f"this server has no model of that name; it serves {self._model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _model_document(self) -> dict[str, object]:
        facts = {"context": self._info.context, "parameters": self._info.parameters, "engine": self._info.engine}
        return model_document(self._model.name, self._created, facts)

    def _facts(self) -> dict[str, str]:
        """The card on the page: what a person wants to know of the model that answers."""
        info, manifest = self._info, self._model.manifest
        facts = {
            "Architecture": info.architecture,
            "Parameters": f"{info.parameters / 1e6:.1f} million",
            "Weights": format_bytes(info.weights_bytes),
            "Context": f"{info.context} tokens, {info.sequences} at once",
            "KV cache": format_bytes(info.kv_bytes),
            "Engine": f"{info.engine}, {info.threads_decode} threads",
        }
        if manifest is not None:
            facts["Quantisation"] = f"{manifest.plan.quant}, {manifest.plan.bits_per_weight:.2f} bits per weight"
            facts["Source"] = manifest.source.location
        if manifest is not None and manifest.quality is not None:
            facts["Mean KL to the original"] = f"{manifest.quality.kl_mean:.4f} nats per token"
            facts["Same first choice"] = f"{100 * manifest.quality.top1_agreement:.1f} % of tokens"
        return facts


def refusal(error: ApiError) -> JSONResponse:
    """An ``ApiError`` as a response."""
    return JSONResponse(error.document, error.status, headers=error.headers)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refusal(error)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refusal(ApiError(error.status_code, error.detail.lower(), code="no_such_route", headers=error.headers))


async def _on_fault(_: Request, __: Exception) -> Response:
    return refusal(ApiError(500, "the server failed; its log says why", code="internal_error"))


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
            log_event("request", request | facts)


def create_app(backend: Backend, metrics: Metrics, access: Access) -> ASGIApp:
    """The ASGI application for one model. The caller starts and stops the backend."""
    service = Service(backend, metrics)
    routes = [
        Route("/", service.page, methods=["GET"]),
        Route("/health/live", service.live, methods=["GET"]),
        Route("/health/ready", service.ready, methods=["GET"]),
        Route("/metrics", service.metrics, methods=["GET"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.model, methods=["GET"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/embeddings", service.embed, methods=["POST"]),
    ]
    return guarded(routes, metrics, access)


def guarded(routes: list[Route], metrics: Metrics, access: Access) -> ASGIApp:
    """Routes behind everything that protects and observes them."""
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Observer, metrics, frozenset(route.path for route in routes)),
            Middleware(Guard, access, refusal),
        ],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_fault},
    )
