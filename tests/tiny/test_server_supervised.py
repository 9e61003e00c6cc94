"""The engine in a process of its own: the server answers while it loads, works, is dead and comes back."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine, FakeTokenizer, wait_until
from live_server import LiveServer, fake_model, live_server, running_server
from prometheus_client.parser import text_string_to_metric_families

import runtime.server.supervised
from runtime.engine import EngineOptions
from runtime.generate import GenerationRequest
from runtime.server.metrics import Metrics
from runtime.server.scheduler import Job
from runtime.server.supervised import SupervisedWorker
from runtime.server.worker import QueueFullError

START_TIMEOUT_S = 60
# The engine behind the socket is the scripted one. "~" in a prompt makes it die as by a fault of C code, "!" compute
# what is no number, "^" never return, and the path decides how it loads.
ENGINE = """
import sys
sys.path[:] = {path!r}
import os, time
import numpy as np
from edgelm.errors import BundleError
from fake_engine import FakeEngine, GpuEngine
from live_server import fake_model
from runtime.server.engine_process import main


class Fragile(FakeEngine):
    def forward(self, chunks):
        if any(ord("~") in chunk.tokens for chunk in chunks):
            os.kill(os.getpid(), 11)
        while any(ord("^") in chunk.tokens for chunk in chunks):
            time.sleep(60)
        logits = super().forward(chunks)
        if any(ord("!") in chunk.tokens for chunk in chunks):
            logits = np.full_like(logits, np.nan)
        return logits


class Hidden(GpuEngine):
    # Its driver does not answer.

    def device_now(self):
        time.sleep(60)


def load(path, options):
    while path.name == "slow" and path.parent.exists():
        time.sleep(0.02)
    if path.name == "damaged":
        raise BundleError("damaged is damaged", hint="export it again")
    if path.name == "crashing":
        print("about to crash", file=sys.stderr, flush=True)
        os.abort()
    if path.name == "hidden":
        return fake_model(Hidden(context=4096))
    if path.name == "gpu":
        return fake_model(GpuEngine(context=4096))
    return fake_model(Fragile(context=4096, sequences=2, step_delay_s=0.002))


main(load)
"""


def fake_backend(name: str = "fake", silence_floor_s: float = 60) -> tuple[SupervisedWorker, Metrics]:
    path = [str(Path(__file__).resolve().parents[1]), *sys.path]
    metrics = Metrics()
    command = [sys.executable, "-c", ENGINE.format(path=path)]
    options = EngineOptions()
    return SupervisedWorker(Path(name), options, metrics, command=command, silence_floor_s=silence_floor_s), metrics


def worker_of(server: LiveServer) -> SupervisedWorker:
    assert isinstance(server.worker, SupervisedWorker)
    return server.worker


def is_ready(server: LiveServer) -> bool:
    return server.request("GET", "/health/ready")[0] == 200


@contextmanager
def supervised(name: str = "fake") -> Iterator[LiveServer]:
    with running_server(*fake_backend(name)) as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with supervised() as running:
        assert wait_until(lambda: is_ready(running), START_TIMEOUT_S)
        yield running


@pytest.fixture(autouse=True)
def _ready(request: pytest.FixtureRequest) -> None:
    """Tests that kill the shared engine leave it to the next one to wait."""
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        assert wait_until(lambda: is_ready(running), START_TIMEOUT_S)


def figure(server: LiveServer, name: str) -> float:
    families = text_string_to_metric_families(server.request("GET", "/metrics")[2].decode())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def wanted(prompt: str, max_tokens: int = 20) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}


def expected(prompt: str, max_tokens: int = 20) -> str:
    """What an engine in this process says."""
    with live_server(fake_model(FakeEngine(context=4096))) as plain:
        return str(plain.post("/v1/completions", wanted(prompt, max_tokens))[1]["choices"][0]["text"])


@contextmanager
def stream(server: LiveServer, prompt: str, max_tokens: int) -> Iterator[http.client.HTTPResponse]:
    """A stream whose first event has arrived."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request("POST", "/v1/completions", json.dumps({**wanted(prompt, max_tokens), "stream": True}))
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: {")
        yield response
    finally:
        connection.close()


def vram(server: LiveServer) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads(server.request("GET", "/status")[2])["vram"]
    return told


def test_the_engine_process_tells_what_is_free_on_its_gpu() -> None:
    with supervised("gpu") as running:
        assert wait_until(lambda: is_ready(running), START_TIMEOUT_S)
        (first,) = vram(running)
        assert (first["device"], first["gpu_layers"], first["announced_bytes"]) == ("CUDA0", 2, 950)
        # Every look finds less, so what is told is not what was told once.
        assert wait_until(lambda: vram(running)[0]["free_bytes"] < first["free_bytes"], 10)
        assert figure(running, "edgelm_vram_bytes") == 1000 + 950
        pid = worker_of(running).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not vram(running), 10)  # a process that is gone holds nothing
        assert wait_until(lambda: bool(vram(running)), START_TIMEOUT_S)


