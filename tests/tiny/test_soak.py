"""The abuse of ``benchmarks/soak.py`` in small: the command itself, on a tiny random model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tiny

ROOT = Path(__file__).resolve().parents[2]


def test_the_server_stands_aborts_kills_slow_clients_and_a_full_disk(tmp_path: Path) -> None:
    options = [
        "--cases",
        "aborts,kills,drain,disk",
        "--aborts",
        "150",
        "--kills",
        "1",
        "--name",
        str(tmp_path / "soak"),
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *options]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows if "said" in row] == ["aborts", "kills", "drain", "disk"]
    outcomes = next(row["outcomes"] for row in rows if "outcomes" in row)
    assert set(outcomes) <= {"200", "429", "sent"}
    assert outcomes["200"] > 30
