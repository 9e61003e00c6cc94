"""``/v1/embeddings``, Ollama's ``/api/embed`` and the other routes of a server around an encoder.

What OpenAI's clients send: a text, a list of texts, a list of token ids or a list of such lists; vectors as numbers or
as base64 of little-endian float32. Every field that cannot be honoured is refused by name. Knows HTTP and the encoder's
words; not engines or sockets.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PlainValidator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edgelm.errors import EdgelmError, EngineError
from runtime.embedding import LoadedEncoder
from runtime.encoder import Vectors
from runtime.server.app import guarded
from runtime.server.card import card
from runtime.server.embedding_worker import EmbeddingJob, EmbeddingWorker
from runtime.server.errors import ApiError
from runtime.server.exposition import CONTENT_TYPE
from runtime.server.figures import Figures
from runtime.server.limits import INPUT_COUNT_LIMIT, Access, parse_json, prompt_characters_limit
from runtime.server.metrics import Metrics
from runtime.server.ollama import EmbedBody, vectors_document
from runtime.server.openai import INTEGER_LIMIT, Body, ModelName, TokenId, parse_request
from runtime.server.replies import model_document
from runtime.server.worker import NotReadyError, QueueFullError

_GENERATING = ("/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate")


def _inputs(value: Any) -> tuple[str, ...] | tuple[tuple[int, ...], ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise _invalid("input", "it must be a text, token ids, or a list of either that is not empty")
    if all(_is_count(item) for item in value):
        return (tuple(value),)
    if len(value) > INPUT_COUNT_LIMIT:
        raise _invalid("input", f"{len(value)} inputs; at most {INPUT_COUNT_LIMIT} are taken")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    for index, item in enumerate(value):
        if not isinstance(item, list) or not item or not all(_is_count(token) for token in item):
            raise _invalid(f"input.{index}", "it must be of the same kind as the others: a text, or token ids")
    return tuple(tuple(item) for item in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _invalid(param: str, told: str) -> ApiError:
    return ApiError(400, f"{param}: {told}", param=param, code="invalid_value")


_Ids = Annotated[list[TokenId], Field(min_length=1)]
_Several = Field(min_length=1, max_length=INPUT_COUNT_LIMIT)


class EmbeddingRequest(Body):
    """Body of ``POST /v1/embeddings``. ``input`` holds texts or token ids, never both."""

    labels: ClassVar[frozenset[str]] = frozenset({"user"})

    # The kinds are told apart by hand: a union's error would not say which of thousands of inputs is of another kind.
    input: Annotated[
        tuple[str, ...] | tuple[tuple[int, ...], ...],
        PlainValidator(
            _inputs,
            json_schema_input_type=str | _Ids | Annotated[list[str], _Several] | Annotated[list[_Ids], _Several],
        ),
    ]
    model: ModelName | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, le=INTEGER_LIMIT)


class EmbeddingService:
    """What the routes share: the encoder's words, its worker and one thread for tokenizing."""

    def __init__(self, model: LoadedEncoder, worker: EmbeddingWorker, metrics: Metrics, figures: Figures) -> None:
        self._model = model
        self._figures = figures
        self._worker = worker
        self._metrics = metrics
        self._info = model.encoder.info
        self._created = int(time.time())
        self._tokenizing = ThreadPoolExecutor(1, "encode")

    async def live(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        state = self._worker.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self, _: Request) -> Response:
        return Response(await run_in_threadpool(self._metrics.text), headers={"Content-Type": CONTENT_TYPE})

    async def status(self, _: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._figures.document) | {"models": self.cards()})

    def cards(self) -> list[dict[str, Any]]:
        """The encoder's card."""
        return [card(self._model.name, self._worker.state, self._info, self._model.manifest)]

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._document()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._document())

    async def generate(self, _: Request) -> Response:
        raise ApiError(
            400,
            f"{self._model.name!r} is an encoder: it generates no text; it answers /v1/embeddings",
            param="model",
            code="model_not_supported",
        )

    async def embeddings(self, request: Request) -> Response:
        wanted = parse_request(EmbeddingRequest, parse_json(await request.body()))
        self._check_model(wanted.model)
        self._check_dimensions(wanted.dimensions)
        loop = asyncio.get_running_loop()
        sequences = await loop.run_in_executor(self._tokenizing, self._sequences, wanted.input)
        vectors = await self._vectors(request, sequences)
        tokens = sum(map(len, sequences))
        request.state.facts.update({"prompt_tokens": tokens, "inputs": len(sequences)})
        # Thousands of vectors take a while to write down; the event loop is needed by others.
        answer: Response = await loop.run_in_executor(
            self._tokenizing, self._answer, vectors, tokens, wanted.encoding_format
        )
        return answer

    async def ollama(self, request: Request) -> Response:
        """``/api/embed``; Ollama's clients add a tag to every name that has none."""
        started = time.monotonic()
        wanted = parse_request(EmbedBody, parse_json(await request.body()))
        self._check_model(wanted.model.removesuffix(":latest"))
        self._check_dimensions(wanted.dimensions)
        loop = asyncio.get_running_loop()
        sequences = await loop.run_in_executor(
            self._tokenizing, lambda: self._sequences(wanted.texts, cut=wanted.truncate)
        )
        vectors = await self._vectors(request, sequences)
        tokens = sum(map(len, sequences))
        request.state.facts.update({"prompt_tokens": tokens, "inputs": len(sequences)})

        def write() -> Response:
            elapsed_s = time.monotonic() - started
            return JSONResponse(vectors_document(self._model.name, vectors.tolist(), tokens, elapsed_s))

        return await loop.run_in_executor(self._tokenizing, write)

    def _check_dimensions(self, dimensions: int | None) -> None:
        if dimensions not in (None, self._info.dimensions):
            told = f"vectors of this model have {self._info.dimensions} numbers and were not trained to be cut"
            raise _invalid("dimensions", told)

    def _sequences(self, inputs: Sequence[str | tuple[int, ...]], *, cut: bool = False) -> list[Sequence[int]]:
        """Token ids of every input; ``cut`` takes the beginning of texts that are too long. Raises ``ApiError`` naming
        the first that cannot be computed."""
        found: list[Sequence[int]] = []
        for index, item in enumerate(inputs):
            param = "input" if len(inputs) == 1 else f"input.{index}"
            ids: Sequence[int] = self._text_ids(item, param, cut=cut) if isinstance(item, str) else item
            if len(ids) > self._info.context:
                raise _too_long(param, f"{len(ids)} tokens", self._info.context)
            outside = next((token for token in ids if token >= self._info.vocabulary), None)
            if outside is not None:
                raise _invalid(param, f"token {outside} is outside the vocabulary of {self._info.vocabulary}")
            if not ids:
                raise _invalid(param, "it is empty")
            found.append(ids)
        return found

    def _text_ids(self, text: str, param: str, *, cut: bool) -> list[int]:
        context = self._info.context
        if cut:
            text = text[: prompt_characters_limit(context)]
        elif len(text) > prompt_characters_limit(context):
            raise _too_long(param, f"{len(text)} characters", context)
        try:
            return self._model.text_ids(text, context if cut else None)
        except EdgelmError as error:
            raise _invalid(param, error.message) from error

    async def _vectors(self, request: Request, sequences: Sequence[Sequence[int]]) -> Vectors:
        """Wait for the vectors; a client that leaves frees the encoder. Raises ``ApiError``."""
        try:
            job = self._worker.submit(sequences)
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after_s)}
            raise ApiError(429, error.message, code="queue_full", headers=headers) from error
        except NotReadyError as error:
            raise ApiError(503, error.message, code="engine_unavailable") from error
        watch = asyncio.create_task(_cancel_when_gone(request, self._worker.cancel, job))
        try:
            return await asyncio.wrap_future(job.future)
        except EngineError as error:
            raise ApiError(503, error.message, code="engine_failed") from error
        except asyncio.CancelledError:
            if not job.future.cancelled():
                raise
            raise ApiError(499, "the client left", code="client_left") from None
        finally:
            watch.cancel()
            self._worker.cancel(job)

    def _answer(self, vectors: Vectors, tokens: int, encoding: Literal["float", "base64"]) -> Response:
        write: Callable[[Vectors], Any] = _as_base64 if encoding == "base64" else _as_numbers
        data = [
            {"object": "embedding", "index": index, "embedding": write(vector)} for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self._model.name, "usage": usage})

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            message = f"this server has no model of that name; it serves {self._model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _document(self) -> dict[str, object]:
        info = self._info
        facts = {"context": info.context, "parameters": info.parameters, "engine": info.engine}
        return model_document(self._model.name, self._created, {**facts, "dimensions": info.dimensions})


