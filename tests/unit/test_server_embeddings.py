"""``/v1/embeddings`` as clients meet it: the official ``openai`` client on a real port, over a scripted encoder."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ollama
import openai
import pytest
from fake_encoder import FakeEncoder, fake_encoder_model, live_embedding_server, vector_of
from fake_engine import BOS, EOS, VOCABULARY, FakeEngine, wait_until
from live_server import LiveServer, fake_model, live_server

from edgelm.errors import EngineError
from runtime.server.embedding_worker import EmbeddingWorker
from runtime.server.embeddings import EmbeddingRequest
from runtime.server.errors import ApiError
from runtime.server.limits import Access
from runtime.server.metrics import Metrics
from runtime.server.openai import parse_request
from runtime.server.worker import NotReadyError, QueueFullError


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_embedding_server(fake_encoder_model(FakeEncoder())) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def framed(text: str) -> list[float]:
    return vector_of([BOS, *text.encode(), EOS])


def test_one_text(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="fake", input="abc", encoding_format="float")
    assert answer.object == "list"
    assert answer.model == "fake"
    assert answer.data[0].embedding == framed("abc")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)


def test_the_client_s_own_default_is_base64(client: openai.OpenAI) -> None:
    """The client asks for base64 by itself and hands out numbers."""
    texts = ["", "a", "a longer text", "b"] * 5
    answer = client.embeddings.create(model="fake", input=texts)
    assert [item.index for item in answer.data] == list(range(20))
    assert [item.embedding for item in answer.data] == [framed(text) for text in texts]


def test_base64_is_little_endian_float32(server: LiveServer) -> None:
    status, answer = server.post("/v1/embeddings", {"input": "abc", "encoding_format": "base64"})
    assert status == 200
    raw = base64.b64decode(answer["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == framed("abc")


def test_token_ids_are_taken_as_they_are(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="fake", input=[7, 8, 9], encoding_format="float")
    assert answer.data[0].embedding == vector_of([7, 8, 9])
    answer = client.embeddings.create(model="fake", input=[[7], [8, 9]], encoding_format="float")
    assert [item.embedding for item in answer.data] == [vector_of([7]), vector_of([8, 9])]
    assert answer.usage.prompt_tokens == 3


def test_vectors_are_normalised_when_the_model_says_so() -> None:
    with live_embedding_server(fake_encoder_model(FakeEncoder(), normalized=True)) as server, server.client() as client:
        vector = np.array(client.embeddings.create(model="fake", input="abc").data[0].embedding)
        assert float(np.linalg.norm(vector)) == pytest.approx(1, abs=1e-6)


def test_dimensions_of_the_model_itself_pass(server: LiveServer) -> None:
    assert server.post("/v1/embeddings", {"input": "a", "dimensions": 5, "user": "u"})[0] == 200


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "not empty"),
        ({"input": {}}, "input", "must be a text"),
        ({"input": 3}, "input", "must be a text"),
        ({"input": ["a", 3]}, "input.0", "same kind"),
        ({"input": [3, "a"]}, "input.0", "same kind"),
        ({"input": [[1], []]}, "input.1", "same kind"),
        ({"input": [True]}, "input.0", "same kind"),
        ({"input": [-1]}, "input.0", "same kind"),
        ({"input": [2**63]}, "input.0", "same kind"),
        ({"input": [[1.5]]}, "input.0", "same kind"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": "a", "dimensions": 4}, "dimensions", "not trained to be cut"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "dimensions": True}, "dimensions", "valid integer"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "model": 3}, "model", "string"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown field"),
        ({"input": "x" * 31}, "input", "33 tokens are more than fit"),
        ({"input": ["a", "x" * 600]}, "input.1", "600 characters are more than fit"),
        ({"input": [[1], [VOCABULARY]]}, "input.1", "outside the vocabulary"),
        ({"input": [1] * 33}, "input", "33 tokens"),
    ],
)
def test_what_is_refused(server: LiveServer, body: dict[str, Any], param: str, told: str) -> None:
    status, answer = server.post("/v1/embeddings", body)
    assert status == 400
    assert answer["error"]["param"] == param
    assert told in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", ["[]", "3", "null", "{", "\x00", '{"input": NaN}', '{"input": "\\ud800"}'])
def test_bodies_that_are_no_objects(server: LiveServer, body: str) -> None:
    assert server.post("/v1/embeddings", body)[0] == 400


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="it serves 'fake'"):
        client.embeddings.create(model="other", input="a")


def test_an_encoder_generates_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="it answers /v1/embeddings"):
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="is an encoder"):
        client.completions.create(model="fake", prompt="a")


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_an_encoder_generates_nothing_for_ollama_s_clients(server: LiveServer, path: str) -> None:
    status, answer = server.post(path, {"model": "fake", "prompt": "a"})
    assert status == 400
    assert "is an encoder" in answer["error"]  # Ollama's errors are a text


def test_a_decoder_makes_no_vectors() -> None:
    with live_server(fake_model(FakeEngine())) as server:
        status, answer = server.post("/v1/embeddings", {"input": "a"})
        assert (status, answer["error"]["code"]) == (400, "model_not_supported")


def test_the_other_routes(server: LiveServer, client: openai.OpenAI) -> None:
    model = client.models.retrieve("fake")
    assert model.model_extra is not None
    assert model.model_extra["dimensions"] == 5
    assert [item.id for item in client.models.list()] == ["fake"]
    assert server.request("GET", "/health/live")[0] == 200
    assert server.request("GET", "/health/ready")[0] == 200
    status, _, text = server.request("GET", "/metrics")
    assert status == 200
    assert b'edgelm_http_requests_total{route="/v1/embeddings"' in text
    assert server.request("GET", "/")[0] == 404


def test_hosts_and_keys_are_checked() -> None:
    access = Access(key=b"k" * 32)
    with live_embedding_server(fake_encoder_model(FakeEncoder()), access) as server:
        assert server.post("/v1/embeddings", {"input": "a"})[0] == 401
        assert server.post("/v1/embeddings", {"input": "a"}, {"Host": "evil.example"})[0] == 403
        with server.client() as client:
            assert client.embeddings.create(model="fake", input="a").usage.prompt_tokens == 3


def test_requests_share_steps() -> None:
    """Eight requests that wait behind a slow step are computed four at a time, in turn."""
    gate = threading.Event()
    encoder = FakeEncoder()
    with live_embedding_server(fake_encoder_model(encoder)) as server, ThreadPoolExecutor(9) as pool:
        encoder.on_encode = lambda _: gate.wait(10)
        first = pool.submit(server.post, "/v1/embeddings", {"input": "first"})
        assert wait_until(lambda: server.worker.running == 1)
        others = [pool.submit(server.post, "/v1/embeddings", {"input": ["a", "bb"]}) for _ in range(4)]
        assert wait_until(lambda: server.worker.queued == 4)
        gate.set()
        assert first.result()[0] == 200
        for other in others:
            status, answer = other.result()
            assert status == 200
            assert [item["embedding"] for item in answer["data"]] == [framed("a"), framed("bb")]
    assert encoder.calls[-2:] == [[3, 3, 3, 3], [4, 4, 4, 4]]
    assert encoder.closed


def test_a_client_that_leaves_frees_the_encoder() -> None:
    encoder = FakeEncoder(batch=32)
    with live_embedding_server(fake_encoder_model(encoder)) as server:
        encoder.step_delay_s = 30
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        connection.request("POST", "/v1/embeddings", json.dumps({"input": ["abc"] * 1000}))
        assert wait_until(lambda: server.worker.running == 1)
        connection.close()
        assert wait_until(lambda: server.worker.running == 0)
        encoder.step_delay_s = 0
        assert server.post("/v1/embeddings", {"input": "a"})[0] == 200
    assert len(encoder.calls) < 20


def test_an_engine_that_fails_once_costs_one_request() -> None:
    encoder = FakeEncoder(fail_at=1)
    with live_embedding_server(fake_encoder_model(encoder)) as server:
        status, answer = server.post("/v1/embeddings", {"input": "a"})
        assert (status, answer["error"]["code"]) == (503, "engine_failed")
        assert server.post("/v1/embeddings", {"input": "a"})[0] == 200


def test_values_that_are_not_finite_end_the_encoder() -> None:
    encoder = FakeEncoder()
    with live_embedding_server(fake_encoder_model(encoder)) as server:
        encoder.value = float("nan")
        assert server.post("/v1/embeddings", {"input": "a"})[0] == 503
        assert wait_until(lambda: server.worker.state == "failed")
        status, answer = server.post("/v1/embeddings", {"input": "a"})
        assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
        assert server.request("GET", "/health/ready")[0] == 503
        assert server.request("GET", "/health/live")[0] == 200


def test_a_full_queue_says_when_to_come_back() -> None:
    gate = threading.Event()
    encoder = FakeEncoder()
    worker = EmbeddingWorker(fake_encoder_model(encoder), Metrics(), queue_limit=2)
    worker.start()
    assert wait_until(lambda: worker.state == "ready")
    encoder.on_encode = lambda _: gate.wait(10)
    jobs = [worker.submit([[1]]), worker.submit([[2], [3]])]
    with pytest.raises(QueueFullError) as refused:
        worker.submit([[4]])
    assert 1 <= refused.value.retry_after_s <= 60
    gate.set()
    assert jobs[1].future.result(10).tolist() == [vector_of([2]), vector_of([3])]
    worker.stop()
    with pytest.raises(NotReadyError):
        worker.submit([[1]])


def test_a_drain_that_takes_too_long_fails_what_is_left() -> None:
    gate = threading.Event()
    encoder = FakeEncoder(batch=32, sequences=1)
    worker = EmbeddingWorker(fake_encoder_model(encoder), Metrics())
    worker.start()
    assert wait_until(lambda: worker.state == "ready")
    encoder.on_encode = lambda _: gate.wait(10)
    job = worker.submit([[1]] * 5)
    assert wait_until(lambda: worker.running == 1)
    worker.abort("too late")
    gate.set()
    with pytest.raises(EngineError, match="too late"):
        job.future.result(10)
    worker.stop()
    assert worker.state == "stopped"


def test_parsing_keeps_what_was_asked_for() -> None:
    body = {"input": ["a"], "model": "m", "encoding_format": "base64", "dimensions": None}
    wanted = parse_request(EmbeddingRequest, body)
    assert (wanted.input, wanted.model, wanted.encoding_format, wanted.dimensions) == (("a",), "m", "base64", None)
    with pytest.raises(ApiError, match="must be a JSON object"):
        parse_request(EmbeddingRequest, ["a"])


@pytest.fixture(scope="module")
def ollama_client(server: LiveServer) -> Iterator[ollama.Client]:
    with ollama.Client(host=server.url, timeout=20) as made:
        yield made


def test_the_ollama_client_gets_the_same_vectors(ollama_client: ollama.Client) -> None:
    answer = ollama_client.embed("fake", ["abc", "a longer text"])
    assert [list(vector) for vector in answer.embeddings] == [framed("abc"), framed("a longer text")]
    assert (answer.model, answer.prompt_eval_count) == ("fake", 5 + 15)
    one = ollama_client.embed("fake:latest", "abc", dimensions=len(framed("abc")))
    assert list(one.embeddings[0]) == framed("abc")


def test_ollama_cuts_what_is_too_long_unless_told_not_to(ollama_client: ollama.Client) -> None:
    context = FakeEncoder().info.context
    long = "x" * (20 * context)
    assert list(ollama_client.embed("fake", long).embeddings[0]) == framed("x" * (context - 2))
    with pytest.raises(ollama.ResponseError, match="more than fit"):
        ollama_client.embed("fake", long, truncate=False)


@pytest.mark.parametrize(
    ("field", "value"), [("options", {"num_ctx": 8}), ("dimensions", 1), ("input", []), ("input", [1]), ("shape", 1)]
)
def test_what_ollama_asks_and_cannot_be_done_is_named(server: LiveServer, field: str, value: Any) -> None:
    status, document = server.post("/api/embed", {"model": "fake", "input": "a", field: value})
    assert status == 400
    assert field in document["error"]


def test_a_model_that_generates_has_no_vectors_for_ollama_either() -> None:
    with live_server(fake_model(FakeEngine())) as running:
        status, document = running.post("/api/embed", {"model": "fake", "input": "a"})
    assert status == 400
    assert "makes no vectors" in document["error"]
