"""The whole way from a source to a proven bundle; the body of ``export`` is the list of its stages.

Each stage is a function of another module. Nothing is visible under the destination until everything is proven.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgelm import bundle as bundles
from edgelm.bundle import Bundle, ExportPlan, FileRecord, Manifest, Quality, SourceRecord, TokenIdentity
from edgelm.errors import CheckpointError, DoesNotFitError, ProofError, UsageError
from edgelm.progress import SILENT, Progress
from exporter import automatic, cache, damage, quality, tokenizer
from exporter.analysis import Analysis, analyse
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription
from exporter.automatic import Point
from exporter.calibration import open_calibration
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf import check_room, write_errors, write_gguf
from exporter.options import ExportOptions, check_options
from exporter.plan import Candidate, candidates, choose, file_type, form_of, resolve, unchanged
from exporter.preflight import check_checkpoint
from exporter.reference import torch_obstacle
from exporter.tokenizer import SourceTokenizer
from targets.profile import TargetProfile, load_profile

ARTIFACTS = {"gguf": "model.gguf", "onnx": "model.onnx"}
_MOVES = 3  # along the front, when the proof misses the limit
# Families whose matrices are plain linear layers, in transformers as in GGUF.
_MEASURED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
QUANTIZATION_VERSION = 2  # of ggml's block formats
_TOOLS = ("edgelm", "llama-cpp-python", "gguf", "numpy", "tokenizers")
_FORMAT_TOOLS: dict[str, tuple[str, ...]] = {"gguf": (), "onnx": ("onnx", "onnxruntime")}


@dataclass(frozen=True)
class Measured:
    """The analysis of a checkpoint, and what follows from it for a target."""

    checkpoint: Checkpoint
    analysis: Analysis

    def points(self, options: ExportOptions, profile: TargetProfile) -> list[Point]:
        """The front on a target."""
        return automatic.points(options, self.checkpoint, describe(self.checkpoint), profile, self.analysis)

    def choose(self, options: ExportOptions, profile: TargetProfile) -> Point:
        """The best point under the limits. Raises ``DoesNotFitError``."""
        return automatic.choose(self.points(options, profile), options, profile)

    def corrected(self, factor: float) -> Measured:
        """The same with all predicted KL times ``factor``."""
        analysis = self.analysis
        changed = replace(analysis, knots=tuple((lost, kl * factor) for lost, kl in analysis.knots))
        return replace(self, analysis=changed)


def choices(
    options: ExportOptions, progress: Progress, *, measure: bool = True
) -> tuple[TargetProfile, list[Candidate], Candidate | None, DoesNotFitError | None]:
    """The target, what an export could become on it, and either the best of that or why there is none.

    Raises what ``prepare`` raises, apart from ``DoesNotFitError``.
    """
    check_options(options)
    profile = load_profile(options.target)
    checkpoint = open_checkpoint(open_source(options.source))
    found: list[Candidate] = []
    try:
        if measure and options.quant.lower() == "auto" and measuring_obstacle(options, checkpoint) is None:
            points = measure_types(options, checkpoint, progress).points(options, profile)
            found = [Candidate(point.plan, point.eligible, point.reason) for point in points]
            best = automatic.choose(points, options, profile)
            return profile, found, Candidate(best.plan, best.eligible, best.reason), None
        found = candidates(options, checkpoint, profile)
        return profile, found, choose(found, profile), None
    except DoesNotFitError as error:
        return profile, found, None, error


def measuring_obstacle(options: ExportOptions, checkpoint: Checkpoint) -> str | None:
    """Why types cannot be chosen by measured damage here, None when they can."""
    if options.format == "onnx":
        return "types are measured for GGUF only"
    if checkpoint.architecture not in _MEASURED_FAMILIES:
        return f"types are not measured for {checkpoint.architecture}"
    if any(item.split or item.transposed or item.scale != 1.0 for item in describe(checkpoint).tensors):
        return "the checkpoint stores matrices in another arrangement"
    return torch_obstacle(checkpoint)


def measure_types(options: ExportOptions, checkpoint: Checkpoint, progress: Progress) -> Measured:
    """Measure what every tensor loses in every type, or read it from the cache.

    Raises ``UsageError`` for an unusable calibration text, ``CheckpointError`` and ``EngineError``.
    """
    description = describe(checkpoint)
    words = tokenizer.load_tokenizer(checkpoint, progress)
    _check_vocabulary(checkpoint, description, words)
    context = description.dimensions.context_trained
    text = open_calibration(checkpoint, words, options.calibration, context, progress)
    hashes = tuple(record.sha256 for record in _hashed(list(checkpoint.files), progress))
    return Measured(checkpoint, analyse(checkpoint, description, words, text, hashes, progress))


@dataclass(frozen=True)
class Prepared:
    """What is known before the first byte is written."""

    checkpoint: Checkpoint
    plan: ExportPlan
    measured: Measured | None = None
    calibration: Path | None = None


def prepare(options: ExportOptions, progress: Progress = SILENT) -> Prepared:
    """Read the source's headers and resolve the plan: what ``--dry-run`` shows. Writes nothing but the cache.

    ``auto`` keeps a quantised source that fits as it is. Else it measures what each tensor loses in each type when
    torch and transformers are installed, and chooses among the usual mixes when not.

    Raises ``UsageError``, ``CheckpointError``, ``ProfileError`` or ``DoesNotFitError``.
    """
    check_options(options)
    profile = load_profile(options.target)
    checkpoint = open_checkpoint(open_source(options.source))
    check_checkpoint(checkpoint, form_of(options))
    if options.quant.lower() != "auto":
        return Prepared(checkpoint, resolve(options, checkpoint, profile), calibration=options.calibration)
    kept = unchanged(options, checkpoint, profile) if options.calibration is None else None
    if kept is not None:
        return Prepared(checkpoint, kept)
    obstacle = measuring_obstacle(options, checkpoint)
    if obstacle is None:
        measured = measure_types(options, checkpoint, progress)
        return Prepared(checkpoint, measured.choose(options, profile).plan, measured)
    if options.calibration is not None:
        raise UsageError(f"--calibration has no use here: {obstacle}", hint="leave it out")
    plan = resolve(options, checkpoint, profile)
    note = f"types were not measured: {obstacle}"
    return Prepared(checkpoint, plan.model_copy(update={"notes": (*plan.notes, note)}))


def export(options: ExportOptions, destination: Path, *, force: bool = False, progress: Progress = SILENT) -> Bundle:
    """Make a proven bundle at ``destination``.

    Raises what ``prepare`` raises, ``BundleError`` when it cannot be written, and ``ProofError`` when tokens differ or
    the quality limit is missed. Whatever is raised, nothing new is left behind and an earlier bundle is untouched.
    """
    bundles.check_destination(destination, force=force)
    prepared = prepare(options, progress)
    checkpoint, plan = prepared.checkpoint, prepared.plan
    description = describe(checkpoint, plan.format)
    check_room(destination.parent, plan.artifact_bytes)
    words = _load_words(checkpoint, plan, progress)
    _check_vocabulary(checkpoint, description, words)
    with bundles.new_bundle(destination, force=force) as staging:
        artifact = _write_artifact(staging, prepared, description, words, progress)
        _check_size(options, artifact)
        _write_texts(staging, words)
        identity = _prove_tokens(words, artifact)
        measured = _measure(options, checkpoint, artifact, identity, progress)
        if prepared.measured is not None and measured is not None:
            plan, measured = _along_the_front(options, prepared, artifact, measured, progress)
        _check_quality(options, measured)
        _write_manifest(staging, _name(checkpoint, plan), checkpoint, plan, measured, progress)
    return bundles.open_bundle(destination, check_hashes=False)


def _load_words(checkpoint: Checkpoint, plan: ExportPlan, progress: Progress) -> SourceTokenizer:
    """An ONNX bundle needs no GGUF form of the tokenizer, unless the source is one and has to be translated."""
    if plan.format == "onnx" and checkpoint.source.kind == "huggingface":
        return tokenizer.read_tokenizer(checkpoint)
    return tokenizer.load_tokenizer(checkpoint, progress)


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


def hash_of_metadata(metadata: Mapping[str, Any]) -> str:
    """SHA-256 of metadata; arrays count as lists."""
    text = json.dumps(metadata, sort_keys=True, default=lambda value: value.tolist())
    return hashlib.sha256(text.encode()).hexdigest()


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


def _write_artifact(
    staging: Path, prepared: Prepared, description: ModelDescription, words: SourceTokenizer, progress: Progress
) -> Path:
    """Write the planned tensors; types that were measured are rounded as they were then, and kept in the cache."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    if plan.format == "onnx":
        from exporter.onnx_bundle import write_artifact  # needs the onnx package, which the GGUF way does without

        return write_artifact(staging, checkpoint, description, plan, words, prepared.calibration, progress)
    artifact = staging / ARTIFACTS[plan.format]
    metadata = _metadata(plan, description, words)
    if prepared.measured is None:
        write_gguf(artifact, checkpoint, description.tensors, plan.tensors, metadata, progress=progress)
        return artifact
    analysis = prepared.measured.analysis
    types = [(item.name, item.type) for item in plan.tensors]
    key = cache.key_of("artifact", analysis.key, types, hash_of_metadata(metadata))
    held = cache.find(key)
    if held is not None and (held / artifact.name).is_file():
        with write_errors(artifact):
            shutil.copyfile(held / artifact.name, artifact)
        return artifact
    with progress.stage("preparing rounding", 1) as stage:
        quantizers = damage.quantizers(analysis.statistics)
        stage.advance()
    write_gguf(
        artifact, checkpoint, description.tensors, plan.tensors, metadata, progress=progress, quantizers=quantizers
    )
    with cache.new_entry(key) as directory:
        if directory is not None:
            shutil.copyfile(artifact, directory / artifact.name)
    return artifact


