"""Schemathesis, told what OpenAPI 3.1 has no words for: every piece of a stream has the shape that is named for it."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import schemathesis


def pieces(text: str, media: str) -> list[Any]:
    """The documents of a streamed body. Raises ``AssertionError`` when it is not written as its type demands."""
    if media == "application/x-ndjson":
        assert text.endswith("\n"), "the last line has no end"
        return [json.loads(line) for line in text.splitlines()]
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events), "an event without data"
    told = [event.removeprefix("data: ") for event in events]
    assert told.pop() == "[DONE]", "no end mark"
    return [json.loads(piece) for piece in told]


@schemathesis.check
def stream_pieces_conformance(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    """Every piece of a stream has the shape that ``x-pieces`` names."""
    media = response.headers.get("content-type", [""])[0]
    document: Any = case.operation.schema.raw_schema
    operation = document["paths"][case.operation.path].get(case.operation.method, {})
    answer = operation.get("responses", {}).get(str(response.status_code), {}).get("content", {}).get(media, {})
    if "x-pieces" not in answer:
        return
    judge = jsonschema.Draft202012Validator({**answer["x-pieces"], "components": document["components"]})
    told = pieces(response.text, media.partition(";")[0])
    assert told, "a stream of nothing"
    for piece in told:
        wrong = next(judge.iter_errors(piece), None)
        assert wrong is None, f"{case.operation.label}: {wrong.message} in {piece}"
