"""A real cgroup of 1 CPU and 512 MiB: threads, memory and verdicts follow it and name it.

The test makes the cgroup where it may: through systemd, or as root below its own cgroup of version 2. Where neither is
possible it says what is missing; made-up trees are tested in ``test_host``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT_BYTES = 512 * 2**20
CHILD = """
import json
from targets.catalogue import workload_from_figures
from targets.host import available_memory, default_threads, detect_host
from targets.predict import RunSettings, predict
model = workload_from_figures(parameters=1.24e9, file_bytes=770 * 2**20, quant="Q4_K_M")
decode, prefill = default_threads()
free = available_memory()
verdict = predict(model, detect_host(), RunSettings(context=512))
print(json.dumps({"decode": decode.model_dump(), "prefill": prefill.model_dump(), "free": free.model_dump(),
                  "fits": verdict.fits, "reason": verdict.fit_reason}))
"""


@pytest.fixture
def limited() -> Iterator[list[str]]:
    """The beginning of a command line that runs the rest of it with 1 CPU and 512 MiB."""
    if Path("/run/systemd/system").is_dir() and shutil.which("systemd-run") and os.geteuid() == 0:
        quiet = ["systemd-run", "--scope", "--quiet", "--collect"]
        yield [*quiet, "-p", "CPUQuota=100%", "-p", f"MemoryMax={LIMIT_BYTES}", "--"]
        return
    group = make_cgroup()
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        group.rmdir()


def make_cgroup() -> Path:
    """A new cgroup with the limits below this process's own one; skips with the reason where that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("making a cgroup needs root or systemd")
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    mounted = [Path(words[1]) for words in mounts if words[2] == "cgroup2"]
    if not mounted:
        pytest.skip("no cgroup file system of version 2 is mounted")
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    parent = mounted[0] / own.lstrip("/")
    if not parent.is_dir():
        pytest.skip("this process's cgroup is outside of what is mounted")
    missing = {"cpu", "memory"} - set((parent / "cgroup.controllers").read_text().split())
    if missing:
        pytest.skip(f"cgroup version 2 has no {' and '.join(sorted(missing))} controller here (version 1 holds them)")
    group = parent / f"edgelm-test-{os.getpid()}"
    try:
        (parent / "cgroup.subtree_control").write_text("+cpu +memory")
        group.mkdir()
    except OSError as error:
        pytest.skip(f"the system does not let a cgroup be made: {error.strerror}")
    (group / "cpu.max").write_text("100000 100000")
    (group / "memory.max").write_text(str(LIMIT_BYTES))
    return group


def test_threads_and_verdicts_follow_a_real_cgroup(limited: list[str]) -> None:
    child = subprocess.run(
        [*limited, sys.executable, "-c", CHILD], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert child.returncode == 0, child.stderr
    seen = json.loads(child.stdout)
    assert seen["decode"]["value"] == seen["prefill"]["value"] == 1
    if (os.cpu_count() or 1) > 1:
        assert "cpu.max grants 1 CPU" in seen["decode"]["reason"]
    assert 0 < seen["free"]["value"] <= LIMIT_BYTES
    assert "memory.max" in seen["free"]["reason"]
    assert seen["fits"] == "no"
    assert "memory.max" in seen["reason"]
