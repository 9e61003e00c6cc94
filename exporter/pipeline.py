"""The whole way from a source to a proven bundle; the body of ``export`` is the list of its stages.

Each stage is a function of another module. Nothing is visible under the destination until everything is proven.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgelm import bundle as bundles
from edgelm.bundle import Bundle, ExportPlan, FileRecord, Manifest, Quality, SourceRecord, TokenIdentity
from edgelm.errors import CheckpointError, DoesNotFitError, ProofError
from edgelm.progress import SILENT, Progress
from exporter import quality, tokenizer
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf import check_room, write_errors, write_gguf
from exporter.options import ExportOptions, check_options
from exporter.plan import file_type, resolve
from exporter.preflight import check_checkpoint
from exporter.tokenizer import SourceTokenizer
from targets.profile import load_profile

ARTIFACTS = {"gguf": "model.gguf", "onnx": "model.onnx"}
QUANTIZATION_VERSION = 2  # of ggml's block formats
_TOOLS = ("edgelm", "llama-cpp-python", "gguf", "numpy", "tokenizers")
_FORMAT_TOOLS: dict[str, tuple[str, ...]] = {"gguf": (), "onnx": ("onnx", "onnxruntime")}


@dataclass(frozen=True)
class Prepared:
    """What is known before the first byte is written."""

    checkpoint: Checkpoint
    plan: ExportPlan


def prepare(options: ExportOptions) -> Prepared:
    """Read the source's headers and resolve the plan: what ``--dry-run`` shows. Writes nothing.

    Raises ``UsageError``, ``CheckpointError``, ``ProfileError`` or ``DoesNotFitError``.
    """
    check_options(options)
    profile = load_profile(options.target)
    checkpoint = open_checkpoint(open_source(options.source))
    check_checkpoint(checkpoint)
    return Prepared(checkpoint, resolve(options, checkpoint, profile))


def export(options: ExportOptions, destination: Path, *, force: bool = False, progress: Progress = SILENT) -> Bundle:
    """Make a proven bundle at ``destination``.

    Raises what ``prepare`` raises, ``BundleError`` when it cannot be written, and ``ProofError`` when tokens differ or
    the quality limit is missed. Whatever is raised, nothing new is left behind and an earlier bundle is untouched.
    """
    bundles.check_destination(destination, force=force)
    prepared = prepare(options)
    checkpoint, plan = prepared.checkpoint, prepared.plan
    description = describe(checkpoint)
    check_room(destination.parent, plan.artifact_bytes)
    words = _load_words(checkpoint, plan, progress)
    _check_vocabulary(checkpoint, description, words)
    with bundles.new_bundle(destination, force=force) as staging:
        artifact = _write_artifact(staging, checkpoint, description, plan, words, progress)
        _check_size(options, artifact)
        _write_texts(staging, words)
        identity = _prove_tokens(words, artifact)
        measured = _measure(options, checkpoint, artifact, identity, progress)
        _write_manifest(staging, _name(checkpoint, plan), checkpoint, plan, measured, progress)
    return bundles.open_bundle(destination, check_hashes=False)


def _load_words(checkpoint: Checkpoint, plan: ExportPlan, progress: Progress) -> SourceTokenizer:
    """An ONNX bundle needs no GGUF form of the tokenizer, unless the source is one and has to be translated."""
    if plan.format == "onnx" and checkpoint.source.kind == "huggingface":
        return tokenizer.read_tokenizer(checkpoint)
    return tokenizer.load_tokenizer(checkpoint, progress)


def _write_artifact(
    staging: Path,
    checkpoint: Checkpoint,
    description: ModelDescription,
    plan: ExportPlan,
    words: SourceTokenizer,
    progress: Progress,
) -> Path:
    if plan.format == "onnx":
        from exporter.onnx_bundle import write_artifact  # needs the onnx package, which the GGUF way does without

        return write_artifact(staging, checkpoint, description, plan, words, progress)
    artifact = staging / ARTIFACTS[plan.format]
    metadata = _metadata(plan, description, words)
    write_gguf(artifact, checkpoint, description.tensors, plan.tensors, metadata, progress=progress)
    return artifact


def _check_vocabulary(checkpoint: Checkpoint, description: ModelDescription, words: SourceTokenizer) -> None:
    rows, tokens = description.dimensions.vocabulary, len(words.gguf_metadata["tokenizer.ggml.tokens"])
    if tokens != rows:
        raise CheckpointError(
            f"{checkpoint.source.location}: the tokenizer has {tokens} tokens, the embedding {rows} rows",
            hint="are tokenizer and weights of the same model?",
        )


def _metadata(plan: ExportPlan, description: ModelDescription, words: SourceTokenizer) -> dict[str, Any]:
    kind = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": file_type(plan)}
    return {**description.metadata, **kind, **words.gguf_metadata}


def _check_size(options: ExportOptions, artifact: Path) -> None:
    """The plan estimates the vocabulary's share; the limit is held to the file itself."""
    files = [artifact, *artifact.parent.glob(f"{artifact.name}.*")]
    size_bytes, limit = sum(file.stat().st_size for file in files), options.max_artifact_bytes
    if limit is not None and size_bytes > limit:
        raise DoesNotFitError(f"the artefact has {size_bytes} bytes, --max-bytes is {limit}")


