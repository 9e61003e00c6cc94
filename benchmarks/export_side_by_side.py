"""Export of one Hugging Face directory: ours against llama.cpp's converter followed by its quantiser, in turn.

Time, peak RSS and bytes written of whole processes; proof is off on our side because the peer has none (token
identity stays on). Needs ``make peers`` and the ``export`` extra (the converter loads torch and transformers).

    python benchmarks/export_side_by_side.py CHECKPOINT --peers .cache/peers --runs 5
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import edgelm, median_of, row, run, save


def peer_export(checkpoint: Path, quant: str, peers: Path, scratch: Path) -> list[dict[str, Any]]:
    """The two steps of the peer, a row each."""
    sources = next(peers.glob("llama_cpp_python-*/vendor/llama.cpp"))
    middle, final = scratch / "middle.gguf", scratch / "final.gguf"
    convert = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(checkpoint), "--outtype", "auto"]
    steps = {
        "convert": [*convert, "--outfile", str(middle)],
        "quantize": [str(peers / "build" / "bin" / "llama-quantize"), str(middle), str(final), quant],
    }
    rows = [row(f"peer {step}", quant, run(command)) for step, command in steps.items()]
    for item, path in zip(rows, (middle, final), strict=True):
        item["file_bytes"] = path.stat().st_size
        path.unlink()
    return rows


def our_export(checkpoint: Path, quant: str, scratch: Path) -> dict[str, Any]:
    bundle = scratch / "bundle"
    arguments = ("export", str(checkpoint), "--quant", quant, "--target", "laptop", "--no-verify", "-o", str(bundle))
    item = row("edgelm", quant, run(edgelm(*arguments)))
    item["file_bytes"] = (bundle / "model.gguf").stat().st_size
    shutil.rmtree(bundle)
    return item


def summarise(rows: list[dict[str, Any]], quants: list[str]) -> None:
    print("| quant | side | time s | peak RSS MB | written MB |\n|---|---|---|---|---|")
    for quant in quants:
        peer = {
            field: [median_of(rows, f"peer {step}", quant, field) for step in ("convert", "quantize")]
            for field in ("wall_s", "peak_rss_bytes", "file_bytes")
        }
        theirs = (sum(peer["wall_s"]), max(peer["peak_rss_bytes"]), sum(peer["file_bytes"]))
        ours = tuple(median_of(rows, "edgelm", quant, field) for field in ("wall_s", "peak_rss_bytes", "file_bytes"))
        for side, figures in (("converter + llama-quantize", theirs), ("edgelm", ours)):
            print(f"| {quant} | {side} | {figures[0]:.2f} | {figures[1] / 1e6:.0f} | {figures[2] / 1e6:.0f} |")
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        print(f"| {quant} | ratio | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers"))
    parser.add_argument("--quant", action="append", default=[], help="repeatable; default Q4_K_M and Q8_0")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    quants = arguments.quant or ["Q4_K_M", "Q8_0"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=".") as directory:
        for attempt in range(arguments.runs + 1):
            for quant in quants:
                taken = peer_export(arguments.checkpoint, quant, arguments.peers, Path(directory))
                taken.append(our_export(arguments.checkpoint, quant, Path(directory)))
                # The first round fills the page cache for both sides and is not counted.
                rows += taken if attempt else []
    summarise(rows, quants)
    print(f"raw rows: {save('export_side_by_side', rows)}")


if __name__ == "__main__":
    main()
