"""The routes of a server around a model with a task: ``/v1/translate``, ``/v1/fill-mask`` or ``/v1/classify``.

They have one form: ``input`` is a text or a list of texts, the answer has ``data`` with one object per text. Knows HTTP
and what is asked; not engines or sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edgelm.bundle import TaskKind
from edgelm.errors import ContextOverflowError, EngineError, UsageError
from runtime.server.app import guarded
from runtime.server.errors import ApiError
from runtime.server.exposition import CONTENT_TYPE
from runtime.server.figures import Figures
from runtime.server.limits import Access, parse_json, prompt_characters_limit
from runtime.server.metrics import Metrics
from runtime.server.replies import model_document
from runtime.server.task_worker import TaskJob, TaskWorker
from runtime.server.worker import NotReadyError, QueueFullError
from runtime.tasks import TOP_LIMIT, Asked

INPUT_COUNT_LIMIT = 256
MAX_TOKENS_LIMIT = 65536
_FIELDS: Mapping[TaskKind, tuple[str, int]] = {
    "translate": ("max_tokens", MAX_TOKENS_LIMIT),
    "fill-mask": ("top_k", TOP_LIMIT),
}
_GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/api/chat", "/api/generate")


def parse_task_request(document: Any, kind: TaskKind, context: int) -> tuple[list[Asked], str | None]:
    """The texts that a JSON document asks for, and the model that it names. Raises ``ApiError`` 400."""
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    number, most = _FIELDS.get(kind, ("", 0))
    known = {"input", "model", number} - {""}
    unknown = next((name for name in document if name not in known), None)
    if unknown is not None:
        raise ApiError(400, f"unknown field {unknown[:64]!r}", param=unknown[:64], code="unknown_parameter")
    model = document.get("model")
    if model is not None and not (isinstance(model, str) and len(model) <= 256):
        raise _invalid("model", "it must be a string of at most 256 characters")
    value = document.get(number)
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most):
        raise _invalid(number, f"it must be a whole number from 1 to {most}")
    given = document.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not 0 < len(texts) <= INPUT_COUNT_LIMIT:
        raise _invalid("input", f"it must be a text or a list of 1 to {INPUT_COUNT_LIMIT} texts")
    for index, text in enumerate(texts):
        param = "input" if isinstance(given, str) else f"input.{index}"
        if not isinstance(text, str):
            raise _invalid(param, "it must be a text")
        if len(text) > prompt_characters_limit(context):
            told = f"{param}: {len(text)} characters are more than fit; the model takes {context} tokens of one text"
            raise ApiError(400, told, param=param, code="context_length_exceeded")
    options = {} if value is None else {"max_tokens" if kind == "translate" else "top": value}
    return [Asked(text, max_tokens=options.get("max_tokens", 0), top=options.get("top", 5)) for text in texts], model


def _invalid(param: str, told: str) -> ApiError:
    return ApiError(400, f"{param}: {told}", param=param, code="invalid_value")


class TaskService:
    """What the routes share."""

    def __init__(self, worker: TaskWorker, metrics: Metrics, figures: Figures) -> None:
        self._worker, self._metrics, self._model = worker, metrics, worker.model
        self._figures = figures
        self._created = int(time.time())

    async def live(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        state = self._worker.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(await run_in_threadpool(self._metrics.text), headers={"Content-Type": CONTENT_TYPE})

    async def status(self, _: Request) -> Response:
        document = await run_in_threadpool(self._figures.document)
        return JSONResponse(document | {"models": [self.card()]})

    def card(self) -> dict[str, Any]:
        """What a person wants to know of the model, in the form of ``server.card``."""
        facts = {"Task": self._model.kind, "Architecture": self._model.facts.architecture, "Engine": self._model.system}
        shown = {"name": self._model.name, "state": self._worker.state, "generates": False, "facts": facts}
        return shown | {"predicted": None}

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._document()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._document())

    async def other(self, _: Request) -> Response:
        told = f"{self._model.name!r} is for the task {self._model.kind}; it answers /v1/{self._model.kind}"
        raise ApiError(400, told, param="model", code="model_not_supported")

    async def task(self, request: Request) -> Response:
        asked, name = parse_task_request(parse_json(await request.body()), self._model.kind, self._model.context)
        self._check_model(name)
        try:
            job = self._worker.submit(asked)
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after_s)}
            raise ApiError(429, error.message, code="queue_full", headers=headers) from error
        except NotReadyError as error:
            raise ApiError(503, error.message, code="engine_unavailable") from error
        answers = await self._answers(request, job)
        read, written = (
            sum(counts) for counts in zip(*((a.prompt_tokens, a.completion_tokens) for a in answers), strict=True)
        )
        request.state.facts.update({"prompt_tokens": read, "completion_tokens": written, "inputs": len(asked)})
        data = [{"object": self._model.kind, "index": index, **item.document} for index, item in enumerate(answers)]
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return JSONResponse({"object": "list", "data": data, "model": self._model.name, "usage": usage})

    async def _answers(self, request: Request, job: TaskJob) -> Any:
        """Wait for the answers; a client that leaves frees the model. Raises ``ApiError``."""
        watch = asyncio.create_task(_cancel_when_gone(request, self._worker, job))
        try:
            return await asyncio.wrap_future(job.future)
        except ContextOverflowError as error:
            raise ApiError(400, error.message, param="input", code="context_length_exceeded") from error
        except UsageError as error:
            raise _invalid("input", error.message) from error
        except EngineError as error:
            raise ApiError(503, error.message, code="engine_failed") from error
        except asyncio.CancelledError:
            if not job.future.cancelled():
                raise
            raise ApiError(499, "the client left", code="client_left") from None
        finally:
            watch.cancel()
            self._worker.cancel(job)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            message = f"this server has no model of that name; it serves {self._model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _document(self) -> dict[str, object]:
        model = self._model
        facts = {"context": model.context, "parameters": model.facts.parameters, "engine": "onnxruntime"}
        return model_document(model.name, self._created, {**facts, "task": model.kind})


async def _cancel_when_gone(request: Request, worker: TaskWorker, job: TaskJob) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    worker.cancel(job)


def create_task_app(worker: TaskWorker, metrics: Metrics, access: Access) -> ASGIApp:
    """The ASGI application for one model with a task. The caller starts and stops the worker."""
    routes = task_routes(TaskService(worker, metrics, Figures(worker, metrics)), worker.model.kind)
    return guarded(routes, metrics, access)


def task_routes(service: TaskService, kind: TaskKind) -> list[Route]:
    """Everything that a model with a task answers."""
    return [
        Route("/health/live", service.live, methods=["GET"]),
        Route("/health/ready", service.ready, methods=["GET"]),
        Route("/metrics", service.metrics, methods=["GET"]),
        Route("/status", service.status, methods=["GET"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.model, methods=["GET"]),
        Route(f"/v1/{kind}", service.task, methods=["POST"]),
        *(Route(path, service.other, methods=["POST"]) for path in _GENERATING),
    ]