async def _cancel_when_gone(request: Request, cancel: Callable[[EmbeddingJob], None], job: EmbeddingJob) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    cancel(job)


def _too_long(param: str, size: str, context: int) -> ApiError:
    message = f"{param}: {size} are more than fit; the encoder takes {context} tokens of one text"
    return ApiError(400, message, param=param, code="context_length_exceeded")


def _as_numbers(vector: Vectors) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _as_base64(vector: Vectors) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()


def create_embedding_app(model: LoadedEncoder, worker: EmbeddingWorker, metrics: Metrics, access: Access) -> ASGIApp:
    """The ASGI application for one encoder. The caller starts and stops the worker."""
    service = EmbeddingService(model, worker, metrics, Figures(worker, metrics))
    return guarded(embedding_routes(service), metrics, access, lambda: [model.name])


def embedding_routes(service: EmbeddingService) -> list[Route]:
    """Everything that an encoder answers."""
    return [
        Route("/health/live", service.live, methods=["GET"]),
        Route("/health/ready", service.ready, methods=["GET"]),
        Route("/metrics", service.metrics, methods=["GET"]),
        Route("/status", service.status, methods=["GET"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.model, methods=["GET"]),
        Route("/v1/embeddings", service.embeddings, methods=["POST"]),
        Route("/api/embed", service.ollama, methods=["POST"]),
        *(Route(path, service.generate, methods=["POST"], include_in_schema=False) for path in _GENERATING),
    ]