def test_a_driver_that_does_not_answer_costs_its_figures_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.server.supervised, "LOOK_TIMEOUT_S", 0.2)
    with supervised("hidden") as running:
        assert wait_until(lambda: is_ready(running), START_TIMEOUT_S)
        (told,) = vram(running)
        assert (told["planned_bytes"], told["free_bytes"], told["used_bytes"]) == (1000, None, None)
        assert is_ready(running)
        assert figure(running, "edgelm_engine_hangs_total") == 0


def test_answers_are_those_of_an_engine_in_this_process(server: LiveServer) -> None:
    status, answer = server.post("/v1/completions", wanted("a prompt"))
    assert status == 200
    assert answer["choices"][0]["text"] == expected("a prompt")
    assert answer["usage"]["prompt_tokens"] == len("a prompt")
    assert answer["timings"]["queue_s"] >= 0
    tokenizer = worker_of(server).model.tokenizer
    assert tokenizer.encode("é<s>") == FakeTokenizer().encode("é<s>")
    assert tokenizer.encode("<s>", special=False) == list(b"<s>")
    assert tokenizer.token_bytes(0xC3) == b"\xc3"
    assert tokenizer.decode([0x68, 0x69]) == "hi"


def test_the_official_client_streams_a_chat(server: LiveServer) -> None:
    with server.client() as client:
        messages: list[Any] = [{"role": "user", "content": "hello"}]
        whole = client.chat.completions.create(model="fake", messages=messages, temperature=0, max_tokens=9)
        pieces = client.chat.completions.create(
            model="fake", messages=messages, temperature=0, max_tokens=9, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole.choices[0].message.content


def test_what_the_engine_counts_is_in_the_metrics(server: LiveServer) -> None:
    before = figure(server, "edgelm_decode_tokens_total"), figure(server, "edgelm_batch_tokens_count")
    server.post("/v1/completions", wanted("count", 7))
    assert figure(server, "edgelm_decode_tokens_total") == before[0] + 7
    assert figure(server, "edgelm_batch_tokens_count") >= before[1] + 7
    told = json.loads(server.request("GET", "/status")[2])
    assert told["memory"]["engine"]["rss_bytes"] > 10**6 < told["memory"]["server"]["rss_bytes"]
    assert 0 < told["kv"]["tokens"] <= told["kv"]["capacity_tokens"]
    assert figure(server, "edgelm_engine_ready") == 1


def test_a_client_that_leaves_frees_the_engine(server: LiveServer) -> None:
    with stream(server, "long", 3000):
        assert wait_until(lambda: server.worker.running == 1)
    assert wait_until(lambda: server.idle)


def test_a_working_engine_is_read_in_the_event_loop(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(server)
    threads: list[str] = []
    heard = worker.child_said

    def child_said(message: bytes) -> None:
        threads.append(threading.current_thread().name)
        heard(message)

    assert server.post("/v1/completions", wanted("warm"))[0] == 200
    monkeypatch.setattr(worker, "child_said", child_said)
    assert server.post("/v1/completions", wanted("a prompt"))[1]["choices"][0]["text"] == expected("a prompt")
    assert set(threads) == {"server"}


def test_an_engine_that_talks_nonsense_is_ended_and_comes_back(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(server)
    assert server.post("/v1/completions", wanted("warm"))[0] == 200
    before = figure(server, "edgelm_engine_deaths_total")
    heard = worker.child_said

    def child_said(message: bytes) -> None:
        monkeypatch.setattr(worker, "child_said", heard)
        heard(b"\0nonsense")

    monkeypatch.setattr(worker, "child_said", child_said)
    assert server.post("/v1/completions", wanted("a prompt"))[0] == 503
    assert wait_until(lambda: figure(server, "edgelm_engine_deaths_total") == before + 1, START_TIMEOUT_S)
    assert wait_until(lambda: is_ready(server), START_TIMEOUT_S)
    assert server.post("/v1/completions", wanted("a prompt"))[1]["choices"][0]["text"] == expected("a prompt")


def test_more_than_the_queue_holds_is_refused(server: LiveServer) -> None:
    jobs: list[Job] = []
    worker = worker_of(server)
    request = GenerationRequest([1, 2, 3], 3000)
    with pytest.raises(QueueFullError) as refused:
        jobs.extend(worker.submit(request, lambda _event: None) for _ in range(100))
    assert len(jobs) == 18  # two sequences and eight places for each
    assert refused.value.retry_after_s >= 1
    assert server.post("/v1/completions", wanted("x"))[0] == 429
    for job in jobs:
        worker.cancel(job)
    assert wait_until(lambda: server.idle)


def test_a_killed_engine_costs_its_requests_an_error_and_comes_back(server: LiveServer) -> None:
    text = expected("a prompt")
    for _ in range(2):
        starts = figure(server, "edgelm_engine_starts_total")
        pid = worker_of(server).pid
        assert pid is not None
        with stream(server, "long", 3000) as answer:
            os.kill(pid, signal.SIGKILL)
            last = answer.read().decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert server.request("GET", "/health/live")[0] == 200
        assert server.request("GET", "/v1/models")[0] == 200
        assert wait_until(lambda: is_ready(server), START_TIMEOUT_S)
        assert figure(server, "edgelm_engine_starts_total") == starts + 1
        assert server.post("/v1/completions", wanted("a prompt"))[1]["choices"][0]["text"] == text
        assert not Path(f"/proc/{pid}").exists()


def test_a_crash_inside_the_engine_is_a_503_to_who_caused_it(server: LiveServer) -> None:
    deaths = figure(server, "edgelm_engine_deaths_total")
    with server.client() as client, pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model="fake", prompt="~", max_tokens=3)
    assert error.value.status_code == 503
    status, headers, _ = server.request("POST", "/v1/completions", json.dumps(wanted("x")))
    assert status == 200 or (status == 503 and headers["retry-after"])
    assert wait_until(lambda: is_ready(server), START_TIMEOUT_S)
    assert figure(server, "edgelm_engine_deaths_total") == deaths + 1


def test_an_engine_that_stands_still_is_ended_and_comes_back() -> None:
    """Once stopped as a whole, once in a computation that never returns."""
    with running_server(*fake_backend(silence_floor_s=2)) as server:
        assert wait_until(lambda: is_ready(server), START_TIMEOUT_S)
        pid = worker_of(server).pid
        assert pid is not None
        with stream(server, "long", 3000) as answer:
            os.kill(pid, signal.SIGSTOP)
            last = answer.read().decode().strip().split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], "stood still" in error["message"]) == ("engine_failed", True)
        assert server.request("GET", "/health/ready")[0] == 503
        assert wait_until(lambda: is_ready(server), START_TIMEOUT_S)
        assert not Path(f"/proc/{pid}").exists()
        status, answered = server.post("/v1/completions", wanted("^"))
        assert (status, answered["error"]["code"]) == (503, "engine_failed")
        assert wait_until(lambda: is_ready(server), START_TIMEOUT_S)
        assert server.post("/v1/completions", wanted("x"))[0] == 200
        assert figure(server, "edgelm_engine_hangs_total") == figure(server, "edgelm_engine_deaths_total") == 2


