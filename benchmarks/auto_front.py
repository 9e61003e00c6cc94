"""The front of ``--quant auto`` against llama-quantize's presets with importance matrix: size against KL, two texts.

    make peers
    python benchmarks/auto_front.py MODEL --work DIR --chat self
    python benchmarks/auto_front.py --plot docs/auto-front.svg

MODEL is a Hugging Face directory whose weights lie on no quantised grid. Presets are made by llama-quantize with an
importance matrix of llama-imatrix from 40 x 512 tokens of the calibration text; ours by the export itself: points
spread over the front, and one under the very size of each preset in ``--at``. Every artefact is measured by our proof
against transformers in float32, whose logits are kept in memory (100 MB per window of 512 tokens); those in ``--at``
and ours of their size by ``llama-perplexity --kl-divergence`` against BF16 as well. Rows are written as they come, and
what DIR holds is neither made nor measured again. Needs no quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, edgelm, run, save

from edgelm.progress import SILENT
from exporter import damage, pipeline, quality
from exporter.architectures import describe
from exporter.calibration import SELF, calibration_ids
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf import usable_cpus, write_gguf
from exporter.options import ExportOptions
from exporter.reference import BATCH, EngineModel, ScoringModel, open_reference
from exporter.texts import calibration_text, evaluation_text, read_text
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import load_tokenizer
from runtime.engine import EngineOptions, Logits
from runtime.engines import load_engine
from targets.profile import load_profile

PRESETS = ("Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")
AT = ("IQ4_XS", "Q4_0", "Q4_K_M", "Q6_K")
NAME = "auto_front"
NEAR_BYTES = 100_000  # below a limit on the size: what single changes of types leave unused


class Remembered:
    """The reference's logits of all windows, computed once."""

    def __init__(self, original: ScoringModel, windows: Sequence[quality.Window]) -> None:
        self.name, self.vocabulary = original.name, original.vocabulary
        self._held: list[Logits] = []
        for window in windows:
            original.reset()
            tokens = window.tokens[:-1]
            steps = (tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH))
            self._held.append(np.concatenate([original.append(step) for step in steps]))
        self._window, self._position = -1, 0

    def reset(self) -> None:
        """The next window."""
        self._window, self._position = (self._window + 1) % len(self._held), 0

    def append(self, tokens: Sequence[int]) -> Logits:
        self._position += len(tokens)
        return self._held[self._window][self._position - len(tokens) : self._position]


def windows_of(checkpoint: Checkpoint, chat: Path | None, tokens: int) -> dict[str, list[quality.Window]]:
    words = load_tokenizer(checkpoint, SILENT)
    encoder = open_tokenizer(words.tokenizer_json, "tokenizer.json")
    texts = {"documentation": evaluation_text()} | ({} if chat is None else {"chat": read_text(chat)})
    found = {}
    for name, text in texts.items():
        ids = encoder.encode(text.content, add_special_tokens=False).ids
        found[name] = quality.cut_windows(ids, tokens, length=quality.WINDOW, name=name)
    return found


def chat_text(checkpoint: Checkpoint, work: Path) -> Path:
    """Conversations of the model with itself (calibration never reads them by default), without special tokens, which
    llama-perplexity takes for text."""
    path = work / "chat.txt"
    if not path.exists():
        words = load_tokenizer(checkpoint, SILENT)
        ids, _, _ = calibration_ids(checkpoint, words, Path(SELF), quality.WINDOW, SILENT)
        encoder = open_tokenizer(words.tokenizer_json, "tokenizer.json")
        with made(path) as part:
            part.write_text(encoder.decode(ids, skip_special_tokens=True), encoding="utf-8")
    return path


def measured(path: Path, references: dict[str, tuple[ScoringModel, list[quality.Window]]]) -> dict[str, Any]:
    engine = load_engine(path, EngineOptions(context=quality.WINDOW, batch=BATCH, all_logits=True))
    row: dict[str, Any] = {"bytes": path.stat().st_size}
    try:
        for name, (reference, windows) in references.items():
            kl = quality.compare_models(reference, EngineModel(engine), windows, SILENT).kl
            row |= {f"kl_{name}": float(kl.mean()), f"tokens_{name}": len(kl)}
    finally:
        engine.close()
    return row


