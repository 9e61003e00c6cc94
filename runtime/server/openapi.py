"""The OpenAPI 3.1 document of a server, made from its routes, from what its requests are checked against and from the
shapes of its answers.

What a route is for stands in one table here, by its path; which routes there are is the server's own list, so the
document tells what this server serves and nothing else. Imported when the document is first asked for. Knows no model
and no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from edgelm import __version__
from runtime.server import embeddings, ollama, openai, routes, shapes, tasks
from runtime.server.exposition import CONTENT_TYPE
from runtime.server.limits import OPEN_ROUTE
from runtime.server.ollama import OllamaAnswer
from runtime.server.replies import Answer

JSON = "application/json"
_REFERENCE = "#/components/schemas/{model}"
_EVENTS = (
    "With `stream` server-sent events: each is `data: ` and a {piece}, the last one `data: [DONE]`. "
    "A failure ends them as Error."
)
_LINES = "With `stream`, which is the default, lines: each of them is a {piece}. A failure ends them as OllamaError."

_HELLO = [{"role": "user", "content": "Hello"}]

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Operation:
    """What one route takes and gives. ``answer`` None is no JSON: the answer's type is then ``media`` alone. ``pieces``
    are those of a stream of the type ``media``."""

    summary: str
    answer: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    media: str = ""
    pieces: type[BaseModel] | None = None
    also: int = 0
    """Another status with the same answer."""
    example: Document | None = None
    """A request that shows what the route is for; the name of a model is added where one is needed."""


_OPERATIONS: Mapping[str, Operation] = {
    "/": Operation("The page for people", media="text/html; charset=utf-8"),
    "/openapi.json": Operation("This document", media=JSON),
    "/health/live": Operation("Whether the server answers; no key is needed", shapes.Liveness),
    "/health/ready": Operation("Whether the engine computes: 503 when it does not", shapes.Readiness, also=503),
    "/metrics": Operation("Figures for Prometheus", media=CONTENT_TYPE),
    "/status": Operation("Figures and cards, as the page draws them", shapes.Status),
    "/v1/models": Operation("The models that are served", shapes.ModelList),
    "/v1/models/{name}": Operation("One model", shapes.ModelEntry),
    "/v1/chat/completions": Operation(
        "Answer a conversation",
        shapes.ChatCompletion,
        openai.ChatRequest,
        Answer.media_type,
        shapes.ChatPiece,
        example={"messages": _HELLO, "max_tokens": 8, "logprobs": True},
    ),
    "/v1/completions": Operation(
        "Continue a text",
        shapes.TextCompletion,
        openai.CompletionRequest,
        Answer.media_type,
        shapes.TextPiece,
        example={"prompt": "Once upon a time", "max_tokens": 8, "n": 2, "logprobs": 2},
    ),
    "/v1/embeddings": Operation(
        "Vectors of texts", shapes.Embeddings, embeddings.EmbeddingRequest, example={"input": ["a text", "another"]}
    ),
    "/v1/translate": Operation(
        "Translate texts",
        shapes.Translations,
        tasks.TranslateRequest,
        example={"input": ["Good morning.", "How are you?"]},
    ),
    "/v1/fill-mask": Operation(
        "Find words for masks",
        shapes.FilledTexts,
        tasks.FillMaskRequest,
        example={"input": "Paris is the [MASK] of France.", "top_k": 3},
    ),
    "/v1/classify": Operation(
        "Label texts", shapes.LabelledTexts, tasks.ClassifyRequest, example={"input": "What a fine day!"}
    ),
    "/tokenize": Operation(
        "Token ids of a text or of a conversation",
        shapes.Tokens,
        routes.TokenizeBody,
        example={"messages": _HELLO, "with_pieces": True},
    ),
    "/detokenize": Operation("Text of token ids", shapes.Content, routes.DetokenizeBody, example={"tokens": [72, 105]}),
    "/api/chat": Operation(
        "Answer a conversation (Ollama)",
        shapes.OllamaChat,
        ollama.ChatBody,
        OllamaAnswer.media_type,
        shapes.OllamaChat,
        example={"messages": _HELLO, "options": {"num_predict": 8}},
    ),
    "/api/generate": Operation(
        "Answer a prompt (Ollama)",
        shapes.OllamaText,
        ollama.GenerateBody,
        OllamaAnswer.media_type,
        shapes.OllamaText,
        example={"prompt": "Hello", "options": {"num_predict": 8}, "logprobs": True},
    ),
    "/api/embed": Operation(
        "Vectors of texts (Ollama)", shapes.OllamaVectors, ollama.EmbedBody, example={"input": ["a text", "another"]}
    ),
    "/api/show": Operation("What is known of a model (Ollama)", shapes.OllamaModel, ollama.ShowBody, example={}),
    "/api/tags": Operation("The models that are served (Ollama)", shapes.OllamaTags),
    "/api/version": Operation("The version of Ollama's API that is spoken here", shapes.OllamaVersion),
}

_GUARDED = {
    400: "The request is malformed or asks for what cannot be done; `param` names the field",
    403: "The Host or the Origin is not one that this server answers",
    408: "The body did not arrive in time",
    413: "The body is too large",
    431: "The headers are too large",
    503: "The engine is loading, dead or stopping, or too many connections are open (as plain text)",
}
_NAMED = {404: "There is no such model"}
_COMPUTED = {429: "All places are taken; Retry-After tells when to come again"}
_KEYED = {401: "The API key is missing or wrong"}


def openapi_document(served: Sequence[Route], names: Sequence[str], *, keyed: bool) -> Document:
    """The document of a server with the routes ``served``; those that are not included in its schema are left out.

    ``names`` are those of the models as far as they are known, ``keyed`` tells whether clients need a key. Raises
    ``KeyError`` for a path that the table does not know.
    """
    operations = {path: (_OPERATIONS[path], method) for path, method in _public(served)}
    components = _schemas([operation for operation, _ in operations.values()])
    for path, (operation, _) in operations.items():
        if operation.body is not None and names:
            _name_models(components[operation.body.__name__], _spoken(path, names))
    paths = {
        path: {method: _operation(path, operation, names, keyed=keyed)}
        for path, (operation, method) in operations.items()
    }
    document: Document = {
        "openapi": "3.1.0",
        "info": {
            "title": "EdgeLM",
            "version": __version__,
            "summary": "A server of small language models",
            "description": f"Models: {', '.join(names)}." if names else "The model is being loaded.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": components},
    }
    if keyed:
        bearer, basic = {"type": "http", "scheme": "bearer"}, {"type": "http", "scheme": "basic"}
        document["components"]["securitySchemes"] = {
            "bearer": bearer,
            "basic": basic | {"description": "The key is the password; for browsers."},
        }
        document["security"] = [{"bearer": []}, {"basic": []}]
    return document


def _public(served: Sequence[Route]) -> Iterator[tuple[str, Literal["get", "post"]]]:
    for route in served:
        if route.include_in_schema:
            yield route.path_format, "post" if "POST" in (route.methods or ()) else "get"


def _schemas(operations: Sequence[Operation]) -> Document:
    """Schemas of everything that the operations speak of, by name."""
    bodies = {operation.body for operation in operations if operation.body is not None}
    answers = {kind for operation in operations for kind in (operation.answer, operation.pieces) if kind is not None}
    wanted: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        *((body, "validation") for body in bodies),
        *((answer, "validation") for answer in answers | {shapes.Error, shapes.OllamaError}),
    ]
    _, document = models_json_schema(sorted(wanted, key=lambda item: item[0].__name__), ref_template=_REFERENCE)
    schemas: Document = document["$defs"]
    return schemas


def _spoken(path: str, names: Sequence[str]) -> list[str]:
    """Names by which clients ask for models; Ollama's add a tag to every name that has none."""
    return [*names, *(f"{name}:latest" for name in names)] if path.startswith("/api/") else list(names)


