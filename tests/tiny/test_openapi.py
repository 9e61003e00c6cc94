"""``/openapi.json``: valid by an outside reading, true for the server that gives it, and held against its answers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from fake_encoder import FakeEncoder, fake_encoder_model, live_embedding_server
from fake_engine import FakeEngine
from live_server import LiveServer, fake_model, live_server
from openapi_judge import KEY, SERVERS, judge

from runtime.server import openapi, shapes
from runtime.server.limits import Access

validator = pytest.importorskip("openapi_spec_validator", reason="it and schemathesis want Python 3.11")
CASES = 2
GENERATING = {"/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate"}


def document_of(server: LiveServer) -> dict[str, Any]:
    status, headers, body = server.request("GET", "/openapi.json", headers={"Authorization": f"Bearer {server.key}"})
    assert (status, headers["content-type"]) == (200, "application/json")
    document: dict[str, Any] = json.loads(body)
    validator.OpenAPIV31SpecValidator(document).validate()
    return document


def test_a_text_model_s_document_is_of_text() -> None:
    with live_server(fake_model(FakeEngine(script="ok"))) as server:
        document = document_of(server)
        assert set(document["paths"]) > GENERATING
        assert "/v1/embeddings" not in document["paths"]
        chat = document["components"]["schemas"]["ChatRequest"]
        assert chat["properties"]["model"]["enum"] == ["fake", None]
        assert chat["properties"]["user"] == {"description": "Read by nobody."}
        assert chat["properties"]["best_of"] == {"enum": [None, 1]}
        assert "security" not in document
        for path, methods in document["paths"].items():
            kind = "OllamaError" if path.startswith("/api/") else "Error"
            (operation,) = methods.values()
            reference = operation["responses"]["413"]["content"]["application/json"]["schema"]
            assert reference == {"$ref": f"#/components/schemas/{kind}"}
        for path in GENERATING:
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            for example in body["examples"].values():
                status, headers, _ = server.request("POST", path, json.dumps(example["value"]))
                assert status == 200
                assert headers["content-type"] in document["paths"][path]["post"]["responses"]["200"]["content"]


def test_an_encoder_s_document_is_of_vectors() -> None:
    with live_embedding_server(fake_encoder_model(FakeEncoder())) as server:
        document = document_of(server)
        assert "/v1/embeddings" in document["paths"]
        assert not GENERATING & set(document["paths"])


@pytest.mark.parametrize("kind", ["translate", "fill-mask", "classify"])
def test_a_task_s_document_is_of_that_task(kind: str) -> None:
    with SERVERS[kind]() as server:
        paths = document_of(server)["paths"]
        assert {path for path in paths if path.startswith("/v1/")} == {f"/v1/{kind}", "/v1/models", "/v1/models/{name}"}


def test_a_key_is_part_of_the_document() -> None:
    with live_server(fake_model(FakeEngine(script="ok")), Access(key=KEY.encode())) as server:
        assert server.request("GET", "/openapi.json")[0] == 401
        document = document_of(server)
        assert document["security"] == [{"bearer": []}, {"basic": []}]
        assert document["paths"]["/health/live"]["get"]["security"] == []
        assert "401" not in document["paths"]["/health/live"]["get"]["responses"]
        assert "401" in document["paths"]["/v1/models"]["get"]["responses"]


@pytest.mark.parametrize("kind", ["text", "translate", "several"])
def test_schemathesis_finds_no_answer_that_contradicts_the_document(kind: str) -> None:
    with SERVERS[kind]() as server:
        fine, told = judge(server, CASES, seed=1)
    assert fine, told


def test_a_document_that_lies_of_streams_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/v1/completions"
    truth = openapi._OPERATIONS[path]
    lying = {**openapi._OPERATIONS, path: dataclasses.replace(truth, pieces=shapes.ChatPiece)}
    monkeypatch.setattr(openapi, "_OPERATIONS", lying)
    with live_server(fake_model(FakeEngine(script="ok"))) as server:
        fine, told = judge(server, 1, seed=1, only=path)
    assert not fine
    assert "'chat.completion.chunk' was expected" in told
