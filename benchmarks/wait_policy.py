"""How threads should wait: decode and prefill under several settings of libgomp, alone and beside busy neighbours.

    python benchmarks/wait_policy.py BUNDLE --rounds 5 --neighbours 0,1,2

Every sample is a process of its own (libgomp reads its environment once); settings take turns. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import edgelm, run, save

SETTINGS: dict[str, dict[str, str]] = {
    "auto": {},
    "spin": {"OMP_WAIT_POLICY": "active"},
    "100000": {"GOMP_SPINCOUNT": "100000"},
    "10000": {"GOMP_SPINCOUNT": "10000"},
    "1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--neighbours", default=f"0,1,{os.cpu_count()}")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    arguments = parser.parse_args()
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        os.environ.pop(name, None)
    command = edgelm("bench", str(arguments.bundle), "-p", "128", "-n", "32", "-r", "1", "--no-history", "--json")
    rows: list[dict[str, Any]] = []
    for count in map(int, arguments.neighbours.split(",")):
        spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            for number in range(arguments.rounds):
                for setting in arguments.settings.split(","):
                    report = json.loads(run(command, environment=SETTINGS[setting]).stdout)
                    speeds = {name: report[name]["median"] for name in ("prefill_tps", "decode_tps")}
                    chosen = report["engine"]["waiting"]
                    rows.append({"round": number, "neighbours": count, "setting": setting, "chosen": chosen, **speeds})
        finally:
            for neighbour in spinning:
                neighbour.kill()
                neighbour.wait()
    print("| neighbours | setting | prefill | decode |\n|---|---|---|---|")
    for key in dict.fromkeys((row["neighbours"], row["setting"]) for row in rows):
        chosen_rows = [row for row in rows if (row["neighbours"], row["setting"]) == key]
        cells = [f"{statistics.median(row[name] for row in chosen_rows):.1f}" for name in ("prefill_tps", "decode_tps")]
        print(f"| {key[0]} | {key[1]} | {' | '.join(cells)} |")
    print(f"raw rows: {save('wait_policy', rows)}")


if __name__ == "__main__":
    main()