def _name_models(body: Document, names: Sequence[str]) -> None:
    for field in ("model", "name"):
        if field in body["properties"]:
            absent = [] if field in body.get("required", ()) else [None]
            body["properties"][field] = {"enum": [*names, *absent], "description": "The model."}


def _operation(path: str, operation: Operation, names: Sequence[str], *, keyed: bool) -> Document:
    told: Document = {"summary": operation.summary, "operationId": _identifier(path)}
    statuses = dict(_GUARDED)
    if "{name}" in path or operation.body is not None:
        statuses |= _NAMED
    if "{name}" in path:
        schema: Document = {"type": "string", "minLength": 1} | ({"enum": list(names)} if names else {})
        told["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": schema}]
    if operation.body is not None:
        statuses |= _COMPUTED
        content = {"schema": _reference(operation.body), "examples": _examples(path, operation, names)}
        told["requestBody"] = {"required": True, "content": {JSON: content}}
    if path == OPEN_ROUTE:
        told["security"] = []
    elif keyed:
        statuses |= _KEYED
    error = shapes.OllamaError if path.startswith("/api/") else shapes.Error
    failed = {JSON: {"schema": _reference(error)}}
    responses: Document = {
        str(status): {"description": text, "content": dict(failed)} for status, text in sorted(statuses.items())
    }
    responses["503"]["content"]["text/plain; charset=utf-8"] = {"schema": {"type": "string"}}
    if operation.also:
        assert operation.answer is not None
        either = {"anyOf": [_reference(operation.answer), _reference(error)]}
        responses[str(operation.also)]["content"][JSON] = {"schema": either}
    told["responses"] = {"200": _success(operation), **responses}
    return told


def _examples(path: str, operation: Operation, names: Sequence[str]) -> Document:
    example = dict(operation.example or {})
    if path.startswith("/api/") and names:  # Ollama's requests have to name it
        example["model"] = names[0]
    found: Document = {"whole": {"value": example}}
    if operation.pieces is not None:
        found = {"whole": {"value": example | {"stream": False}}, "streamed": {"value": example | {"stream": True}}}
    return found


def _success(operation: Operation) -> Document:
    content: Document = {}
    if operation.answer is not None:
        content[JSON] = {"schema": _reference(operation.answer)}
    told = operation.summary
    if operation.pieces is not None:
        # OpenAPI 3.1 has no schema for what comes piece by piece.
        content[operation.media] = {"x-pieces": _reference(operation.pieces)}
        text = _EVENTS if operation.media == Answer.media_type else _LINES
        told = f"{told}. {text.format(piece=operation.pieces.__name__)}"
    elif operation.media:
        content[operation.media] = {"schema": {"type": "object" if operation.media == JSON else "string"}}
    return {"description": told, "content": content}


def _reference(kind: type[BaseModel]) -> Document:
    return {"$ref": _REFERENCE.format(model=kind.__name__)}


def _identifier(path: str) -> str:
    return (
        "".join(part if part.isalnum() else "_" for part in path.replace("{", "").replace("}", "")).strip("_") or "page"
    )
