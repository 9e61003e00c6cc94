"""docs/api.md says what the server does: its examples are run, and every route, field and limit is on it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from live_server import TOOL_TEMPLATE, LiveServer, fake_model, live_server

from runtime.constraint import REGEX_LIMIT_CHARS, SOURCE_LIMIT_CHARS
from runtime.generate import LOGPROBS_LIMIT
from runtime.server import limits
from runtime.server.app import create_app
from runtime.server.limits import Access
from runtime.server.metrics import Metrics
from runtime.server.ollama import ChatBody, GenerateBody, Options, ShowBody
from runtime.server.openai import Body, ChatRequest, CompletionRequest, Message
from runtime.server.routes import DetokenizeBody, TokenizeBody
from runtime.server.worker import Worker

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```sh\n(curl .*?)\n```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(fake_model(FakeEngine(context=2048, sequences=2), source=TOOL_TEMPLATE)) as running:
        yield running


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are for curl")
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(server: LiveServer, example: str) -> None:
    command = example.replace("http://127.0.0.1:8080", server.url).replace("NAME", "fake")
    shell = ["bash", "-c", command.replace("curl ", "curl --fail-with-body --max-time 20 ", 1)]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line and line != "data: [DONE]"]
    documents: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert documents
    if "response_format" in example:
        assert set(json.loads(documents[0]["choices"][0]["message"]["content"])) == {"capital", "coast"}
    if "tool_choice" in example:
        assert documents[0]["choices"][0]["finish_reason"] == "tool_calls"


def test_there_are_examples_of_every_kind() -> None:
    assert len(EXAMPLES) == len(re.findall(r"\bcurl -", PAGE)) >= 10


def test_every_route_is_on_the_page() -> None:
    model = fake_model(FakeEngine())
    metrics = Metrics()
    app: Any = create_app(Worker(model, metrics), metrics, Access())
    for route in app.routes:
        (method,) = route.methods - {"HEAD"}
        path = route.path.replace("{name:path}", "{name}")
        assert f"{method} {path}`" in PAGE, path


@pytest.mark.parametrize(
    "kind", [ChatRequest, CompletionRequest, Message, TokenizeBody, DetokenizeBody, ChatBody, GenerateBody, Options]
)
def test_every_field_is_on_the_page(kind: Any) -> None:
    assert [name for name in kind.model_fields if f"`{name}`" not in PAGE and f'"{name}"' not in PAGE] == []


@pytest.mark.parametrize("kind", [ChatRequest, ChatBody, ShowBody])
def test_every_label_is_on_the_page(kind: type[Body]) -> None:
    assert [name for name in kind.labels if f"`{name}`" not in PAGE] == []


def test_limits_are_those_of_the_code() -> None:
    for said in (
        f"1 to {limits.CHOICE_COUNT_LIMIT} (1)",
        f"up to {limits.STOP_COUNT_LIMIT}, of at most {limits.STOP_LENGTH_LIMIT} characters",
        f"up to {limits.BIAS_COUNT_LIMIT:,} token ids",
        f"1 to {limits.MESSAGE_COUNT_LIMIT:,} |",
        f"up to {limits.TOOL_COUNT_LIMIT} functions",
        f"0 to {LOGPROBS_LIMIT}",
        f"at most {limits.BODY_LIMIT_BYTES // 2**20} MiB and {limits.JSON_DEPTH_LIMIT} levels",
        f"schema or grammar {SOURCE_LIMIT_CHARS // 1024} KiB, regular expression {REGEX_LIMIT_CHARS // 1024} KiB",
    ):
        assert said in PAGE, said


def test_the_refusals_that_are_promised_have_their_tests() -> None:
    root = Path(__file__).resolve().parents[2]
    promised = set(re.findall(r"`(test_\w+)`", (root / "docs" / "serving.md").read_text(encoding="utf-8")))
    sources = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("*/test_*.py"))
    assert len(promised) > 20
    assert promised <= set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
