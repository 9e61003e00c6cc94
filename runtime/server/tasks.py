"""The routes of a server around a model with a task: ``/v1/translate``, ``/v1/fill-mask`` or ``/v1/classify``.

They have one form: ``input`` is a text or a list of texts, the answer has ``data`` with one object per text. Knows HTTP
and what is asked; not engines or sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
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
from runtime.server.openai import Body, ModelName, parse_request
from runtime.server.replies import model_document
from runtime.server.task_worker import TaskJob, TaskWorker
from runtime.server.worker import NotReadyError, QueueFullError
from runtime.tasks import TOP, TOP_LIMIT, Asked

INPUT_COUNT_LIMIT = 256
MAX_TOKENS_LIMIT = 65536
_GENERATING = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/api/chat",
    "/api/generate",
    "/api/embed",
)


class _TaskRequest(Body):
    """What the bodies of all tasks hold: a text or a list of texts."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=INPUT_COUNT_LIMIT)]
    model: ModelName | None = None

    @property
    def asked(self) -> list[Asked]:
        """Every text with what it is asked for."""
        return [self._asked(text) for text in ([self.input] if isinstance(self.input, str) else self.input)]

    def check_lengths(self, context: int) -> None:
        """Raises ``ApiError`` 400 for a text that no tokenizer could bring into ``context`` tokens."""
        for index, asked in enumerate(self.asked):
            param = "input" if isinstance(self.input, str) else f"input.{index}"
            if len(asked.text) > prompt_characters_limit(context):
                told = f"{len(asked.text)} characters are more than fit; the model takes {context} tokens of one text"
                raise ApiError(400, f"{param}: {told}", param=param, code="context_length_exceeded")

    def _asked(self, text: str) -> Asked:
        return Asked(text)


class TranslateRequest(_TaskRequest):
    """Body of ``POST /v1/translate``. Without ``max_tokens`` as many are written as the model usually writes."""

    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS_LIMIT)

    def _asked(self, text: str) -> Asked:
        return Asked(text, max_tokens=self.max_tokens or 0)


class FillMaskRequest(_TaskRequest):
    """Body of ``POST /v1/fill-mask``: ``top_k`` words for each mask."""

    top_k: int = Field(default=TOP, ge=1, le=TOP_LIMIT)

    def _asked(self, text: str) -> Asked:
        return Asked(text, top=self.top_k)


class ClassifyRequest(_TaskRequest):
    """Body of ``POST /v1/classify``."""


BODIES: Mapping[TaskKind, type[_TaskRequest]] = {
    "translate": TranslateRequest,
    "fill-mask": FillMaskRequest,
    "classify": ClassifyRequest,
}


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
        wanted = parse_request(BODIES[self._model.kind], parse_json(await request.body()))
        wanted.check_lengths(self._model.context)
        self._check_model(wanted.model)
        asked = wanted.asked
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
    return guarded(routes, metrics, access, lambda: [worker.model.name])


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
        *(Route(path, service.other, methods=["POST"], include_in_schema=False) for path in _GENERATING),
    ]
