"""The passes of the unquantised model on a GPU beside a CPU: are figures and choices the same, and how much sooner?

    python benchmarks/gpu_reference.py --source demo:smollm2 --work DIR [--parts proof,moments,types] [--devices cuda]

Three parts, each on every device, the GPU first. ``proof``: one Q4_0 artefact against the reference; the reference
alone is timed and compared token by token (KL, largest difference of a logit), then the whole proof. ``moments``: what
ONNX rounding reads of calibration text. ``types``: sensitivity of every matrix, what each loses in each type, the types
chosen under three limits of size, and the proof of an export under the middle one. A fourth, ``writing``, is made when
it is named: text for calibration that the model writes. ``--seconds`` begins no further part. Every device has a cache
of its own below ``--work``, emptied first (``--again`` keeps it). Without a GPU it says so and ends; ``--devices cpu``
tries the script out. Raw rows are appended to ``results/gpu_reference.jsonl`` as they come.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import append, machine

from edgelm.errors import EdgelmError
from edgelm.progress import SILENT, Stage
from exporter import quality
from exporter.automatic import choose
from exporter.calibration import SELF, calibration_ids
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.damage import total
from exporter.device import DeviceChoice, Placement, resolve_device
from exporter.onnx_moments import MomentSource, spread_windows
from exporter.options import ExportOptions
from exporter.pipeline import Measured, export, measure_types, way_of
from exporter.quality import compare_logits, cut_windows
from exporter.reference import BATCH, open_reference
from exporter.texts import evaluation_text
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import prove_identity, read_tokenizer
from targets.host import default_threads
from targets.profile import load_profile

NAME = "gpu_reference"
# What docs/types.md promises: KL of the references and of proofs in nats, relative distances of moments and damages.
TOLERANCE = {"reference": 1e-6, "proof": 1e-4, "moments": 1e-4, "types": 0.01}
LIMITS = (0.2, 0.5, 0.8)  # of the way from the smallest to the largest point of the front


def judge(part: str, found: float) -> None:
    """Say whether a difference between the devices is within the tolerance."""
    note(part=part, difference=found, tolerance=TOLERANCE[part], met=bool(found <= TOLERANCE[part]))


def note(**row: Any) -> None:
    """A row on disk and on the screen, now."""
    append(NAME, row)
    print(
        ", ".join(f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )


class Stopwatch:
    """A progress that keeps the seconds of stages, added up by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        started = time.perf_counter()
        with SILENT.stage(name, total, unit=unit) as stage:
            yield stage
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class Bench:
    """What the parts share."""

    def __init__(self, source: str, work: Path, devices: Sequence[DeviceChoice]) -> None:
        self.source, self.work, self.devices = source, work, devices
        self.checkpoint: Checkpoint = open_checkpoint(open_source(source))
        self.words = read_tokenizer(self.checkpoint)

    def on_each(self, part: str, work: Callable[[DeviceChoice, Stopwatch], Any]) -> dict[str, Any]:
        """Results by device, each with a row of its time."""
        found = {}
        for device in self.devices:
            os.environ["EDGELM_CACHE"] = str(self.work / f"cache-{device}")
            watch, started = Stopwatch(), time.perf_counter()
            found[device] = work(device, watch)
            stages = {name: round(seconds, 3) for name, seconds in watch.seconds.items()}
            note(part=part, device=device, wall_s=time.perf_counter() - started, stages=stages)
        return found

    # --- parts

    def writing(self) -> None:
        """Calibration text that the model writes itself; sampled, so texts part where rounding decides a token."""
        self.on_each(
            "writing",
            lambda device, watch: calibration_ids(
                self.checkpoint, self.words, Path(SELF), quality.WINDOW, watch, device=device
            ),
        )

    def proof(self) -> None:
        """The reference alone, then the whole proof of one artefact."""
        ids = open_tokenizer(self.words.tokenizer_json, "tokenizer.json").encode(
            evaluation_text().content, add_special_tokens=False
        ).ids  # fmt: skip
        windows = cut_windows(ids, quality.MIN_TOKENS, length=quality.WINDOW)
        logits = self.on_each("reference", lambda device, watch: self._logits(windows, device, watch))
        if len(logits) == 2:
            one, other = logits["cpu"], logits["cuda"]
            targets = np.zeros(len(one), dtype=np.int64)
            compared = compare_logits(one, other, targets)
            far = max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
            same = float(compared.agrees.mean())
            note(
                part="reference",
                kl_mean=float(compared.kl.mean()),
                kl_max=float(compared.kl.max()),
                logit_max=far,
                same=same,
            )
            judge("reference", float(compared.kl.mean()))
        del logits
        path = self.work / "q4_0"
        export(ExportOptions(self.source, quant="Q4_0", format="gguf", verify=False), path, force=True)
        artifact = path / "model.gguf"
        identity = prove_identity(self.words, artifact)
        found = self.on_each(
            "proof",
            lambda device, watch: quality.measure(
                artifact, self.checkpoint, identity, None, watch, placement=Placement(device)
            ),
        )
        for device, measured in found.items():
            figures = measured.model_dump(
                include={"reference", "kl_mean", "kl_mean_interval", "kl_p99", "ppl_reference"}
            )
            note(part="proof", device=device, **figures)
        if len(found) == 2:
            judge("proof", abs(found["cpu"].kl_mean - found["cuda"].kl_mean))

    def _logits(self, windows: Sequence[quality.Window], device: DeviceChoice, watch: Stopwatch) -> Any:
        parts: list[Any] = []
        with open_reference(self.checkpoint, quality.WINDOW, "transformers", watch, device=device) as model:
            with watch.stage("first tokens"):  # a GPU's libraries are loaded here
                model.append(windows[0].tokens[:BATCH])
            with watch.stage("reading"):
                for window in windows:
                    model.reset()
                    pieces = (window.tokens[start : start + BATCH] for start in range(0, len(window.tokens), BATCH))
                    parts += [np.array(model.append(piece)) for piece in pieces]
        return np.concatenate(parts)

    def moments(self) -> None:
        """Second moments of all matrices' inputs."""
        from exporter.architectures import describe

        description = describe(self.checkpoint, "onnx")
        wanted = [item for item in description.tensors if len(item.shape) == 2 and "embd" not in item.name]
        ids, name, _ = calibration_ids(self.checkpoint, self.words, None, quality.WINDOW, SILENT)
        text = spread_windows(ids, name, quality.WINDOW)

        def read(device: DeviceChoice, watch: Stopwatch) -> dict[str, np.ndarray[Any, Any]]:
            source = MomentSource(self.checkpoint, text, watch, device)
            # The diagonals alone are kept: all moments of a model are many times its weights.
            return {
                key: np.diagonal(value).copy() for _, group in source.by_group(wanted) for key, value in group.items()
            }

        found = self.on_each("moments", read)
        if len(found) == 2:
            judge("moments", _farthest(found["cpu"], found["cuda"]))

    def types(self) -> None:
        """Sensitivity, damages, choices under limits, and the export under the middle one."""
        profile = load_profile("host")
        base = ExportOptions(self.source, quant="auto", format="gguf")
        way = way_of(base, self.checkpoint)
        found: dict[str, Measured] = self.on_each(
            "types", lambda device, watch: measure_types(replace(base, device=device), self.checkpoint, watch, way)
        )
        for device, measured in found.items():
            note(part="types", device=device, knots=measured.analysis.knots)
        front = next(iter(found.values())).points(base, profile)
        least, most = front[0].plan.artifact_bytes, front[-1].plan.artifact_bytes
        if self.checkpoint.source.kind == "gguf":  # a quantised source that keeps the limit would be kept as it is
            most = min(most, int(0.98 * sum(path.stat().st_size for path in self.checkpoint.files)))
        limits = [round(least + share * (most - least)) for share in LIMITS]
        if len(found) == 2:
            self._compare_types(found, base, profile, limits)
        middle = limits[len(limits) // 2]

        def made(device: DeviceChoice, watch: Stopwatch) -> Any:
            options = replace(base, device=device, max_artifact_bytes=middle)
            return export(options, self.work / f"auto-{device}", force=True, progress=watch).manifest

        for device, manifest in self.on_each("export", made).items():
            measured = manifest.quality
            note(part="export", device=device, artifact_bytes=manifest.artifact_bytes, types=manifest.plan.type_counts,
                 kl_mean=measured.kl_mean, kl_interval=measured.kl_mean_interval)  # fmt: skip

    def _compare_types(
        self, found: Mapping[str, Measured], base: ExportOptions, profile: Any, limits: Sequence[int]
    ) -> None:
        one, other = found["cpu"].analysis, found["cuda"].analysis
        ratios = [
            abs(other.damages[name][kind] / lost - 1)
            for name, row in one.damages.items()
            for kind, lost in row.items()
            if lost > 0
        ]
        note(part="types", damage_relative_max=max(ratios), damage_relative_median=float(np.median(ratios)))
        judge("types", float(np.median(ratios)))
        for limit in limits:
            options = replace(base, max_artifact_bytes=limit)
            chosen = {
                device: {
                    item.name: item.type
                    for item in choose(measured.points(options, profile), options, profile).plan.tensors
                }
                for device, measured in found.items()
            }
            other_types = sum(kind != chosen["cuda"][name] for name, kind in chosen["cpu"].items())
            lost = {device: total(one.damages, types) for device, types in chosen.items()}
            note(part="types", limit_bytes=limit, tensors=len(chosen["cpu"]), other_types=other_types,
                 damage_cpu=lost["cpu"], damage_cuda=lost["cuda"])  # fmt: skip


def _farthest(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest relative distance of two vectors of one name, by their norms."""
    return max(float(np.linalg.norm(other[name] - values) / np.linalg.norm(values)) for name, values in one.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="demo:smollm2")
    parser.add_argument("--work", type=Path, default=Path("gpu-reference"))
    parser.add_argument("--devices", default="cuda,cpu", help="cuda alone leaves the comparison out")
    parser.add_argument("--parts", default="proof,moments,types")
    parser.add_argument("--again", action="store_true", help="keep the caches of an earlier run: choices without times")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no part after so long")
    arguments = parser.parse_args()
    devices: list[DeviceChoice] = arguments.devices.split(",")
    try:
        reasons = {device: resolve_device(device).reason for device in devices}
    except EdgelmError as error:
        raise SystemExit(f"{error.message}: this compares a GPU with a CPU") from None
    import torch
    import transformers

    arguments.work.mkdir(parents=True, exist_ok=True)
    for device in () if arguments.again else devices:
        shutil.rmtree(arguments.work / f"cache-{device}", ignore_errors=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    note(machine=machine(), devices=reasons, threads=default_threads()[1].value, source=arguments.source, **versions)
    bench, started = Bench(arguments.source, arguments.work, devices), time.perf_counter()
    parts = {"proof": bench.proof, "moments": bench.moments, "types": bench.types, "writing": bench.writing}
    failed = []
    for part in arguments.parts.split(","):
        if time.perf_counter() - started > arguments.seconds:
            note(part=part, left_out=f"after {arguments.seconds:g} s")
            continue
        try:
            parts[part]()
        except (EdgelmError, RuntimeError) as error:  # the other parts may do
            traceback.print_exception(error)
            note(part=part, failed=str(error))
            failed.append(part)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
