"""Several models behind one server: chosen by name, loaded on demand, never more than fits, unloaded by age."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_encoder import FakeEncoder, fake_encoder_model
from fake_engine import FakeEngine, wait_until
from live_server import LiveServer, fake_model, running_server
from prometheus_client.parser import text_string_to_metric_families

from edgelm.errors import BundleError
from runtime.server.embedding_worker import EmbeddingWorker
from runtime.server.limits import Access
from runtime.server.metrics import Metrics
from runtime.server.shelf import Servant, Shelf, Title
from runtime.server.worker import Worker

TOTAL = 100


@dataclass
class Library:
    """Made-up models and a made-up memory: each takes what it needs while it is loaded."""

    metrics: Metrics = field(default_factory=Metrics)
    needs: dict[str, int] = field(default_factory=dict)
    loaded: dict[str, int] = field(default_factory=dict)
    most: int = 0
    before_open: Callable[[str], object] = lambda name: None

    def title(self, name: str, needs: int, make: Callable[[], Servant]) -> Title:
        self.needs[name] = needs

        def open_servant() -> Servant:
            self.before_open(name)
            servant = make()
            self.loaded[name] = needs
            self.most = max(self.most, sum(self.loaded.values()))
            stop = servant.stop

            def stopped() -> None:
                stop()
                self.loaded.pop(name, None)

            servant.stop = stopped  # type: ignore[method-assign]
            return servant

        return Title(name, None, 0, lambda: self.needs[name], open_servant)

    def writer(self, name: str, needs: int = 40, **engine: Any) -> Title:
        def make() -> Worker:
            fake = FakeEngine(**({"script": f"I am {name}", "context": 4096} | engine))
            return Worker(dataclasses.replace(fake_model(fake), name=name), self.metrics)

        return self.title(name, needs, make)

    def encoder(self, name: str, needs: int = 40) -> Title:
        model = dataclasses.replace(fake_encoder_model(FakeEncoder()), name=name)
        return self.title(name, needs, lambda: EmbeddingWorker(model, self.metrics))

    def free(self) -> int:
        return TOTAL - sum(self.loaded.values())


@contextmanager
def serving(
    library: Library, *titles: Title, unload_after_s: float | None = None, access: Access | None = None
) -> Iterator[LiveServer]:
    shelf = Shelf(titles, library.metrics, library.free, unload_after_s=unload_after_s)
    with running_server(shelf, library.metrics, access) as server:  # type: ignore[arg-type]
        assert wait_until(lambda: shelf.state != "starting")
        yield server
    assert library.loaded == {}
    assert library.most <= TOTAL


def said(server: LiveServer, model: str | None) -> Any:
    body = {"messages": [{"role": "user", "content": "Who?"}]} | ({} if model is None else {"model": model})
    status, answer = server.post("/v1/chat/completions", body)
    return answer["choices"][0]["message"]["content"] if status == 200 else (status, answer["error"]["code"])


def states(server: LiveServer) -> dict[str, str]:
    return states_of(server, {})


def states_of(server: LiveServer, headers: dict[str, str]) -> dict[str, str]:
    document: dict[str, str] = json.loads(server.request("GET", "/health/ready", headers=headers)[2])["models"]
    return document


def figure(server: LiveServer, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(server.request("GET", "/metrics")[2].decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if sample.labels == labels)


def test_a_request_s_model_chooses_and_loads() -> None:
    library = Library()
    with serving(library, library.writer("one"), library.writer("two")) as server, server.client() as client:
        assert states(server) == {"one": "ready", "two": "unloaded"}
        assert said(server, None) == said(server, "one") == "I am one"
        assert said(server, "two") == "I am two"
        assert states(server) == {"one": "ready", "two": "ready"}
        assert [model.id for model in client.models.list()] == ["one", "two"]
        assert client.models.retrieve("two").id == "two"
        stream = client.completions.create(model="two", prompt="x", stream=True, max_tokens=100)
        assert "".join(chunk.choices[0].text for chunk in stream) == "I am two"
        assert server.post("/api/chat", {"model": "two:latest", "messages": [], "stream": False})[0] == 200
        assert server.post("/tokenize", {"content": "ab", "model": "two"})[1]["tokens"] == [97, 98]
        assert figure(server, "edgelm_model_loads_total", model="two") == 1
        assert figure(server, "edgelm_model_loaded", model="two") == 1
        told = json.loads(server.request("GET", "/status")[2])
        assert [(model["name"], model["state"]) for model in told["models"]] == [("one", "ready"), ("two", "ready")]
        assert told["models"][1]["facts"]["Architecture"] == "fake"
        assert told["kv"]["capacity_tokens"] == 2 * 4096
        assert server.request("GET", "/")[0] == 200
        assert {entry["name"] for entry in json.loads(server.request("GET", "/api/tags")[2])["models"]} == {
            "one",
            "two",
        }


@pytest.mark.parametrize(
    "name", ["three", "../one", "one/../../etc/passwd", "/etc/passwd", "one\x00", "", "%2e%2e/one", "one.gguf", "ONE"]
)
def test_names_are_looked_up_and_never_opened(name: str) -> None:
    library = Library()
    opened: list[str] = []
    library.before_open = opened.append
    with serving(library, library.writer("one"), library.writer("two")) as server:
        assert said(server, name) == (404, "model_not_found")
        assert server.post("/api/show", {"model": name})[0] == 404
        path = "/v1/models/" + "".join(f"%{byte:02x}" for byte in name.encode())
        assert server.request("GET", path)[0] == 404
    assert opened == ["one"]


def test_several_models_are_guarded_as_one_is() -> None:
    library = Library()
    key = b"correct-horse-battery-staple"
    with serving(library, library.writer("one"), library.writer("two"), access=Access(key=key)) as server:
        headers = {"Authorization": f"Bearer {key.decode()}"}
        body = json.dumps({"model": "two", "prompt": "x"})
        for method, route in (
            ("GET", "/"),
            ("GET", "/status"),
            ("GET", "/metrics"),
            ("GET", "/v1/models"),
            ("POST", "/v1/completions"),
        ):
            assert server.request(method, route, body)[0] == 401
            assert server.request(method, route, body, {**headers, "Host": "evil.example"})[0] == 403
            assert server.request(method, route, body, {**headers, "Origin": "https://evil.example"})[0] == 403
        assert states_of(server, headers)["two"] == "unloaded"  # nobody who was refused loaded anything
        assert server.request("POST", "/v1/completions", body, headers)[0] == 200
        assert server.request("POST", "/v1/completions", "[" * 50, headers)[0] == 400


def test_what_was_not_used_for_longest_makes_room() -> None:
    library = Library()
    with serving(library, *(library.writer(name) for name in ("one", "two", "three"))) as server:
        assert said(server, "two") == "I am two"
        assert said(server, "one") == "I am one"
        assert said(server, "three") == "I am three"
        assert states(server) == {"one": "ready", "two": "unloaded", "three": "ready"}
        assert figure(server, "edgelm_model_unloads_total", model="two") == 1
        assert said(server, "two") == "I am two"
        assert states(server) == {"one": "unloaded", "two": "ready", "three": "ready"}
        assert server.request("GET", "/health/ready")[0] == 200


def test_a_model_in_use_is_not_unloaded() -> None:
    library = Library()
    titles = library.writer("one", 60, script=None, step_delay_s=0.01), library.writer("two", 60)
    with serving(library, *titles) as server, server.client() as client:
        stream = client.completions.create(model="one", prompt="x", stream=True, max_tokens=3000, temperature=0)
        next(stream)
        status, headers, body = server.request("POST", "/v1/completions", json.dumps({"model": "two", "prompt": "x"}))
        assert (status, headers["retry-after"]) == (503, "5")
        error = json.loads(body)["error"]
        assert error["code"] == "does_not_fit"
        assert "while one is in use" in error["message"]
        assert next(stream).choices[0].text
        stream.close()
        assert wait_until(lambda: said(server, "two") == "I am two")
        assert states(server) == {"one": "unloaded", "two": "ready"}


def test_a_model_that_can_never_fit_unloads_nothing() -> None:
    library = Library()
    with serving(library, library.writer("one"), library.writer("giant", 101)) as server:
        assert said(server, "giant") == (503, "does_not_fit")
        assert said(server, "one") == "I am one"
        assert figure(server, "edgelm_model_unloads_total", model="one") == 0


def test_age_unloads() -> None:
    library = Library()
    with serving(library, library.writer("one"), unload_after_s=0.2) as server:
        assert wait_until(lambda: states(server) == {"one": "unloaded"})
        assert wait_until(lambda: library.loaded == {})
        assert server.request("GET", "/health/ready")[0] == 200  # it is loaded when somebody asks
        assert said(server, "one") == "I am one"
        assert wait_until(lambda: states(server) == {"one": "unloaded"})


def test_an_encoder_among_them() -> None:
    library = Library()
    with serving(library, library.writer("one"), library.encoder("vectors")) as server:
        status, answer = server.post("/v1/embeddings", {"model": "vectors", "input": "text"})
        assert (status, answer["model"]) == (200, "vectors")
        assert said(server, "vectors") == (400, "model_not_supported")
        assert server.post("/v1/embeddings", {"model": "one", "input": "text"})[0] == 400
        assert said(server, "one") == "I am one"
        told = json.loads(server.request("GET", "/status")[2])["models"]
        assert [model["generates"] for model in told] == [True, False]


def test_a_model_that_cannot_be_loaded_costs_only_itself() -> None:
    library = Library()
    damaged = [True]

    def check(name: str) -> None:
        if name == "two" and damaged[0]:
            raise BundleError("two is damaged")

    library.before_open = check
    with serving(library, library.writer("one"), library.writer("two")) as server:
        assert said(server, "two") == (503, "model_not_loaded")
        assert said(server, "one") == "I am one"
        damaged[0] = False
        assert said(server, "two") == "I am two"  # tried anew by each request


def test_an_engine_that_died_is_loaded_anew() -> None:
    library = Library()
    with serving(library, library.writer("one"), library.writer("two", fail_at=1)) as server:
        # The engine's second call fails the request, and the third, which was to show that it lives, does not.
        assert server.post("/v1/completions", {"model": "two", "prompt": "x"})[0] == 503
        shelf = server.worker
        assert isinstance(shelf, Shelf)
        servant = shelf.books["two"].servant
        assert isinstance(servant, Worker)
        servant._engine.close()
        assert server.post("/v1/completions", {"model": "two", "prompt": "x"})[0] == 503
        assert wait_until(lambda: servant.state == "failed")
        assert server.post("/v1/completions", {"model": "two", "prompt": "x"})[0] == 503  # the new one fails once, too
        assert said(server, "two") == "I am two"


def test_many_ask_for_a_model_that_is_loaded_once() -> None:
    library = Library()
    gate = threading.Event()
    opened: list[str] = []

    def wait(name: str) -> None:
        opened.append(name)
        if name == "two":
            assert gate.wait(10)

    library.before_open = wait
    with serving(library, library.writer("one"), library.writer("two", sequences=2)) as server:
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(said(server, "two"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        assert wait_until(lambda: states(server)["two"] == "loading")
        assert said(server, "one") == "I am one"  # others are answered meanwhile
        gate.set()
        for thread in threads:
            thread.join()
        assert answers == ["I am two"] * 8
        assert opened == ["one", "two"]


def test_the_first_model_has_to_load() -> None:
    library = Library()
    refused = threading.Event()
    gate = threading.Event()

    def refuse(_: str) -> None:
        assert gate.wait(10)
        raise BundleError("one is damaged")

    library.before_open = refuse
    shelf = Shelf([library.writer("one")], library.metrics, library.free)
    shelf.on_refusal = refused.set
    with running_server(shelf, library.metrics) as server:  # type: ignore[arg-type]
        status, _, body = server.request("GET", "/health/ready")
        assert (status, json.loads(body)["status"]) == (503, "starting")
        assert server.request("GET", "/health/live")[0] == 200
        gate.set()
        assert refused.wait(10)
        assert shelf.state == "failed"
        assert shelf.failure is not None
        assert shelf.failure.message == "one is damaged"
        assert server.request("GET", "/health/ready")[0] == 503
