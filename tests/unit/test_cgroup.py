"""A real cgroup of 1 CPU and 512 MiB: threads, memory and verdicts follow it and name it.

The test makes the cgroup where it may: through systemd, or as root below its own cgroups, of version 1 where the
controllers are mounted by it and of version 2 elsewhere. Where none is possible it says what is missing; made-up trees
are tested in ``test_host``.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_llama

LIMIT_BYTES = 512 * 2**20
CPU_FILES = ("cpu.max", "cpu.cfs_quota_us")
MEMORY_FILES = ("memory.max", "memory.limit_in_bytes")


@pytest.fixture(scope="module")
def limited() -> Iterator[list[str]]:
    """The beginning of a command line that runs the rest of it with 1 CPU and 512 MiB."""
    if Path("/run/systemd/system").is_dir() and shutil.which("systemd-run") and os.geteuid() == 0:
        quiet = ["systemd-run", "--scope", "--quiet", "--collect"]
        yield [*quiet, "-p", "CPUQuota=100%", "-p", f"MemoryMax={LIMIT_BYTES}", "--"]
        return
    if os.geteuid() != 0:
        pytest.skip("making a cgroup needs root or systemd")
    with ExitStack() as stack:
        joining = " && ".join(f"echo $$ > {group}/cgroup.procs" for group in make_cgroups(stack))
        yield ["sh", "-c", f'{joining} && exec "$@"', "sh"]


def make_cgroups(stack: ExitStack) -> list[Path]:
    """New cgroups with the limits below this process's own ones; skips with the reason where that cannot be."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    parents = {}
    for controller in ("cpu", "memory"):
        names = next((key for key in own if controller in key.split(",")), None)
        for words in mounts if names is not None else []:
            if words[2] == "cgroup" and controller in words[3].split(","):
                parents[controller] = below(Path(words[1]), own[names])
    if len(parents) == 2:
        return [new_group(stack, parents["cpu"], ["cpu"]), new_group(stack, parents["memory"], ["memory"])]
    mounted = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
    if mounted is None or "" not in own:
        pytest.skip("no cgroup file system is mounted")
    parent = below(mounted, own[""])
    missing = {"cpu", "memory"} - set((parent / "cgroup.controllers").read_text().split())
    if missing:
        pytest.skip(f"cgroup version 2 has no {' and '.join(sorted(missing))} controller here")
    try:
        (parent / "cgroup.subtree_control").write_text("+cpu +memory")
    except OSError as error:
        pytest.skip(f"the system does not let a cgroup be divided: {error.strerror}")
    return [new_group(stack, parent, ["cpu", "memory"])]


def below(mounted: Path, own: str) -> Path:
    """A process's cgroup under a mount; a container sees its own one as the root of the mount."""
    path = mounted / own.lstrip("/")
    return path if path.is_dir() else mounted


def new_group(stack: ExitStack, parent: Path, controllers: Sequence[str]) -> Path:
    group = parent / f"edgelm-test-{os.getpid()}"
    try:
        group.mkdir()
        stack.callback(group.rmdir)
        for name, version_2, version_1, limit in (
            ("cpu", CPU_FILES[0], CPU_FILES[1], "100000"),
            ("memory", MEMORY_FILES[0], MEMORY_FILES[1], str(LIMIT_BYTES)),
        ):
            if name in controllers:
                (group / (version_2 if (group / version_2).exists() else version_1)).write_text(limit)
    except OSError as error:
        pytest.skip(f"the system does not let a cgroup be made: {error.strerror}")
    return group


def edgelm(limited: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*limited, sys.executable, "-m", "edgelm", *arguments, "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path.cwd())


def named(sentence: str, files: Sequence[str]) -> bool:
    return any(f"cgroup {name}" in sentence for name in files)


def test_detected_threads_and_memory_follow_a_real_cgroup(limited: list[str]) -> None:
    child = edgelm(limited, "targets", "detect", "--no-measure")
    assert child.returncode == 0, child.stderr
    seen = json.loads(child.stdout)
    for threads in (seen["threads_decode"], seen["threads_prefill"]):
        assert threads["value"] == 1
        assert named(threads["reason"], CPU_FILES) or os.cpu_count() == 1
    assert 0 < seen["available"]["value"] <= LIMIT_BYTES
    assert named(seen["available"]["reason"], MEMORY_FILES)
    assert seen["ram_bytes"] == LIMIT_BYTES


def test_plans_follow_a_real_cgroup_and_name_it(limited: list[str], tmp_path: Path) -> None:
    source = hollow_llama(tmp_path / "large")
    free = edgelm([], "plan", str(source), "--quant", "Q4_0")
    if free.returncode != 0:
        pytest.skip("this machine itself has too little memory free for the model")
    child = edgelm(limited, "plan", str(source), "--quant", "Q4_0")
    assert child.returncode == 4, child.stderr
    (candidate,) = json.loads(child.stdout)["candidates"]
    assert candidate["fits"] is False
    assert named(candidate["reason"], MEMORY_FILES)
    assert named(child.stderr, MEMORY_FILES)


def hollow_llama(directory: Path) -> Path:
    """A checkpoint of 1.8 G weights of which only the header is on disk: planning reads no more."""
    scale = 32
    make_tiny_llama(directory, layers=48)
    config = json.loads((directory / "config.json").read_text())
    config |= {key: scale * config[key] for key in ("hidden_size", "intermediate_size", "head_dim")}
    (directory / "config.json").write_text(json.dumps(config))
    weights = directory / "model.safetensors"
    with weights.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    offset = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        rows = entry["shape"] if "embed" in name else [scale * entry["shape"][0], *entry["shape"][1:]]
        entry["shape"] = [*rows[:1], *(scale * size for size in rows[1:])]
        size_bytes = 4 * entry["shape"][0] * (entry["shape"] + [1])[1]
        entry["data_offsets"] = [offset, offset + size_bytes]
        offset += size_bytes
    document = json.dumps(header).encode()
    document += b" " * (-len(document) % 8)
    with weights.open("wb") as stream:
        stream.write(struct.pack("<Q", len(document)) + document)
        stream.truncate(8 + len(document) + offset)
    return directory
