"""What an export writes into ``manifest.json`` once its artefact is there and proven.

Knows neither how a plan came about nor how it was carried out.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from edgelm import bundle as bundles
from edgelm.bundle import (
    EmbeddingQuality,
    EncoderRecord,
    ExportPlan,
    Manifest,
    Quality,
    SourceRecord,
    TaskQuality,
    TaskRecord,
)
from edgelm.progress import Progress
from exporter.aside import Aside
from exporter.checkpoint import Checkpoint
from exporter.gguf import write_errors

ARTIFACTS = {"gguf": "model.gguf", "onnx": "model.onnx"}
_TOOLS = ("edgelm", "llama-cpp-python", "gguf", "numpy", "tokenizers")
_FORMAT_TOOLS: dict[str, tuple[str, ...]] = {"gguf": (), "onnx": ("onnx", "onnxruntime")}
_OPTIMUM_TOOLS = ("optimum", "optimum-onnx", "torch", "transformers")


@dataclass(frozen=True)
class Proven:
    """What the manifest says of an artefact beside its files. ``measured`` is None when the proof was left out."""

    plan: ExportPlan
    encoder: EncoderRecord | None
    measured: Quality | EmbeddingQuality | TaskQuality | None
    task: TaskRecord | None = None


def write_manifest(staging: Path, checkpoint: Checkpoint, aside: Aside, proven: Proven, progress: Progress) -> None:
    """Hash what is not hashed yet and write the manifest. Raises ``BundleError``."""
    plan, measured = proven.plan, proven.measured
    source = SourceRecord(
        kind=checkpoint.source.kind,
        location=checkpoint.source.location,
        revision=checkpoint.source.revision,
        architecture=checkpoint.architecture,
        parameters=plan.parameters,
        files=aside.source_hashes(progress),
    )
    drawn_by = _OPTIMUM_TOOLS if plan.format == "onnx" and (proven.encoder or proven.task) else ()
    manifest = Manifest(
        name=_name(checkpoint, plan),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        format=plan.format,
        artifact=ARTIFACTS[plan.format],
        source=source,
        plan=plan,
        quality=measured if isinstance(measured, Quality) else None,
        files=aside.file_records(sorted(path for path in staging.iterdir() if path.is_file()), progress),
        tool_versions={tool: version(tool) for tool in (*_TOOLS, *_FORMAT_TOOLS[plan.format], *drawn_by)},
        encoder=proven.encoder,
        embedding_quality=measured if isinstance(measured, EmbeddingQuality) else None,
        task=proven.task,
        task_quality=measured if isinstance(measured, TaskQuality) else None,
    )
    with write_errors(staging / bundles.MANIFEST_NAME):
        bundles.write_manifest(staging, manifest)


def _name(checkpoint: Checkpoint, plan: ExportPlan) -> str:
    model = checkpoint.source.location.rsplit("/", 1)[-1].removeprefix("demo:").removesuffix(".gguf")
    return f"{model}-{plan.quant}"