def _measure(
    options: ExportOptions, checkpoint: Checkpoint, artifact: Path, identity: TokenIdentity, progress: Progress
) -> Quality | None:
    if not options.verify:
        return None
    return quality.measure(artifact, checkpoint, identity, options.evaluation, progress)


def _check_quality(options: ExportOptions, measured: Quality | None) -> None:
    if options.max_kl is not None and measured is not None and not measured.kl_mean <= options.max_kl:
        raise ProofError(
            f"mean KL is {measured.kl_mean:.4f} nats per token, --max-kl is {options.max_kl:g}",
            hint="choose a --quant of more bits, or keep single tensors better with --type",
        )


def _along_the_front(
    options: ExportOptions, prepared: Prepared, artifact: Path, quality_found: Quality, progress: Progress
) -> tuple[ExportPlan, Quality]:
    """While the proof misses the KL limit, correct the prediction by what was measured and take a better point.

    The last attempt's plan and quality; whether it is good enough is for the caller to say.
    """
    assert prepared.measured is not None
    checkpoint, plan, types = prepared.checkpoint, prepared.plan, prepared.measured
    description = describe(checkpoint)
    for _ in range(_MOVES):
        if options.max_kl is None or quality_found.kl_mean <= options.max_kl or plan.predicted_kl is None:
            break
        told = f"{plan.artifact_bytes} bytes were expected to have KL {plan.predicted_kl:.4f}, measured were "
        told += f"{quality_found.kl_mean:.4f}: moved along the front"
        types = types.corrected(quality_found.kl_mean / plan.predicted_kl)
        chosen = types.choose(options, load_profile(options.target)).plan
        if chosen.tensors == plan.tensors:
            break
        plan = chosen.model_copy(update={"notes": (*chosen.notes, told)})
        words = tokenizer.load_tokenizer(checkpoint, progress)
        _write_artifact(artifact.parent, Prepared(checkpoint, plan, types), description, words, progress)
        _check_size(options, artifact)
        quality_found = quality.measure(
            artifact, checkpoint, quality_found.token_identity, options.evaluation, progress
        )
    worst = automatic.worst_tensors(plan, types.analysis)
    return plan, quality_found.model_copy(update={"worst_tensors": worst})


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
