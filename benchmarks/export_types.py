"""One checkpoint in every type that the tool offers: bytes, KL on a short text, seconds, or why not.

Whole exports in this process, one after the other, proof of tokens and quality included. KL over two thousand tokens
orders types; it is no figure to compare across pages. Rows are added to the file of raw rows one by one, so that types
can be run in several sittings.

    python benchmarks/export_types.py CHECKPOINT
    python benchmarks/export_types.py CHECKPOINT --quant Q4_0 --quant int4
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from measure import append, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgelm.errors import EdgelmError
from exporter.mixes import MIXES
from exporter.options import ExportOptions, FormatChoice
from exporter.pipeline import export

CHARACTERS = 13000
ONNX = ("fp32", "int8", "int8-asym", "int4", "int4-asym", "int4-64", "int4-128")


def exported(checkpoint: Path, format_name: FormatChoice, quant: str, text: Path, *, verify: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"format": format_name, "quant": quant}
    options = ExportOptions(
        str(checkpoint),
        target="amd-epyc-9374f",
        format=format_name,
        quant=quant,
        context=1024,
        evaluation=text if verify else None,
        verify=verify,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=text.parent) as directory:
        try:
            manifest = export(options, Path(directory) / "bundle").manifest
        except EdgelmError as error:
            return {**row, "error": error.message}
        shutil.rmtree(Path(directory) / "bundle")
    row |= {
        "seconds": time.monotonic() - started,
        "artifact_bytes": manifest.artifact_bytes,
        "bits_per_weight": manifest.plan.bits_per_weight,
        "types": manifest.plan.type_counts,
    }
    if manifest.quality is None:
        return row
    return {**row, **manifest.quality.model_dump(include={"kl_mean", "top1_agreement", "tokens"})}


def shown(row: dict[str, Any]) -> str:
    name = f"{row['format']} {row['quant']}"
    if "error" in row:
        return f"| {name} | - | - | - | - | - | {row['error']} |"
    types = ", ".join(f"{count} {kind}" for kind, count in row["types"].items())
    lost = f"{row['kl_mean']:.4f} | {row['top1_agreement']:.1%}" if "kl_mean" in row else "- | -"
    sizes = f"{row['bits_per_weight']:.2f} | {row['artifact_bytes'] / 1e6:.1f}"
    return f"| {name} | {sizes} | {lost} | {row['seconds']:.1f} | {types} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--quant", action="append", default=[], help="repeatable; default: all")
    parser.add_argument("--no-verify", action="store_true", help="leave out KL: does every type go through?")
    arguments = parser.parse_args()
    cases: list[tuple[FormatChoice, str]] = [("gguf", quant) for quant in MIXES]
    cases += [("onnx", quant) for quant in ONNX]
    unknown = set(arguments.quant) - {quant for _, quant in cases}
    if unknown:
        parser.error(f"no such type: {', '.join(sorted(unknown))}")
    print("| export | bits per weight | MB | KL | same top token | s | tensors, or why not |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory) / "text.txt"
        text.write_text("\n".join(topics.values())[-CHARACTERS:], encoding="utf-8")
        for format_name, quant in cases:
            if arguments.quant and quant not in arguments.quant:
                continue
            row = exported(arguments.checkpoint, format_name, quant, text, verify=not arguments.no_verify)
            print(shown(row), flush=True)
            if not arguments.no_verify:
                append("export_types", {"checkpoint": arguments.checkpoint.name, **row, "machine": machine()})


if __name__ == "__main__":
    main()