def test_a_model_that_never_loads_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading = tmp_path / "loading"
    loading.mkdir()
    monkeypatch.setattr(runtime.server.supervised, "LOAD_TIMEOUT_S", 0.5)
    with supervised(str(loading / "slow")) as server:
        assert wait_until(lambda: figure(server, "edgelm_engine_hangs_total") >= 1, START_TIMEOUT_S)
        assert server.worker.state == "starting"
        monkeypatch.undo()
        loading.rmdir()
        assert wait_until(lambda: is_ready(server), START_TIMEOUT_S)


def test_values_that_are_no_numbers_are_an_error_without_a_crash(server: LiveServer) -> None:
    deaths = figure(server, "edgelm_engine_deaths_total")
    assert server.post("/v1/completions", wanted("!"))[0] == 503
    assert server.post("/v1/completions", wanted("x"))[0] == 200
    assert figure(server, "edgelm_engine_deaths_total") == deaths


def test_the_server_answers_while_the_model_loads(tmp_path: Path) -> None:
    """The engine of this test loads for as long as a directory stands, so no machine is too slow for it."""
    loading = tmp_path / "loading"
    loading.mkdir()
    with supervised(str(loading / "slow")) as server:
        assert server.request("GET", "/health/live")[0] == 200
        status, _, answer = server.request("GET", "/health/ready")
        assert (status, json.loads(answer)) == (503, {"status": "starting"})
        assert server.request("GET", "/metrics")[0] == 200
        assert server.request("GET", "/")[0] == 200  # the page says itself what state the engine is in
        assert server.request("GET", "/v1/models")[0] == 503
        status, document = server.post("/v1/completions", wanted("x"))
        assert (status, document["error"]["code"]) == (503, "engine_unavailable")
        loading.rmdir()
        assert wait_until(lambda: is_ready(server), START_TIMEOUT_S)
        assert server.post("/v1/completions", wanted("x"))[0] == 200
        assert server.request("GET", "/v1/models")[0] == 200