def _write_texts(staging: Path, words: SourceTokenizer) -> None:
    texts = {
        "tokenizer.json": words.tokenizer_json,
        "generation_config.json": json.dumps(words.generation_config, indent=2, ensure_ascii=False) + "\n",
    }
    if words.chat_template is not None:
        texts["chat_template.jinja"] = words.chat_template
    for name, text in texts.items():
        with write_errors(staging / name), (staging / name).open("wb") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())


def _prove_tokens(words: SourceTokenizer, artifact: Path) -> TokenIdentity:
    if artifact.suffix == ".onnx":
        identity = tokenizer.compare_files(words.tokenizer_json, artifact.parent / "tokenizer.json")
    else:
        identity = tokenizer.prove_identity(words, artifact)
    if not identity.identical:
        raise ProofError(
            f"the artefact's tokenizer gives other ids than the source's: {identity.first_difference}",
            hint="no bundle was written: wrong tokens would silently spoil every answer",
        )
    return identity


def _measure(
    options: ExportOptions, checkpoint: Checkpoint, artifact: Path, identity: TokenIdentity, progress: Progress
) -> Quality | None:
    if not options.verify:
        return None
    measured = quality.measure(artifact, checkpoint, identity, options.evaluation, progress)
    if options.max_kl is not None and not measured.kl_mean <= options.max_kl:
        raise ProofError(
            f"mean KL is {measured.kl_mean:.4f} nats per token, --max-kl is {options.max_kl:g}",
            hint="choose a --quant of more bits, or keep single tensors better with --type",
        )
    return measured


def _name(checkpoint: Checkpoint, plan: ExportPlan) -> str:
    model = checkpoint.source.location.rsplit("/", 1)[-1].removeprefix("demo:").removesuffix(".gguf")
    return f"{model}-{plan.quant}"


def _write_manifest(
    staging: Path,
    name: str,
    checkpoint: Checkpoint,
    plan: ExportPlan,
    measured: Quality | None,
    progress: Progress,
) -> None:
    written = sorted(path for path in staging.iterdir() if path.is_file())
    records = _hashed([*checkpoint.files, *written], progress)
    source = SourceRecord(
        kind=checkpoint.source.kind,
        location=checkpoint.source.location,
        revision=checkpoint.source.revision,
        architecture=checkpoint.architecture,
        parameters=plan.parameters,
        files=tuple(records[: len(checkpoint.files)]),
    )
    manifest = Manifest(
        name=name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        format=plan.format,
        artifact=ARTIFACTS[plan.format],
        source=source,
        plan=plan,
        quality=measured,
        files=tuple(records[len(checkpoint.files) :]),
        tool_versions={tool: version(tool) for tool in (*_TOOLS, *_FORMAT_TOOLS[plan.format])},
    )
    with write_errors(staging / bundles.MANIFEST_NAME):
        bundles.write_manifest(staging, manifest)


def _hashed(paths: list[Path], progress: Progress) -> list[FileRecord]:
    records = []
    with progress.stage("hashing", len(paths), unit="files") as stage:
        for path in paths:
            records.append(bundles.file_record(path))
            stage.advance()
    return records
