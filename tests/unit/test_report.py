"""The report's format: its schema document, what is read, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from edgelm.errors import ProfileError
from edgelm.report import (
    REPORT_SCHEMA_VERSION,
    DeviceRecord,
    Measurement,
    Report,
    Samples,
    parse_report,
    read_report,
    report_schema,
)
from targets.changes import unlike
from targets.history import Entry, entries, history_path, one, remember, select
from targets.report.bench_table import markdown, rows

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = {"median": 40.0, "p5": 39.0, "p95": 41.0, "samples": [39.0, 40.0, 41.0]}
VERSION_1: dict[str, Any] = {
    "schema_version": 1,
    "created": "2026-11-23T20:09:09+00:00",
    "model": {
        "name": "tiny",
        "format": "gguf",
        "quant": "Q8_0",
        "architecture": "llama",
        "parameters": 1262848,
        "artifact_bytes": 1135360,
        "sha256": None,
    },
    "settings": {
        "prompt_tokens": 8,
        "generated_tokens": 4,
        "repetitions": 3,
        "depth": 0,
        "context": 8,
        "threads_decode": 2,
        "threads_prefill": 1,
    },
    "engine": {"name": "llama.cpp", "edgelm": "0.1.0", "llama.cpp": "0.5.0-dev", "system": "CPU : AVX2 = 1 |"},
    "prefill_tps": SAMPLES,
    "decode_tps": SAMPLES,
    "ttft_s": None,
    "load_s": 0.02,
    "memory": {
        "rss_peak_bytes": 72798208,
        "anonymous_bytes": 42024960,
        "file_bytes": 30773248,
        "kv_bytes": 262144,
        "weights_bytes": 1128448,
    },
    "predicted": None,
    "quality": None,
    "host": {
        "profile": "host",
        "cpu": "Test CPU",
        "isa": ["avx2"],
        "cores": 2,
        "ram_bytes": 25276510208,
        "available_ram_bytes": 21219815424,
        "os": "Linux",
        "limits": [],
    },
    "valid": False,
    "warnings": ["other processes kept 1.6 cores busy"],
}


def current(**changes: Any) -> Report:
    """The old report as it is read today, with changes."""
    document = parse_report(json.dumps(VERSION_1), "test").model_dump(mode="json")
    return Report.model_validate_json(json.dumps({**document, **changes}))


def valid(decode_tps: float, **changes: Any) -> Report:
    samples = {**SAMPLES, "median": decode_tps}
    return current(valid=True, warnings=[], labels=[], decode_tps=samples, measurements=[], **changes)


def test_the_schema_document_is_current() -> None:
    written = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    assert written == report_schema(), "run: make docs"
    assert written["properties"]["schema_version"]["const"] == REPORT_SCHEMA_VERSION


def test_every_field_is_documented() -> None:
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert [name for name in Report.model_fields if f"`{name}`" not in text] == []


def test_version_1_is_brought_up_to_date() -> None:
    report = parse_report(json.dumps(VERSION_1), "old.json")
    assert report.schema_version == REPORT_SCHEMA_VERSION
    assert report.engine.name == "llama.cpp"
    assert report.engine.versions == {"edgelm": "0.1.0", "llama.cpp": "0.5.0-dev"}
    assert [(item.kind, item.tokens, item.threads) for item in report.measurements] == [
        ("prefill", 8, 1),
        ("decode", 4, 2),
    ]
    assert [(label.kind, label.reason) for label in report.labels] == [
        ("unclassified", "other processes kept 1.6 cores busy")
    ]
    assert report.measurements[0].labels == report.labels


def test_a_report_survives_the_round_trip(tmp_path: Path) -> None:
    report = current()
    path = tmp_path / "report.json"
    path.write_text(report.model_dump_json(indent=2), encoding="utf-8")
    assert read_report(path) == report


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "schema_version is missing"),
        ("{}", "schema_version is missing"),
        ('{"schema_version": 99}', "schema version 99, this EdgeLM reads up to 2"),
        ('{"schema_version": 2}', "is not a valid report: created"),
        ('{"schema_version": 1, "engine": 3}', "is not a valid report"),
    ],
)
def test_what_is_no_report_is_refused_with_a_sentence(text: str, words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        parse_report(text, "x.json")


def test_a_labelled_run_cannot_be_valid() -> None:
    with pytest.raises(ValidationError, match="cannot be valid"):
        current(valid=True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.json"):
        read_report(tmp_path / "none.json")


def test_the_history_lists_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert entries() == []
    for speed in (40.0, 41.0, 39.5):
        path = remember(valid(speed))
    assert path == history_path() == tmp_path / "edgelm" / "history.jsonl"
    remember(current())  # spoilt: neither judged nor judged by
    remember(valid(39.0))
    remember(valid(30.0))
    remember(valid(30.0, model={**VERSION_1["model"], "name": "other"}))
    found = entries()
    assert [entry.regression for entry in found] == [None, None, None, None, False, True, None]
    assert found[5].change == pytest.approx(30 / 39.75 - 1)
    assert found[5].earlier == 4
    assert [entry.report.model.name for entry in select(found, "other")] == ["other"]
    assert select(found, "nobody") == []
    chosen: Entry = one(found, found[2].id)
    assert chosen is found[2]


def test_a_run_on_a_gpu_is_another_way(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    before = valid(40.0)
    card = DeviceRecord(name="CUDA0", description="a card", backend="CUDA", kind="gpu", total_bytes=8 * 10**9)
    on_gpu = {"devices": (card,), "gpu": "CUDA0", "gpu_layers": 31, "layers": 31}
    there = valid(90.0)
    there = there.model_copy(update={"engine": there.engine.model_copy(update=on_gpu)})
    filed, rearranged = (
        there.model_copy(update={"engine": there.engine.model_copy(update={"host_repack": where})})
        for where in (False, True)
    )
    for report in (before, before, before, there, before, rearranged, filed):
        remember(report, path)
    assert [entry.earlier for entry in entries(path)] == [0, 1, 2, 0, 3, 0, 1]
    assert {"GPU: None / CUDA0", "GPU layers: 0 / 31"} <= set(unlike(before, there))
    assert unlike(filed, rearranged) == ("rearranged beside a GPU: False / True",)
    assert unlike(there, filed) == (), "reports of before had none rearranged"
    samples = Samples(median=40.0, p5=39.0, p95=41.0, samples=(39.0, 40.0, 41.0))
    place: dict[str, Any] = {"depth": 0, "sequences": 1, "threads": 2, "started_s": 0.0, "seconds": 1.0}
    point = Measurement(kind="decode", tokens=128, tps=samples, **place)
    tables = [report.model_copy(update={"measurements": (point,)}) for report in (before, there)]
    told = [(row["backends"], row["n_gpu_layers"]) for table in tables for row in rows(table)]
    assert told == [("CPU", 0), ("CUDA", 31)]
    assert "| CUDA |" in markdown(tables[1])


def test_a_history_that_grew_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("targets.history.KEPT_BYTES", 5000)
    path = tmp_path / "history.jsonl"
    for speed in range(10, 30):
        remember(valid(float(speed)), path)
    found = entries(path)
    assert 2 <= len(found) < 20
    assert found[-1].report.decode_tps is not None
    assert found[-1].report.decode_tps.median == 29


def test_a_damaged_history_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ProfileError, match="line 1"):
        entries(path)
