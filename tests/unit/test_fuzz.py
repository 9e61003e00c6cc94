"""The fuzzing command on a small budget: every seed, some thousands of mutations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_malformed_input_is_refused_and_nothing_else() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--cases", "10000"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "application: 500 cases" in finished.stdout