@contextmanager
def made(path: Path) -> Iterator[Path]:
    """Where to write a file that is there complete or not at all: a run may be killed, and the next one goes on."""
    part = path.with_name(f"part-{os.getpid()}-{path.name}")  # two runs may share a directory
    yield part
    part.replace(path)


def presets(arguments: argparse.Namespace, work: Path) -> list[tuple[dict[str, Any], Path]]:
    """Artefacts of llama-quantize, made where they are missing."""
    base, imatrix = work / "bf16", arguments.imatrix or work / "imatrix.gguf"
    if not base.exists():
        run(edgelm("export", str(arguments.model), "-o", str(base), "--quant", "BF16", "--no-verify"))
    if not imatrix.exists():
        (work / "calibration.txt").write_text(calibration_text().content, encoding="utf-8")
        with made(imatrix) as part:
            tool = [str(arguments.peers / "llama-imatrix"), "-m", str(base / "model.gguf"), "-o", str(part)]
            run([*tool, "-f", str(work / "calibration.txt"), "-c", "512", "--chunks", "40", "-t", "2"])
    found = []
    for name in arguments.presets:
        path = work / f"preset-{name}.gguf"
        if not path.exists():
            tool = [str(arguments.peers / "llama-quantize"), "--imatrix", str(imatrix), str(base / "model.gguf")]
            with made(path) as part:
                run([*tool, str(part), name, "2"])
        found.append(({"side": "llama-quantize --imatrix", "name": name}, path))
    return found


def own_points(arguments: argparse.Namespace, work: Path, sizes: Sequence[int]) -> list[tuple[dict[str, Any], Path]]:
    """Artefacts of the front and under the given sizes, made where they are missing: the same rounding and writing as
    an export's."""
    options = ExportOptions(str(arguments.model), quant="auto")
    checkpoint = open_checkpoint(open_source(options.source))
    found_types = pipeline.measure_types(options, checkpoint, SILENT, pipeline.way_of(options, checkpoint))
    profile = load_profile(options.target)
    front = found_types.points(options, profile)
    count = min(arguments.points, len(front))
    taken = [front[round(index * (len(front) - 1) / max(count - 1, 1))] for index in range(count)]
    for size_bytes in sizes:
        limited = replace(options, max_artifact_bytes=size_bytes)
        taken.append(found_types.choose(limited, profile))
    description, words = describe(checkpoint), load_tokenizer(checkpoint, SILENT)
    quantizers = None
    found = []
    for point in {point.plan.artifact_bytes: point for point in taken}.values():
        path = work / f"auto-{point.plan.artifact_bytes}-{found_types.analysis.key[:8]}.gguf"
        if not path.exists():
            quantizers = quantizers or found_types.analysis.rounding()
            metadata = {**description.metadata, **words.gguf_metadata}
            with made(path) as part:
                write_gguf(part, checkpoint, description.tensors, point.plan.tensors, metadata, quantizers=quantizers)
        lost = damage.total(found_types.analysis.damages, {item.name: item.type for item in point.plan.tensors})
        knots = list(found_types.analysis.knots)
        row = {"side": "edgelm auto", "name": f"{point.plan.artifact_bytes / 1e6:.1f} MB"}
        found.append(({**row, "kl_predicted": point.kl, "damage_sum": lost, "knots": knots}, path))
    return found


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(open_source(str(arguments.model)))
    if str(arguments.chat) == SELF:
        arguments.chat = chat_text(checkpoint, work)
    theirs = presets(arguments, work) if arguments.presets else []
    sizes = [path.stat().st_size for head, path in theirs if head["name"] in arguments.at]
    artefacts = theirs + own_points(arguments, work, sizes)
    artefacts.sort(key=lambda item: "kl_predicted" not in item[0] and item[0]["name"] not in arguments.at)
    texts = windows_of(checkpoint, arguments.chat, arguments.tokens)
    with open_reference(checkpoint, quality.WINDOW, "auto", SILENT) as original:
        references: dict[str, tuple[ScoringModel, list[quality.Window]]] = {
            name: (Remembered(original, windows), windows) for name, windows in texts.items()
        }
    held = work / "rows.json"
    known: dict[str, dict[str, Any]] = json.loads(held.read_text()) if held.exists() else {}
    for head, path in artefacts:
        if path.name not in known:
            known[path.name] = {**head, **measured(path, references), "reference": references["documentation"][0].name}
        row = known[path.name]
        if any(0 <= size - row["bytes"] <= NEAR_BYTES for size in sizes) and "perplexity_kl_documentation" not in row:
            row |= perplexity(arguments, path)
        print(json.dumps(row), file=sys.stderr, flush=True)
        held.write_text(json.dumps(known))
    rows = [known[path.name] for _, path in artefacts]
    save(NAME, rows)
    return rows


