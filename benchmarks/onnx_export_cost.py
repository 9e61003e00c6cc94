"""What an ONNX export costs, ours against ``optimum-cli export onnx`` and onnxruntime-genai's model builder, in turn.

Time and peak RSS of whole processes, as the operating system accounts them, unverified as the peers' are. Who goes
first alternates, so that a drifting machine favours nobody. A peer that is missing is named; one that fails costs its
own row and no other. Our modules are compiled ahead, as an installer does it and did for the peers'.

    python -m venv /tmp/genai && /tmp/genai/bin/pip install onnxruntime-genai onnx_ir torch "transformers>=5"
    python benchmarks/onnx_export_cost.py DIRECTORY --genai /tmp/genai/bin/python --runs 5
"""

from __future__ import annotations

import argparse
import compileall
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import edgelm, run, save

ROOT = Path(__file__).resolve().parents[1]

OPTIMUM_FP32, GENAI_INT4 = "optimum fp32", "genai int4"
# What is compared: ours, theirs, and the shares of their time and peak RSS that are aimed at.
PAIRS = (("edgelm fp32", OPTIMUM_FP32, 0.1, 0.4), ("edgelm int4", GENAI_INT4, 0.5, 0.4))


@dataclass(frozen=True)
class Contestants:
    """Commands by side, to which the directory to write is appended, and why others do not take part."""

    commands: dict[str, list[str]]
    missing: list[str]


def optimum_command(source: Path) -> list[str]:
    """``optimum-cli export onnx`` of a decoder with its cache; the directory to write comes last."""
    started = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx"]
    return [*started, "--model", str(source), "--task", "text-generation-with-past"]


def contestants(source: Path, genai: Path | None, cache: Path) -> Contestants:
    """Everybody who can take part."""
    ours = ("export", str(source), "--format", "onnx", "--no-verify", "--quant")
    commands = {f"edgelm {quant}": edgelm(*ours, quant, "-o") for quant in ("fp32", "int8", "int4")}
    missing = []
    if can_import(sys.executable, "optimum.exporters.onnx"):
        commands[OPTIMUM_FP32] = optimum_command(source)
    else:
        missing.append("optimum-onnx (pip install 'edgelm[optimum]')")
    if genai is None:
        missing.append("onnxruntime-genai's builder: name an interpreter that has it with --genai")
    elif not can_import(genai, "onnxruntime_genai.models.builder"):
        missing.append(f"onnxruntime-genai's builder: {genai} lacks it, or torch, transformers or onnx_ir")
    else:
        builder = [str(genai), "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-p", "int4", "-e", "cpu"]
        commands[GENAI_INT4] = [*builder, "-c", str(cache), "-o"]
    return Contestants(commands, missing)


def can_import(python: Path | str, module: str) -> bool:
    """Whether an interpreter can import a module."""
    return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def measured(commands: dict[str, list[str]], runs: int, work: Path) -> list[dict[str, Any]]:
    """Raw rows; what was written is counted and thrown away."""
    rows: list[dict[str, Any]] = []
    for number in range(runs):
        for side in list(commands) if number % 2 else list(commands)[::-1]:
            output = work / f"{side.replace(' ', '-')}-{number}"
            try:
                finished = run([*commands[side], str(output)])
            except SystemExit as error:  # what ``run`` raises for a command that failed
                rows.append({"run": number, "side": side, "error": str(error)})
                print(f"{side}: {error}", file=sys.stderr)
                continue
            size_bytes = sum(path.stat().st_size for path in output.rglob("*.onnx*") if path.is_file())
            shutil.rmtree(output)
            figures = {"wall_s": finished.wall_s, "cpu_s": finished.cpu_s, "peak_rss_bytes": finished.peak_rss_bytes}
            rows.append({"run": number, "side": side, **figures, "onnx_bytes": size_bytes})
            print(f"{side}: {finished.wall_s:.1f} s, {finished.peak_rss_bytes / 2**20:.0f} MiB", flush=True)
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """Medians as a table, and ours over theirs."""
    good = [row for row in rows if "wall_s" in row]

    def median(side: str, field: str) -> float:
        return statistics.median(row[field] for row in good if row["side"] == side)

    sides = list(dict.fromkeys(row["side"] for row in good))
    print("\n| side | s | CPU s | peak MiB | MB written |\n|---|---|---|---|---|")
    for side in sorted(sides):
        seconds, cpu_s = median(side, "wall_s"), median(side, "cpu_s")
        peak, size = median(side, "peak_rss_bytes") / 2**20, median(side, "onnx_bytes") / 1e6
        print(f"| {side} | {seconds:.1f} | {cpu_s:.1f} | {peak:.0f} | {size:.1f} |")
    for ours, theirs, time_share, peak_share in PAIRS:
        if ours in sides and theirs in sides:
            time_ratio = median(ours, "wall_s") / median(theirs, "wall_s")
            peak_ratio = median(ours, "peak_rss_bytes") / median(theirs, "peak_rss_bytes")
            told = f"{ours} over {theirs}: time {time_ratio:.3f} (aim {time_share:g})"
            print(f"{told}, peak RSS {peak_ratio:.3f} (aim {peak_share:g})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, help="a Hugging Face directory")
    parser.add_argument("--genai", type=Path, help="a Python interpreter that has onnxruntime-genai's model builder")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--label", default="", help="of the machine, in the name of the file of rows")
    arguments = parser.parse_args()
    for package in ("edgelm", "exporter", "runtime", "targets"):
        compileall.compile_dir(ROOT / package, quiet=1)
    with tempfile.TemporaryDirectory(prefix="onnx-export-cost-") as directory:
        work = Path(directory)
        found = contestants(arguments.source, arguments.genai, work / "cache")
        rows = measured(found.commands, arguments.runs, work)
    rows += [{"missing": text} for text in found.missing]
    name = "-".join(filter(None, ("onnx_export_cost", arguments.source.resolve().name, arguments.label)))
    path = save(name, rows)
    summarise(rows)
    for text in found.missing:
        print(f"missing: {text}")
    print(f"raw rows: {path}")


if __name__ == "__main__":
    main()
