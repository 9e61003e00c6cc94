"""Trouble made on purpose is seen and labelled: a CPU quota, busy neighbours, memory pressure, a throttled board.

Quota and pressure need control groups that this user may make; elsewhere those two tests say so and are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.bench import BenchOptions, bench
from runtime.conditions import MAJOR_FAULTS
from runtime.kernels import RandomModel, write_random_gguf
from runtime.sensors import Sensors
from tests.unit.test_sensors import pi

pytestmark = pytest.mark.tiny

ROOT = Path(__file__).resolve().parents[2]
CGROUPS = Path("/sys/fs/cgroup")
QUICK = BenchOptions(prompts=(0,), generated_tokens=100, repetitions=4, threads_decode=(1,))
# The child joins its group only once everything is imported, so that a quota does not slow the imports down.
CHILD = """
import contextlib, json, sys
from pathlib import Path
from runtime.bench import BenchOptions, bench
from runtime.page_cache import drop_cached
import runtime.engines.llamacpp as llamacpp

model, group, tokens, pressure = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "pressure"
llamacpp.load_library()
(group / "cgroup.procs").write_text("0")


class Squeeze:
    "When the model is open and measuring begins, leave room for the anonymous memory and a little of the file."

    @contextlib.contextmanager
    def stage(self, name, total=None, *, unit=""):
        if pressure and name == "measuring":
            old = (group / "memory.limit_in_bytes").exists()
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            anonymous = int(stat["total_rss" if old else "anon"])
            limit = group / ("memory.limit_in_bytes" if old else "memory.max")
            limit.write_text(str(anonymous + 16 * 2**20))
        yield self

    def advance(self, amount=1):
        pass


if pressure:
    drop_cached([model])
options = BenchOptions(prompts=(0,), generated_tokens=tokens, repetitions=1 if pressure else 3, threads_decode=(1,))
report = bench(model, options, Squeeze())
print(json.dumps({"kinds": [label.kind for label in report.labels], "valid": report.valid,
                  "reasons": report.warnings, "faults": report.memory.major_faults}))
"""


def make_group(controller: str) -> Path:
    """A new control group with this controller; skips with the reason where that cannot be."""
    base = CGROUPS / controller if (CGROUPS / controller / "cgroup.procs").exists() else CGROUPS
    group = base / f"edgelm-trouble-{os.getpid()}"
    try:
        if base == CGROUPS:
            (base / "cgroup.subtree_control").write_text(f"+{controller}")
        group.mkdir()
    except OSError as error:
        pytest.skip(f"control groups of the {controller} controller cannot be made here: {error.strerror}")
    return group


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Path]:
    made = make_group(request.param)
    try:
        yield made
    finally:
        made.rmdir()


def run_in(group: Path, model: Path, tokens: int, trouble: str) -> dict[str, object]:
    command = [sys.executable, "-c", CHILD, str(model), str(group), str(tokens), trouble]
    # Pages of 2 MiB, where there happen to be some, would take the little room that is left for the file.
    environment = {**os.environ, "EDGELM_HUGE_PAGES": "off"}
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False, env=environment)
    assert child.returncode == 0, child.stderr
    document: dict[str, object] = json.loads(child.stdout)
    return document


@pytest.mark.parametrize("group", ["cpu"], indirect=True)
def test_a_cpu_quota_is_labelled(group: Path, gguf: Path) -> None:
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text("10000 100000")
    elif (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("10000")
    else:
        pytest.skip("the cpu controller is not delegated here")
    seen = run_in(group, gguf, 200, "quota")
    assert "quota" in seen["kinds"]  # type: ignore[operator]
    assert not seen["valid"]


@pytest.mark.parametrize("group", ["memory"], indirect=True)
def test_memory_pressure_is_labelled(group: Path, tmp_path: Path) -> None:
    """Mapped weights that no longer fit are read from the disk again for every token. Q5_0 has no rearranged kernels on
    any CPU; other types are copied into anonymous memory on some, and then nothing is read again."""
    if not any((group / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
        pytest.skip("the memory controller is not delegated here")
    model = tmp_path / "large.gguf"
    write_random_gguf(model, RandomModel("Q5_0", 9, 512, 2048, 8, 2))
    assert model.stat().st_size > 20 * 2**20
    seen = run_in(group, model, 3, "pressure")
    assert "paged" in seen["kinds"]  # type: ignore[operator]
    assert int(str(seen["faults"])) > MAJOR_FAULTS
    assert not seen["valid"]


def test_busy_neighbours_are_labelled(gguf: Path) -> None:
    spinning = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    neighbours = [subprocess.Popen(spinning, stdout=subprocess.PIPE) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        for neighbour in neighbours:  # an interpreter that is read from the disk starts later than bench is done
            assert neighbour.stdout is not None
            neighbour.stdout.readline()
        report = bench(gguf, QUICK)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.communicate()
    assert "busy" in {label.kind for label in report.labels}
    assert not report.valid
    assert report.conditions is not None
    assert report.conditions.foreign_cores is not None


def test_a_throttled_board_is_labelled(gguf: Path, tmp_path: Path) -> None:
    """The board slows down in the middle of the run and recovers before its end."""
    sensors = Sensors(pi(tmp_path, "0"), lambda _argument: "")
    report = bench(gguf, QUICK, sensors=sensors)
    assert "throttled" not in {label.kind for label in report.labels}
    hot, calm = threading.Event(), threading.Event()

    class Board(Sensors):
        """Readings of a tree that changes with the number of looks at it."""

        looks = 0

        def read(self, *, thorough: bool = False):  # type: ignore[no-untyped-def]
            Board.looks += 1
            if Board.looks == 6:
                pi(tmp_path, "40004")
                hot.set()
            if Board.looks == 8:
                pi(tmp_path, "0")
                calm.set()
            return super().read(thorough=thorough)

    report = bench(gguf, QUICK, sensors=Board(tmp_path, lambda _argument: ""))
    assert hot.is_set()
    assert calm.is_set()
    (label,) = [label for label in report.labels if label.kind == "throttled"]
    assert "throttled at up to 62 C" in label.reason
    assert not report.valid
    assert report.conditions is not None
    assert report.conditions.throttled == ("throttled",)
