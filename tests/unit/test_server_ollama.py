"""Ollama's routes by Ollama's own client, unmodified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from fake_engine import FakeEngine
from live_server import TOOL_TEMPLATE, LiveServer, fake_model, live_server

SAY = "Hello there."
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
QUESTION: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(fake_model(FakeEngine(script=SAY, context=1024, sequences=2), source=TOOL_TEMPLATE)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url, timeout=20) as made:
        yield made


@pytest.mark.parametrize("name", ["fake", "fake:latest"])
def test_chat_whole_and_streamed(client: ollama.Client, name: str) -> None:
    whole = client.chat(name, messages=QUESTION)
    assert (whole.message.role, whole.message.content, whole.done_reason) == ("assistant", SAY, "stop")
    assert whole.done
    assert (whole.eval_count, whole.prompt_eval_count) == (len(SAY), 21)
    assert whole.total_duration is not None
    assert whole.total_duration >= (whole.eval_duration or 0) > 0
    parts = list(client.chat(name, messages=QUESTION, stream=True))
    assert "".join(part.message.content or "" for part in parts) == SAY
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("stop", len(SAY))


def test_generate_whole_streamed_and_raw(client: ollama.Client) -> None:
    assert client.generate("fake", "Hi", keep_alive="5m").response == SAY
    parts = list(client.generate("fake", "Hi", system="Be brief", stream=True))
    assert "".join(part.response or "" for part in parts) == SAY
    assert parts[-1].prompt_eval_count == 21 + len("\nsystem\nBe brief\n") + 1
    raw = client.generate("fake", "Hi", raw=True)
    assert (raw.response, raw.prompt_eval_count) == (SAY, 2)
    assert client.generate("fake").done_reason == "load"


def test_options_are_honoured(client: ollama.Client) -> None:
    cut = client.generate("fake", "Hi", options={"num_predict": 3, "num_ctx": 1024, "temperature": 0})
    assert (cut.response, cut.done_reason, cut.eval_count) == (SAY[:3], "length", 3)
    assert client.generate("fake", "Hi", options={"stop": [" there"], "num_predict": -1}).response == "Hello"
    told = client.generate("fake", "Hi", logprobs=True, top_logprobs=2, options={"num_predict": 2})
    assert told.logprobs is not None
    assert [entry.token for entry in told.logprobs] == list(SAY[:2])
    assert [len(entry.top_logprobs or []) for entry in told.logprobs] == [2, 2]
    sampled = {"temperature": 1.5, "top_k": 300, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "num_predict": 20}
    other = fake_model(FakeEngine(script=[97] * 50, context=1024))
    with live_server(other) as running, ollama.Client(host=running.url) as again:
        assert len({again.generate("fake", "Hi", options={**sampled, "seed": 3}).response for _ in range(2)}) == 1
        assert again.generate("fake", "Hi", options={**sampled, "temperature": 0}).response == "a" * 20


def test_formats() -> None:
    schema = {
        "type": "object",
        "properties": {"word": {"type": "string", "maxLength": 4}},
        "required": ["word"],
        "additionalProperties": False,
    }
    with live_server(fake_model(FakeEngine(context=1024))) as talker, ollama.Client(host=talker.url) as client:
        assert list(json.loads(client.chat("fake", messages=QUESTION, format=schema).message.content or "")) == ["word"]
        begun = client.generate("fake", "Hi", format="json", options={"num_predict": 5}).response
        assert begun.startswith("{")
    scripted = fake_model(FakeEngine(script='{"a": [1]}'))
    with live_server(scripted) as talker, ollama.Client(host=talker.url) as client:
        answer = client.generate("fake", "Hi", format="json")
        assert json.loads(answer.response) == {"a": [1]}


def get_weather(city: str) -> str:
    """Tell the weather.

    Args:
      city: where
    """
    return f"Sunny in {city}"


def test_tools_from_a_python_function_and_back() -> None:
    model = fake_model(FakeEngine(script=CALL, context=2048), source=TOOL_TEMPLATE)
    with live_server(model) as server, ollama.Client(host=server.url) as client:
        whole = client.chat("fake", messages=QUESTION, tools=[get_weather])
        assert whole.message.tool_calls is not None
        function = whole.message.tool_calls[0].function
        assert (function.name, dict(function.arguments)) == ("get_weather", {"city": "Rome"})
        streamed = [part.message.tool_calls for part in client.chat("fake", QUESTION, tools=[get_weather], stream=True)]
        assert [calls[0].function.name for calls in streamed if calls] == ["get_weather"]
        result = {"role": "tool", "tool_name": "get_weather", "content": get_weather(**function.arguments)}
        assert client.chat("fake", messages=[*QUESTION, whole.message, result]).done


def test_lists_and_cards(client: ollama.Client, server: LiveServer) -> None:
    (model,) = client.list().models
    assert (model.model, model.size) == ("fake", 1000)
    assert model.details is not None
    assert model.details.format == "gguf"
    card = client.show("fake")
    assert card.template == TOOL_TEMPLATE
    assert card.capabilities == ["completion", "tools"]
    assert card.modelinfo is not None
    assert card.modelinfo["general.parameter_count"] == 1000
    status, _, body = server.request("GET", "/api/version")
    assert status == 200
    assert set(json.loads(body)) == {"version"}


@pytest.mark.parametrize(
    ("route", "body", "status", "named"),
    [
        ("chat", {"messages": QUESTION}, 400, "model"),
        ("chat", {"model": "other", "messages": QUESTION}, 404, "model"),
        ("chat", {"model": "../fake", "messages": QUESTION}, 404, "model"),
        ("chat", {"model": "fake", "messages": [{"role": "robot"}]}, 400, "messages.0.role"),
        ("chat", {"model": "fake", "messages": [{"role": "user", "images": ["x"]}]}, 400, "messages.0.images"),
        ("chat", {"model": "fake", "messages": QUESTION, "think": True}, 400, "think"),
        ("chat", {"model": "fake", "messages": QUESTION, "format": {"type": "banana"}}, 400, "format"),
        ("chat", {"model": "fake", "messages": QUESTION, "format": "xml"}, 400, "format"),
        ("generate", {"model": "fake", "prompt": "a", "options": {"num_ctx": 4096}}, 400, "options.num_ctx"),
        ("generate", {"model": "fake", "prompt": "a", "options": {"mirostat": 1}}, 400, "options.mirostat"),
        ("generate", {"model": "fake", "prompt": "a", "options": {"seed": -1}}, 400, "options.seed"),
        ("generate", {"model": "fake", "prompt": "a", "options": {"num_predict": 2**63}}, 400, "options.num_predict"),
        ("generate", {"model": "fake", "prompt": "a", "template": "{{ range(10**9) }}"}, 400, "template"),
        ("generate", {"model": "fake", "prompt": "a", "context": [1]}, 400, "context"),
        ("generate", {"model": "fake", "prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("generate", {"model": "fake", "prompt": "a" * 100_000}, 400, "prompt"),
        ("generate", {"model": "fake", "prompt": "a", "raw": True, "system": "b"}, 400, "system"),
        ("generate", "{:", 400, "JSON"),
        ("generate", "{}", 400, "model"),
        ("show", {"model": "other"}, 404, "model"),
        ("show", {}, 404, "model"),
        ("show", {"model": "fake", "name": "other"}, 404, "model"),
        ("show", {"model": "fake", "verbose": True}, 400, "verbose"),
        ("pull", {"model": "fake"}, 404, "not found"),
    ],
)
def test_refusals_are_sentences_that_name_the_field(
    server: LiveServer, route: str, body: Any, status: int, named: str
) -> None:
    found, document = server.post(f"/api/{route}", body)
    assert found == status
    assert named in document["error"]


def test_the_client_shows_the_sentence(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="this server has no model of that name") as caught:
        client.generate("other", "Hi")
    assert caught.value.status_code == 404


def test_a_failing_engine_is_a_line_of_the_stream() -> None:
    with (
        live_server(fake_model(FakeEngine(fail_at=4))) as server,
        ollama.Client(host=server.url) as client,
        pytest.raises(ollama.ResponseError, match="engine failed"),
    ):
        list(client.generate("fake", "Hi", stream=True))
