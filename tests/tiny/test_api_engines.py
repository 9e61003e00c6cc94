"""Constraints, probabilities and choices on the real engines: what a random model says is held to its form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server

from exporter.options import ExportOptions
from exporter.pipeline import export
from runtime.engine import EngineOptions
from runtime.model import open_model
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["größer", "kleiner"]},
    },
    "required": ["word", "count", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp(request.param)
    source = make_tiny_llama(directory / "checkpoint")
    quant = "Q8_0" if request.param == "gguf" else "int8"
    options = ExportOptions(source=str(source), format=request.param, quant=quant, context=200, verify=False)
    bundle: Path = export(options, directory / "bundle").path
    model = open_model(bundle, EngineOptions(context=0, sequences=2, threads_decode=1, threads_prefill=1))
    with live_server(model) as running:
        yield running


def post(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    status, document = server.post("/v1/completions", {"prompt": "the statement", "max_tokens": 150, **fields})
    assert status == 200, document
    choices: list[dict[str, Any]] = document["choices"]
    return choices


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_random_model_is_held_to_a_schema(server: LiveServer, temperature: float) -> None:
    for choice in post(server, structured_outputs={"json": SCHEMA}, temperature=temperature, seed=1, n=3):
        value = json.loads(choice["text"])
        assert set(value) == set(SCHEMA["properties"])  # type: ignore[call-overload]
        assert value["kind"] in {"größer", "kleiner"}
        assert choice["finish_reason"] == "stop"


def test_choices_by_seed_are_those_of_single_requests(server: LiveServer) -> None:
    several = [choice["text"] for choice in post(server, n=3, seed=7, max_tokens=6)]
    single = [post(server, seed=7 + index, max_tokens=6)[0]["text"] for index in range(3)]
    assert several == single


def test_probabilities_add_up_and_bias_does_not_touch_them(server: LiveServer) -> None:
    plain = post(server, logprobs=20, max_tokens=1, temperature=0)[0]["logprobs"]
    assert max(plain["top_logprobs"][0].values()) == plain["token_logprobs"][0]
    assert sum(math.exp(value) for value in plain["top_logprobs"][0].values()) <= 1.001
    (token,) = server.post("/tokenize", {"content": "q"})[1]["tokens"]
    forced = post(server, logprobs=20, max_tokens=1, temperature=0, logit_bias={str(token): 100})[0]["logprobs"]
    assert forced["tokens"] == ["q"]
    assert forced["top_logprobs"][0] == pytest.approx(plain["top_logprobs"][0], abs=1e-3)
    assert forced["token_logprobs"][0] < plain["token_logprobs"][0]