def test_an_engine_that_crashes_while_loading_is_tried_again_and_again() -> None:
    with supervised("crashing") as server:
        assert wait_until(lambda: figure(server, "edgelm_engine_deaths_total") >= 2, START_TIMEOUT_S)
        assert server.request("GET", "/health/live")[0] == 200
        assert server.worker.state == "starting"


def test_a_refusal_at_the_first_start_is_final() -> None:
    ended: list[str] = []
    worker, _ = fake_backend("damaged")
    worker.on_refusal = lambda: ended.append("ended")
    worker.start()
    assert wait_until(lambda: bool(ended), START_TIMEOUT_S)
    worker.stop()
    assert worker.state == "failed"
    assert worker.failure is not None
    assert (worker.failure.message, worker.failure.hint) == ("damaged is damaged", "export it again")


ORPHAN = """
import sys, time
sys.path[:] = {path!r}
from test_server_supervised import fake_backend
worker, _ = fake_backend()
worker.start()
while worker.state != "ready":
    time.sleep(0.02)
print(worker.pid, flush=True)
time.sleep(600)
"""


def test_the_engine_dies_with_a_server_that_is_killed() -> None:
    tests = Path(__file__).resolve().parents[1]
    code = ORPHAN.format(path=[str(tests), str(tests / "unit"), *sys.path])
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        process.kill()
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), 10)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
