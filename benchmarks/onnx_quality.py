"""What every way of rounding a decoder for ONNX loses, at its bytes, beside GGUF with and without an importance matrix.

Each row is a whole export, measured by the proof that exports use: mean KL to transformers in float32, over windows of
the evaluation text's own half. Calibrated rows of both formats read the same other half. Bytes are those of the planned
tensors, so that a GGUF file's vocabulary does not count against it, nor an ONNX file's rotary table. The default that
others are compared with has symmetric blocks of 32 and an 8-bit head; its scales are searched already, so the bar is
higher than one of plain rounding. KL is no timing: a busy machine changes nothing.

    python benchmarks/onnx_quality.py CHECKPOINT
    python benchmarks/onnx_quality.py CHECKPOINT --only mixed --tokens 500
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgelm.progress import SILENT
from exporter import quality
from exporter.architectures import describe
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.options import ExportOptions, FormatChoice, parse_type_override
from exporter.pipeline import export
from exporter.texts import calibration_text
from exporter.verification import verify

DEFAULT, RIVAL = "symmetric, blocks of 32, 8-bit head", "GGUF Q4_K_M, importance matrix"
DEFAULT_SHARE, RIVAL_SHARE = 0.3, 1.5
"""What is aimed at: KL of the best of at most as many bytes over that of the default, and over that of GGUF."""
HEAD_8, HEAD_4 = "^(token_embd|output)=int8-32", "^(token_embd|output)=int4-64-asym"
ATTENTION, DOWN, GATE_UP = "attn_", "ffn_down", "ffn_(gate|up)"


@dataclass(frozen=True)
class Way:
    """One export. ``calibrated``: GGUF rounding is weighed by importance; ONNX recipes say so by their names."""

    name: str
    format: FormatChoice
    quant: str
    types: tuple[str, ...] = ()
    calibrated: bool = False


def ways(layers: int) -> tuple[Way, ...]:
    """All that is tried with a model of so many layers."""
    edges = "|".join(str(index) for index in sorted({0, 1, layers - 2, layers - 1}))
    others = "|".join(str(index) for index in range(0, layers, 2))
    wide = (f"{ATTENTION}=int8-128", f"{DOWN}=int8-128")
    return (
        Way(DEFAULT, "onnx", "int4-32", (HEAD_8,)),
        Way("asymmetric, 8-bit head (int4)", "onnx", "int4"),
        Way("some of 8 bits, 8-bit head (int4-mixed)", "onnx", "int4-mixed"),
        Way("compensated (int4-gptq)", "onnx", "int4-gptq"),
        Way("compensated, 8-bit head", "onnx", "int4-gptq", (HEAD_8,)),
        Way("compensated, attention of 8 bits", "onnx", "int4-gptq", (f"{ATTENTION}=int8-64",)),
        Way("compensated, attention and down of 8 bits (int4-mixed-gptq)", "onnx", "int4-mixed-gptq"),
        Way(
            "the same, gate and up of the outer layers too",
            "onnx",
            "int4-mixed-gptq",
            (rf"blk\.({edges})\.{GATE_UP}=int8-64",),
        ),
        Way(
            "the same 128 wide, gate and up of every other layer, table 64 wide",
            "onnx",
            "int4-mixed-gptq",
            (*wide, rf"blk\.({others})\.{GATE_UP}=int8-128", HEAD_4),
        ),
        Way(
            "the same 128 wide, gate and up in blocks of 16",
            "onnx",
            "int4-mixed-gptq",
            (*wide, f"{GATE_UP}=int4-16-asym", HEAD_4),
        ),
        Way("8 bits as they are (int8-32)", "onnx", "int8-32"),
        Way("8 bits, channels balanced (int8)", "onnx", "int8"),
        Way("GGUF Q4_0, importance matrix", "gguf", "Q4_0", calibrated=True),
        Way("GGUF Q4_K_M", "gguf", "Q4_K_M"),
        Way(RIVAL, "gguf", "Q4_K_M", calibrated=True),
        Way("GGUF Q8_0", "gguf", "Q8_0"),
    )


def measured(way: Way, source: Path, checkpoint: Checkpoint, text: Path, tokens: int) -> dict[str, Any]:
    """Export one way and prove it. Raises what exports raise."""
    options = ExportOptions(
        str(source),
        target="amd-epyc-9374f",
        format=way.format,
        quant=way.quant,
        type_overrides=tuple(parse_type_override(item, way.format) for item in way.types),
        calibration=text if way.calibrated or way.quant.endswith("-gptq") else None,
        verify=False,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=text.parent) as directory:
        bundle = export(options, Path(directory) / "bundle")
        exported_s = time.monotonic() - started
        identity = verify(bundle.path, None).token_identity
        found = quality.measure(
            bundle.artifact_path, checkpoint, identity, None, SILENT, reference="transformers", tokens=tokens
        )
    return {
        "way": way.name,
        "format": way.format,
        "quant": way.quant,
        "types": list(way.types),
        "tensor_bytes": sum(item.size_bytes for item in bundle.manifest.plan.tensors),
        "artifact_bytes": bundle.manifest.artifact_bytes,
        "export_s": exported_s,
        **found.model_dump(include={"kl_mean", "kl_mean_interval", "kl_p99", "top1_agreement", "tokens", "reference"}),
    }


def earlier_rows(name: str, kept: AbstractSet[str]) -> list[dict[str, Any]]:
    """Rows of an earlier call that are not measured again now."""
    path = RESULTS / f"{name}.jsonl"
    found = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    return [row for row in found if row.get("way") in kept]


def shown(row: dict[str, Any]) -> str:
    """A line of the table."""
    low, high = row["kl_mean_interval"]
    recipe = " ".join([row["quant"], *(f"--type '{item}'" for item in row["types"])])
    figures = f"{row['tensor_bytes'] / 1e6:.1f} | {row['kl_mean']:.4f} ({low:.4f} to {high:.4f}) | {row['kl_p99']:.3f}"
    return f"| {row['way']} | `{recipe}` | {figures} | {row['top1_agreement']:.1%} | {row['export_s']:.0f} |"


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For both bars the best ONNX row of at most as many bytes; nothing for a bar whose row was left out."""
    told = []
    for name, share in ((DEFAULT, DEFAULT_SHARE), (RIVAL, RIVAL_SHARE)):
        bar = next((row for row in rows if row["way"] == name), None)
        if bar is None:
            continue
        others = [row for row in rows if row["format"] == "onnx" and row is not bar]
        best = min(
            (row for row in others if row["tensor_bytes"] <= bar["tensor_bytes"]),
            key=lambda row: float(row["kl_mean"]),
            default=None,
        )
        if best is None:
            told.append(f"{name}: no ONNX row of at most {bar['tensor_bytes']} bytes")
            continue
        ratio = best["kl_mean"] / bar["kl_mean"]
        told.append(
            f"{name}, {bar['tensor_bytes'] / 1e6:.1f} MB, KL {bar['kl_mean']:.4f}: best of at most as many bytes is "
            f"'{best['way']}', {best['tensor_bytes'] / 1e6:.1f} MB, KL {best['kl_mean']:.4f}, {ratio:.2f} of it "
            f"({'within' if ratio <= share else 'misses'} {share:g})"
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face directory")
    parser.add_argument("--tokens", type=int, default=quality.MIN_TOKENS, help="predictions that are counted")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name it is found in")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(open_source(str(arguments.checkpoint)))
    layers = describe(checkpoint, "onnx").dimensions.layers
    chosen = [way for way in ways(layers) if re.search(arguments.only, way.name)]
    if not chosen:
        parser.error(f"--only {arguments.only} is found in no row's name")
    name = f"onnx_quality-{arguments.checkpoint.resolve().name}"
    rows = earlier_rows(name, {way.name for way in ways(layers)} - {way.name for way in chosen})
    print("| way | --quant | MB | mean KL (95 %) | p99 | same first choice | export s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="onnx-quality-") as directory:
        text = Path(directory) / "calibration.txt"
        text.write_text(calibration_text(None).content, encoding="utf-8")
        for way in chosen:
            rows.append(measured(way, arguments.checkpoint, checkpoint, text, arguments.tokens))
            print(shown(rows[-1]), flush=True)
            path = save(name, rows)
    for line in verdicts(rows):
        print(line)
    print(f"raw rows: {path}")


if __name__ == "__main__":
    main()