def perplexity(arguments: argparse.Namespace, path: Path) -> dict[str, float]:
    """KL of an artefact against BF16 by llama.cpp's own measurement, 12 x 512 tokens of each text, half of them
    counted."""
    texts = {"documentation": arguments.work / "evaluation.txt"}
    texts["documentation"].write_text(evaluation_text().content, encoding="utf-8")
    if arguments.chat is not None:
        texts["chat"] = arguments.chat
    found = {}
    for name, text in texts.items():
        logits, threads = arguments.work / f"logits-{name}", ["-t", str(usable_cpus())]
        tool = [str(arguments.peers / "llama-perplexity"), "-c", "512", *threads]
        if not logits.exists():
            base = arguments.work / "bf16" / "model.gguf"
            with made(logits) as part:
                run([*tool, "-m", str(base), "-f", str(text), "--chunks", "12", "--kl-divergence-base", str(part)])
        found[f"perplexity_kl_{name}"] = told_kl([*tool, "-m", str(path), "--kl-divergence-base", str(logits)])
    return found


def told_kl(command: Sequence[str]) -> float:
    """What llama-perplexity says. It now and then ends before its last lines are written: then once more."""
    for _ in range(6):
        match = re.search(r"Mean\s+KLD:\s+([\d.e+-]+)", run([*command, "--kl-divergence"]).stdout)
        if match is not None:
            return float(match[1])
    raise SystemExit(f"{' '.join(command)} told no mean KL divergence")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of this script, or of a table with the columns artefact, bytes, kl_documentation, kl_chat, kl_predicted."""
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if "machine" not in row]
    found = []
    with path.open(encoding="utf-8", newline="") as stream:
        for entry in csv.DictReader(stream):
            theirs = entry["artefact"].startswith("llama-quantize")
            if "fast" in entry["artefact"]:
                continue  # made under limits of speed: no points of this front
            side, name = entry["artefact"].rsplit(" ", 1) if theirs else ("edgelm auto", entry["artefact"])
            row: dict[str, Any] = {"side": side, "name": name, "bytes": int(entry["bytes"])}
            row |= {key: float(entry[key]) for key in ("kl_documentation", "kl_chat")}
            found.append(row if theirs else row | {"kl_predicted": float(entry["kl_predicted"])})
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Sizes, KL, and for our points how far prediction was off; then each preset against our front at its size."""
    texts = [name.removeprefix("kl_") for name in rows[0] if name.startswith("kl_") and name != "kl_predicted"]
    rows = [row for row in rows if "bytes" in row]
    print("| artefact | MB | " + " | ".join(f"KL {name}" for name in texts) + " | predicted | error |")
    print("|---" * (4 + len(texts)) + "|")
    errors = []
    for row in sorted(rows, key=lambda row: row["bytes"]):
        cells = [f"{row['side']} {row['name']}", f"{row['bytes'] / 1e6:.1f}"]
        cells += [f"{row[f'kl_{name}']:.5f}" for name in texts]
        if "kl_predicted" in row:
            errors.append(100 * (row["kl_predicted"] / row["kl_documentation"] - 1))
            cells += [f"{row['kl_predicted']:.5f}", f"{errors[-1]:+.0f} %"]
        else:
            cells += ["", ""]
        print("| " + " | ".join(cells) + " |")
    if errors:
        print(f"prediction: worst {max(map(abs, errors)):.0f} %, {sum(abs(error) <= 25 for error in errors)} of")
        print(f"{len(errors)} within 25 %")
    for name in texts:
        for row in rows:
            ours = at_size([item for item in rows if "kl_predicted" in item], row["bytes"], name)
            if "kl_predicted" not in row and ours is not None:
                told = f"{row['name']} ({row['bytes'] / 1e6:.1f} MB), {name}: ours / theirs"
                print(f"{told} {ours / row[f'kl_{name}']:.2f}{'  LOST' if ours >= row[f'kl_{name}'] else ''}")
    for row in rows:
        near = [item for item in rows if "kl_predicted" in item and 0 <= row["bytes"] - item["bytes"] <= NEAR_BYTES]
        if "kl_predicted" not in row and near:
            both = [f"{name} {near[-1][name] / row[name]:.3f}" for name in row if "kl_" in name and name in near[-1]]
            print(f"at the size of {row['name']} ({near[-1]['bytes']} / {row['bytes']} bytes): {', '.join(both)}")


