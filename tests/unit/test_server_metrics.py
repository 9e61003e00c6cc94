"""Figures, logs and the page: readable by Prometheus, free of words, free of foreign requests."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_encoder import FakeEncoder, fake_encoder_model, live_embedding_server
from fake_engine import CARD, FakeEngine, GpuEngine
from live_server import LiveServer, fake_model, live_server
from prometheus_client.parser import text_string_to_metric_families

from runtime.encoder import EncoderInfo
from runtime.sensors import Sensors
from runtime.server import page as page_module
from runtime.server.figures import Figures
from runtime.server.limits import Access
from runtime.server.logs import LOGGER, JsonLines, log_event
from runtime.server.metrics import Metrics
from runtime.server.worker import Worker
from targets.vram import Device

SECRET = "a-very-secret-prompt"


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with live_server(fake_model(FakeEngine(script="Paris", context=512, sequences=2))) as running:
        yield running


def samples(server: LiveServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    status, headers, text = server.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(text.decode()))
    assert all(family.documentation for family in families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_what_happened(server: LiveServer) -> None:
    for _ in range(2):
        server.post("/v1/completions", {"prompt": "0123456789", "max_tokens": 3})
    server.request("GET", "/somewhere/else")
    server.request("GET", "/health/live", headers={"Host": "evil.example"})
    found = samples(server)
    assert found["edgelm_http_requests_total", (("route", "/v1/completions"), ("status", "200"))] == 2
    assert found["edgelm_http_requests_total", (("route", "other"), ("status", "404"))] == 1
    assert found["edgelm_http_requests_total", (("route", "/health/live"), ("status", "403"))] == 1
    assert found["edgelm_generations_total", (("reason", "length"),)] == 2
    assert found["edgelm_prefill_tokens_total", ()] + found["edgelm_cached_tokens_total", ()] == 20
    assert found["edgelm_decode_tokens_total", ()] == 6
    assert found["edgelm_ttft_seconds_count", ()] == 2
    assert found["edgelm_inter_token_seconds_count", ()] == 4
    assert found["edgelm_queue_wait_seconds_count", ()] == 2
    assert found["edgelm_requests_running", ()] == 0
    assert found["edgelm_requests_queued", ()] == 0
    assert found["edgelm_engine_ready", ()] == 1
    assert found["edgelm_prefill_tokens_per_second_count", ()] == 2
    assert found["edgelm_decode_tokens_per_second_count", ()] == 2
    assert found["edgelm_batch_requests_sum", ()] == found["edgelm_batch_requests_count", ()] > 0
    assert found["edgelm_refusals_total", (("reason", "host_not_allowed"),)] == 1
    server_rss = found["edgelm_memory_bytes", (("kind", "rss"), ("process", "server"))]
    assert server_rss > 10**6
    assert not any(("process", "engine") in labels for _, labels in found)  # it works in the server's process
    assert found["edgelm_kv_capacity_tokens", ()] == 2 * 512
    assert 0 < found["edgelm_kv_tokens", ()] <= 2 * 512
    assert found["edgelm_available_memory_bytes", ()] > 10**6
    assert found["edgelm_major_faults", ()] >= 0


def test_the_status_document_tells_what_the_metrics_tell(server: LiveServer) -> None:
    server.post("/v1/completions", {"prompt": "0123456789", "max_tokens": 3})
    status, headers, body = server.request("GET", "/status")
    found, told = samples(server), json.loads(body)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert told["state"] == "ready"
    assert told["requests"] == {"running": 0, "queued": 0}
    assert told["tokens"]["decode"] == found["edgelm_decode_tokens_total", ()] == 3
    assert told["tokens"]["prefill"] == 10
    assert told["kv"] == {"tokens": found["edgelm_kv_tokens", ()], "capacity_tokens": 1024, "reserved_bytes": 2000}
    assert told["memory"]["server"]["rss_bytes"] > 10**6
    assert told["memory"]["engine"] is None
    assert told["engine_deaths"] == 0
    assert server.request("GET", "/status", headers={"Host": "evil.example"})[0] == 403


def test_a_gpu_tells_what_was_planned_for_it_and_what_is_taken() -> None:
    engine = GpuEngine(context=64)
    with live_server(fake_model(engine)) as server:
        found, told = samples(server), json.loads(server.request("GET", "/status")[2])["vram"]
    assert {labels: value for (name, labels), value in found.items() if name == "edgelm_vram_bytes"} == {
        (("device", "CUDA0"), ("kind", "planned"), ("model", "fake")): 1000,
        (("device", "CUDA0"), ("kind", "announced"), ("model", "fake")): 950,
    }
    assert found["edgelm_model_layers", (("device", "CUDA0"), ("kind", "gpu"), ("model", "fake"))] == 2
    assert found["edgelm_model_layers", (("device", "CUDA0"), ("kind", "all"), ("model", "fake"))] == 3
    of_card = (("description", "a card"), ("device", "CUDA0"))
    free = CARD.free_bytes - 100 * engine.looks  # both documents share one look
    assert found["edgelm_device_memory_bytes", (*of_card, ("kind", "free"))] == free
    assert found["edgelm_device_memory_bytes", (*of_card, ("kind", "used"))] == CARD.total_bytes - free
    assert found["edgelm_device_memory_bytes", (*of_card, ("kind", "total"))] == CARD.total_bytes
    assert [(use["device"], use["gpu_layers"], use["free_bytes"]) for use in told] == [("CUDA0", 2, free)]
    assert engine.looks == 1


class GpuEncoder(FakeEncoder):
    """The scripted encoder with its layers on the card of the scripted engine."""

    @property
    def info(self) -> EncoderInfo:
        engine = GpuEngine().info
        return replace(super().info, offload=engine.offload, buffers=engine.buffers)

    def device_now(self) -> Device:
        return CARD


def test_an_encoder_on_a_gpu_tells_the_same() -> None:
    with live_embedding_server(fake_encoder_model(GpuEncoder())) as server:
        (told,) = json.loads(server.request("GET", "/status")[2])["vram"]
        assert (told["model"], told["device"], told["free_bytes"]) == ("fake", "CUDA0", CARD.free_bytes)
        facts = json.loads(server.request("GET", "/status")[2])["models"][0]["facts"]
        assert facts["GPU"] == "2 of 3 layers on CUDA0 (a card)"
        assert (
            b'edgelm_vram_bytes{device="CUDA0",kind="announced",model="fake"} 950.0'
            in server.request("GET", "/metrics")[2]
        )
    with live_embedding_server(fake_encoder_model(FakeEncoder())) as server:
        assert json.loads(server.request("GET", "/status")[2])["vram"] == []


def test_a_gpu_that_tells_no_sizes_has_no_series_of_them() -> None:
    with live_server(fake_model(GpuEngine(card=replace(CARD, free_bytes=0, total_bytes=0)))) as server:
        found, told = samples(server), json.loads(server.request("GET", "/status")[2])["vram"]
    assert not any(name == "edgelm_device_memory_bytes" for name, _ in found)
    assert any(name == "edgelm_vram_bytes" for name, _ in found)
    assert (told[0]["free_bytes"], told[0]["used_bytes"], told[0]["planned_bytes"]) == (None, None, 1000)


def test_without_a_gpu_there_are_no_series_of_one(server: LiveServer) -> None:
    names = {name for name, _ in samples(server)}
    assert not names & {"edgelm_vram_bytes", "edgelm_model_layers", "edgelm_device_memory_bytes"}
    assert json.loads(server.request("GET", "/status")[2])["vram"] == []
    with live_server(fake_model(GpuEngine(card=None))) as beside:
        assert not any("vram" in name for name, _ in samples(beside))


def test_two_servers_in_one_process_count_apart(server: LiveServer) -> None:
    server.post("/v1/completions", {"prompt": "x"})
    with live_server(fake_model(FakeEngine())) as other:
        assert samples(other)["edgelm_decode_tokens_total", ()] == 0


def test_logs_are_single_lines_without_words_or_keys() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    LOGGER.addHandler(handler)
    level = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    key = b"key-0123456789-abcdef"
    try:
        with live_server(fake_model(FakeEngine(script="Paris")), Access(key=key)) as server:
            headers = {"Authorization": f"Bearer {key.decode()}"}
            assert server.post("/v1/completions", {"prompt": SECRET}, headers)[0] == 200
            assert server.post("/v1/completions", {"prompt": SECRET, SECRET: 1}, headers)[0] == 400
            assert server.request("GET", f"/{SECRET}?key={SECRET}", headers=headers)[0] == 404
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
    text = stream.getvalue()
    records = [json.loads(line) for line in text.splitlines()]
    answered = next(record for record in records if record.get("status") == 200)
    assert answered["event"] == "request"
    assert answered["route"] == "/v1/completions"
    assert answered["completion_tokens"] == len("Paris")
    assert answered["finish_reason"] == "stop"
    assert not any(word in text for word in (SECRET, "Paris", key.decode()))


def test_an_exception_in_the_log_is_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = LOGGER.makeRecord("x", logging.ERROR, "x", 1, "broken", (), (type(error), error, error.__traceback__))
    line = JsonLines().format(record)
    assert "\n" not in line
    assert "two\nlines" in json.loads(line)["exception"]
    log_event("said without a handler")


def test_the_page_is_self_contained(server: LiveServer) -> None:
    status, headers, body = server.request("GET", "/")
    html = body.decode()
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"""(src|href|url\(|@import|https?:|//[a-z])""", html)
    assert json.loads(server.request("GET", "/status")[2])["models"][0]["name"] == "fake"
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert content is not None
        digest = base64.b64encode(hashlib.sha256(content.group(1).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"]
    assert 'lang="en"' in html
    assert '<label for="prompt">' in html
    assert "color-scheme: light dark" in html


def test_the_page_writes_no_markup_of_others() -> None:
    script = (Path(page_module.__file__).parent / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)


def test_every_answer_carries_the_protective_headers(server: LiveServer) -> None:
    for route in ("/", "/v1/models", "/nothing", "/metrics"):
        _, headers, _ = server.request("GET", route)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_a_board_that_tells_its_state(tmp_path: Path) -> None:
    """A made-up Raspberry Pi: hot, slowed down, and not lacking voltage."""
    for name, text in {
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "81250\n",
        "sys/devices/system/cpu/online": "0\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "4\n",
        "proc/vmstat": "pswpin 12\n",
        "proc/meminfo": "MemAvailable:     512 kB\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    metrics = Metrics()
    figures = Figures(Worker(fake_model(FakeEngine()), metrics), metrics, Sensors(tmp_path))
    machine = figures.document()["machine"]
    assert (machine["temperature_c"], machine["clock_mhz"], machine["throttled"]) == (81.25, 1500, ["throttled"])
    families = text_string_to_metric_families(metrics.text().decode())
    found = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    assert found["edgelm_temperature_celsius",] == 81.25
    assert found["edgelm_clock_megahertz",] == 1500
    assert found["edgelm_throttled", "throttled"] == 1
    assert found["edgelm_throttled", "under-voltage"] == 0
    assert found["edgelm_swapped_in_pages",] == 12
    assert found["edgelm_available_memory_bytes",] == 512 * 1024
