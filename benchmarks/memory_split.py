"""Memory by purpose against what the kernel says from outside: smaps_rollup and a control group of the process's own.

    python benchmarks/memory_split.py BUNDLE ... --contexts 512,2048,4096

For every bundle and context a child opens the model, fills the context, splits its memory by purpose and waits; the
parent then reads the child's ``smaps_rollup`` and, where control groups may be made, the group's own count of anonymous
memory. Says the largest gap; rows go to ``results/memory_split.jsonl``. Needs no quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import save

CGROUPS = Path("/sys/fs/cgroup")
CHILD = """
import json, sys
from pathlib import Path
from runtime.engine import EngineOptions
from runtime.engines import load_library
from runtime.memory import KnowsItsCache, Ledger
from runtime.model import artifact_of, open_model
from runtime.points import Point, Runner, Until
from runtime.sensors import Sampler, Sensors
from runtime.starts import model_files

path, context = Path(sys.argv[1]), int(sys.argv[2])
artifact, _ = artifact_of(path, check_hashes=False)
load_library(artifact)
files = model_files(artifact)
sampler = Sampler(Sensors(), 0)
ledger = Ledger()
model = open_model(path, EngineOptions(context=context))
engine = model.engine
cache = lambda: engine.resident_kv_bytes() if isinstance(engine, KnowsItsCache) else engine.info.kv_bytes
ledger.opened(files, cache())
Runner(engine, model.tokenizer, sampler).run([Point("prefill", context - 16), Point("decode", 8)], Until(1))
parts = ledger.parts(files, cache(), engine.info.buffers)
print(json.dumps({**parts.model_dump(), "kv_reserved_bytes": engine.info.kv_bytes}), flush=True)
sys.stdin.read()
"""


def make_group() -> Path | None:
    base = CGROUPS / "memory" if (CGROUPS / "memory" / "cgroup.procs").exists() else CGROUPS
    group = base / f"edgelm-split-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return None
    return group


def rollup(pid: int) -> dict[str, int]:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}


def group_anonymous(group: Path) -> int | None:
    match = re.search(r"^(?:total_rss|anon) (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    return int(match.group(1)) if match else None


def split(path: Path, context: int, group: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-c", CHILD, str(path), str(context)]
    if group is not None:
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"{path} at context {context} gave no answer")
    parts = json.loads(line)
    outside = rollup(child.pid)
    anonymous = group_anonymous(group) if group is not None else None
    child.stdin.close()
    child.wait()
    left_out = ("unexplained_bytes", "kv_reserved_bytes")
    total = sum(value or 0 for name, value in parts.items() if name not in left_out)
    return {
        "bundle": path.name,
        "context": context,
        **parts,
        "parts_bytes": total,
        "rss_bytes": outside["Rss"],
        "pss_bytes": outside["Pss"],
        "anonymous_bytes": outside["Anonymous"],
        "cgroup_anonymous_bytes": anonymous,
        "gap": total / outside["Rss"] - 1,
        "cgroup_gap": None if anonymous is None else anonymous / outside["Anonymous"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--contexts", default="512,2048,4096")
    arguments = parser.parse_args()
    group = make_group()
    rows = []
    try:
        for path in arguments.bundles:
            for context in map(int, arguments.contexts.split(",")):
                row = split(path, context, group)
                rows.append(row)
                written = save("memory_split", rows)  # after every row: a run may be cut short
                mb = {name: round((value or 0) / 1e6, 1) for name, value in row.items() if name.endswith("_bytes")}
                print(f"{path.name} {context}: {row['gap']:+.2%} of smaps_rollup, {mb}", flush=True)
    finally:
        if group is not None:
            group.rmdir()
    print(f"largest gap to smaps_rollup: {max(abs(row['gap']) for row in rows):.2%}")
    gaps = [abs(row["cgroup_gap"]) for row in rows if row["cgroup_gap"] is not None]
    if gaps:
        print(f"largest gap between cgroup and smaps_rollup, anonymous: {max(gaps):.2%}")
    print(f"raw rows: {written}")


if __name__ == "__main__":
    main()