def at_size(ours: Sequence[dict[str, Any]], size_bytes: int, text: str) -> float | None:
    """Our KL at a size: between two points of the front in the logarithm of KL; None beyond its ends."""
    points = sorted((row["bytes"], float(np.log(row[f"kl_{text}"]))) for row in ours)
    if not points or not points[0][0] <= size_bytes <= points[-1][0]:
        return None
    return float(np.exp(np.interp(size_bytes, [size for size, _ in points], [kl for _, kl in points])))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    texts = [name.removeprefix("kl_") for name in rows[0] if name.startswith("kl_") and name != "kl_predicted"]
    figure = Figure(figsize=(5.2 * len(texts), 4.4), layout="constrained")
    FigureCanvasSVG(figure)
    for index, text in enumerate(texts):
        axes = figure.add_subplot(1, len(texts), index + 1)
        ours = sorted((row for row in rows if "kl_predicted" in row), key=lambda row: row["bytes"])
        theirs = [row for row in rows if "kl_predicted" not in row]
        sizes = [row["bytes"] / 1e6 for row in ours]
        axes.plot(sizes, [row[f"kl_{text}"] for row in ours], "o-", color="#0b6e4f", label="edgelm --quant auto")
        if text == "documentation":
            predicted = [row["kl_predicted"] for row in ours]
            axes.plot(sizes, predicted, ":", color="#0b6e4f", alpha=0.7, label="predicted for it")
        places = [(row["bytes"] / 1e6, row[f"kl_{text}"]) for row in theirs]
        axes.plot(*zip(*places, strict=True), "s", color="#b3452c", label="llama-quantize --imatrix")
        for row, place in zip(theirs, places, strict=True):
            axes.annotate(row["name"], place, (4, 3), textcoords="offset points", fontsize=7)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("artefact, MB")
        axes.set_ylabel("mean KL, nats/token")
        axes.set_title(f"text: {text}", fontsize=10)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="left out: show the rows that are there")
    parser.add_argument("--peers", type=Path, default=Path(".cache/peers/build/bin"))
    parser.add_argument("--work", type=Path, default=Path("auto-front"))
    parser.add_argument("--imatrix", type=Path, help="importance matrix that is there already")
    parser.add_argument("--chat", type=Path, help="a second evaluation text; self: the model's own conversations")
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--at", nargs="*", default=AT, help="presets whose very size ours are made for as well")
    parser.add_argument("--tokens", type=int, default=quality.MIN_TOKENS, help="counted predictions per text")
    parser.add_argument("--plot", type=Path, help="draw the rows")
    parser.add_argument("--rows", type=Path, default=RESULTS / f"{NAME}.jsonl", help="rows to show, .jsonl or .csv")
    arguments = parser.parse_args()
    rows = measure_all(arguments) if arguments.model is not None else read_rows(arguments.rows)
    show(rows)
    if arguments.plot is not None:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
