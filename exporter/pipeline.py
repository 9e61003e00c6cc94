"""The whole way from a source to a proven bundle; the body of ``export`` is the list of its stages.

Each stage is a function of another module. Nothing is visible under the destination until everything is proven.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgelm import bundle as bundles
from edgelm.bundle import (
    Bundle,
    Choice,
    EmbeddingQuality,
    ExportPlan,
    FileRecord,
    Quality,
    TaskKind,
    TensorPlan,
    TokenIdentity,
)
from edgelm.collector import paused_collector
from edgelm.errors import CheckpointError, DoesNotFitError, EngineError, ProofError, UsageError
from edgelm.progress import SILENT, Progress
from exporter import automatic, cache, damage, embedding_quality, optimum_tasks, quality, task_quality, tokenizer
from exporter.analysis import Analysis, analyse
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription
from exporter.aside import Aside, hashed_files
from exporter.automatic import Point
from exporter.calibration import Calibration, open_calibration
from exporter.chat_proof import prove_chat
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.device import DeviceChoice, Placement
from exporter.format_choice import Contest, contest, other_format, settle_format
from exporter.format_contest import hold
from exporter.gguf import RowQuantizer, check_room, write_errors, write_head, write_tensors
from exporter.importance import importance, importance_of_file
from exporter.manifest import ARTIFACTS, Proven, write_manifest
from exporter.measuring_way import measuring_way
from exporter.options import ExportOptions, check_options
from exporter.packages import require
from exporter.plan import Candidate, candidates, choose, file_type, form_of, paced, resolve, rounds, unchanged
from exporter.preflight import check_checkpoint
from exporter.resume import Writer, hash_of_metadata, key_of_artifact, write_in_parts
from exporter.sensitivity import TensorStatistics
from exporter.texts import evaluation_text
from exporter.tokenizer import SourceTokenizer
from targets.host import cpu_name, instruction_set
from targets.profile import TargetProfile, load_profile

_MOVES = 3  # along the front, when the proof misses the limit
QUANTIZATION_VERSION = 2  # of ggml's block formats
_QUALITY = "quality.json"


@dataclass(frozen=True)
class Measured:
    """The analysis of a checkpoint, and what follows from it for a target."""

    checkpoint: Checkpoint
    analysis: Analysis
    hashes: tuple[FileRecord, ...]

    def points(self, options: ExportOptions, profile: TargetProfile) -> list[Point]:
        """The front on a target."""
        return automatic.points(options, self.checkpoint, describe(self.checkpoint), profile, self.analysis)

    def choose(self, options: ExportOptions, profile: TargetProfile) -> Point:
        """The best point under the limits. Raises ``DoesNotFitError``."""
        options = paced(options, self.checkpoint, profile)
        return self.best(self.points(options, profile), options, profile)

    def best(self, points: Sequence[Point], options: ExportOptions, profile: TargetProfile) -> Point:
        """The best of some points, its plan telling how types were measured. Raises ``DoesNotFitError``."""
        point = automatic.choose(points, options, profile)
        note = self.analysis.note
        return replace(point, plan=_with_note(point.plan, note)) if note else point

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
    checkpoint = open_checkpoint(open_source(options.source, progress, headers_only=not measure))
    options, why = settle_format(options, checkpoint)
    if optimum_tasks.task_of(checkpoint, options) is not None:
        return profile, *optimum_tasks.choices(options, checkpoint, profile)
    check_checkpoint(checkpoint, form_of(options))
    options = paced(options, checkpoint, profile)
    found: list[Candidate] = []
    try:
        automatic_types = measure and options.quant.lower() == "auto"
        if automatic_types and (way := way_of(options, checkpoint)).value != "none":
            types = measure_types(options, checkpoint, progress, way)
            points = types.points(options, profile)
            found = [Candidate(point.plan, point.eligible, point.reason) for point in points]
            best = types.best(points, options, profile)
            chosen = Candidate(best.plan, best.eligible, best.reason)
        else:
            found = candidates(options, checkpoint, profile)
            chosen = choose(found, profile)
        if why is not None:
            chosen = replace(chosen, plan=_with_note(chosen.plan, why), reason=f"{why}; {chosen.reason}")
        chosen = replace(chosen, plan=_with_format_told(chosen.plan, contest(options, checkpoint, profile)))
    except DoesNotFitError as error:
        return profile, [*found, *other_format(options, checkpoint, profile)], None, error
    return profile, [*found, *other_format(options, checkpoint, profile)], chosen, None


def way_of(options: ExportOptions, checkpoint: Checkpoint) -> Choice:
    """How types can be chosen by measured damage here, ``none`` when they cannot, and why."""
    if options.format == "onnx":
        return Choice(value="none", reason="types are measured for GGUF only")
    if describe(checkpoint).encoder is not None:
        return Choice(value="none", reason="types are measured for models that generate")
    return measuring_way(checkpoint)


def measure_types(options: ExportOptions, checkpoint: Checkpoint, progress: Progress, way: Choice) -> Measured:
    """Measure what every tensor loses in every type, or read it from the cache. ``way`` is one that is not ``none``.

    Raises ``UsageError`` for an unusable calibration text, ``CheckpointError``, ``DoesNotFitError``, ``EngineError``.
    """
    words = tokenizer.load_tokenizer(checkpoint, progress)
    text, hashes = _calibration(options, checkpoint, progress)
    key = tuple(record.sha256 for record in hashes)
    found = analyse(checkpoint, words, text, key, progress, way=way, device=options.device)
    return Measured(checkpoint, found, hashes)


def _calibration(
    options: ExportOptions, checkpoint: Checkpoint, progress: Progress
) -> tuple[Calibration, tuple[FileRecord, ...]]:
    """The calibration text in tokens, and records of the checkpoint's files."""
    description, words = describe(checkpoint), tokenizer.read_tokenizer(checkpoint)
    _check_vocabulary(checkpoint, description, words)
    text = open_calibration(
        checkpoint, words, options.calibration, progress, evaluation=options.evaluation, device=options.device
    )
    return text, hashed_files(checkpoint.files, progress)


@dataclass(frozen=True)
class Prepared:
    """What is known before the first byte is written."""

    checkpoint: Checkpoint
    plan: ExportPlan
    measured: Measured | None = None
    calibration: tuple[Path | None, DeviceChoice] = (None, "auto")
    importance: Mapping[str, TensorStatistics] | None = None
    task: TaskKind | None = None


def prepare(
    options: ExportOptions,
    progress: Progress = SILENT,
    *,
    headers_only: bool = False,
    aside: Aside | None = None,
    resume: bool = False,
) -> Prepared:
    """Read the source's headers and resolve the plan: what ``--dry-run`` shows. Writes nothing but the cache.

    ``headers_only`` leaves weights on the hub, if the plan needs none: a mix that was named. ``aside`` begins to hash
    the source as soon as it is known, unless measuring may hash it first.

    ``auto`` keeps a quantised source that fits as it is. Else it measures what each tensor loses in each type when
    torch and transformers are installed, and chooses among the usual mixes when not. Rounding of those mixes, and of
    one that is named together with a calibration text, is weighed by importance that the engine measures.
    ``resume`` says that one artefact will be gone on with.

    Raises ``UsageError``, ``CheckpointError``, ``ProfileError`` or ``DoesNotFitError``.
    """
    check_options(options)
    profile = load_profile(options.target)
    headers_only = headers_only and not options.chooses_types
    checkpoint = open_checkpoint(open_source(options.source, progress, headers_only=headers_only))
    if aside is not None and not options.chooses_types and not options.weighs_rounding:
        aside.hash(checkpoint.files)
    options, why = settle_format(options, checkpoint)
    prepared = _prepared(options, checkpoint, profile, progress)
    if why is not None:
        return replace(prepared, plan=_with_note(prepared.plan, why))
    found = contest(options, checkpoint, profile, resume=resume)
    return replace(prepared, plan=_with_format_told(prepared.plan, found))


def _prepared(options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile, progress: Progress) -> Prepared:
    """``prepare`` of a checkpoint whose format is settled."""
    task = optimum_tasks.task_of(checkpoint, options)
    if task is not None:
        return Prepared(checkpoint, optimum_tasks.resolve(options, checkpoint, profile), task=task)
    check_checkpoint(checkpoint, form_of(options))
    if not options.chooses_types:
        plan = resolve(options, checkpoint, profile)
        if not options.weighs_rounding or plan.format == "onnx":
            return Prepared(checkpoint, plan, calibration=(options.calibration, options.device))
        return _weighed(options, checkpoint, plan, progress)
    kept = unchanged(options, checkpoint, profile) if options.calibration is None else None
    if kept is not None:
        return Prepared(checkpoint, kept)
    way = way_of(options, checkpoint)
    if way.value != "none":
        measured = measure_types(options, checkpoint, progress, way)
        return Prepared(checkpoint, measured.choose(options, profile).plan, measured)
    plan = _with_note(resolve(options, checkpoint, profile), f"types were not measured: {way.reason}")
    if options.format == "onnx" or not rounds(plan):
        return Prepared(checkpoint, plan)
    try:
        return _weighed(options, checkpoint, plan, progress)
    except (DoesNotFitError, EngineError) as error:
        if options.calibration is not None:
            raise
        return Prepared(checkpoint, _with_note(plan, f"importance was not measured either: {error.message}"))


def _with_note(plan: ExportPlan, note: str) -> ExportPlan:
    return plan.model_copy(update={"notes": (*plan.notes, note)})


def _with_format_told(plan: ExportPlan, found: Contest | str | None) -> ExportPlan:
    """A plan of ``--format auto`` that says what decides the format."""
    if found is None:
        return plan
    return _with_note(plan, found.told if isinstance(found, Contest) else f"format auto: GGUF: {found}")


def _weighed(options: ExportOptions, checkpoint: Checkpoint, plan: ExportPlan, progress: Progress) -> Prepared:
    """A plan whose rounding is weighed by importance. Raises as ``measure_types``, and ``DoesNotFitError``."""
    if not rounds(plan):
        given = "calibration" if options.imatrix is None else "imatrix"
        raise UsageError(f"--{given} has no use here: {plan.quant} rounds nothing", hint="leave it out")
    if options.imatrix is not None:
        record, weights = importance_of_file(options.imatrix, plan)
        what = record.text
    else:
        text, hashes = _calibration(options, checkpoint, progress)
        weights = importance(checkpoint, text, tuple(item.sha256 for item in hashes), progress)
        record, what = text.record, f"importance over {text.record.tokens} tokens, measured by the engine"
    plan = _with_note(plan, f"rounding weighed by {what}")
    return Prepared(checkpoint, plan.model_copy(update={"calibration": record}), importance=weights)


def export(
    options: ExportOptions,
    destination: Path,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress = SILENT,
) -> Bundle:
    """Make a proven bundle at ``destination``.

    Raises what ``prepare`` raises, ``BundleError`` when it cannot be written, and ``ProofError`` when tokens differ or
    the quality limit is missed. Whatever is raised, nothing new is left behind and an earlier bundle is untouched; with
    ``resume``, finished tensors stay in a hidden directory beside it when interrupted, and the next such call goes on.
    """
    bundles.check_destination(destination, force=force)
    both = None if resume else _contest(options, progress)
    if both is not None:
        with bundles.new_bundle(destination, force=force) as staging:
            hold(both, staging, lambda each, place: _export(each, place, progress=progress), progress)
    else:
        _export(options, destination, force=force, resume=resume, progress=progress)
    return bundles.open_bundle(destination, check_hashes=False)


def _contest(options: ExportOptions, progress: Progress) -> Contest | None:
    """What ``--format auto`` has to measure, None when the format stands without, or what is wrong is told without."""
    if not options.measured_format or options.format != "auto" or not options.chooses_types:
        return None
    check_options(options)
    checkpoint = open_checkpoint(open_source(options.source, progress))
    settled, _ = settle_format(options, checkpoint)
    try:
        found = contest(settled, checkpoint, load_profile(options.target))
    except CheckpointError:  # told in full by the checks of the export itself
        return None
    return found if isinstance(found, Contest) else None


def _export(
    options: ExportOptions, destination: Path, *, force: bool = False, resume: bool = False, progress: Progress
) -> Bundle:
    """``export`` of a format that is settled, or by facts alone."""
    with Aside() as aside:
        prepared = prepare(options, progress, aside=aside, resume=resume)
        aside.hash(prepared.checkpoint.files, prepared.measured.hashes if prepared.measured else None)
        if resume and prepared.plan.format != "gguf":
            told = f"--resume is for GGUF; {prepared.plan.format} is written as a whole"
            raise UsageError(told, hint="leave it out")
        if prepared.plan.format == "onnx":
            require("onnx")
        if prepared.task is not None:
            _export_task(options, prepared, prepared.task, destination, aside, force=force, progress=progress)
        else:
            _export_model(options, prepared, destination, aside, force=force, resume=resume, progress=progress)
    return bundles.open_bundle(destination, check_hashes=False)


def _export_model(
    options: ExportOptions,
    prepared: Prepared,
    destination: Path,
    aside: Aside,
    *,
    force: bool,
    resume: bool,
    progress: Progress,
) -> None:
    """``export`` of a model that generates or makes vectors."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    description = describe(checkpoint, plan.format)
    check_room(destination.parent, plan.artifact_bytes - (bundles.kept_bytes(destination) if resume else 0))
    journal = bundles.journal_path(destination) if resume else None
    words = _load_words(checkpoint, plan, progress)
    _check_vocabulary(checkpoint, description, words)
    with bundles.new_bundle(destination, force=force, resume=resume) as staging, aside:
        _clear(staging, ARTIFACTS[plan.format])
        _write_texts(staging, words)
        artifact = _write_artifact(staging, prepared, description, words, progress, aside, journal)
        _check_size(options, artifact)
        identity = aside.identity(words, artifact)
        measured = _measure(options, prepared, artifact, identity, progress)
        if prepared.measured is not None and isinstance(measured, Quality):
            if journal is not None:
                journal.unlink(missing_ok=True)  # the artefact may become another one
            plan, measured = _along_the_front(options, prepared, artifact, measured, progress)
        _check_quality(options, measured)
        proven = Proven(plan, description.encoder.record if description.encoder else None, measured)
        write_manifest(staging, checkpoint, aside, proven, progress)


def _export_task(
    options: ExportOptions,
    prepared: Prepared,
    task: TaskKind,
    destination: Path,
    aside: Aside,
    *,
    force: bool,
    progress: Progress,
) -> None:
    """``export`` of a model with a task of its own."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    words = optimum_tasks.load_words(checkpoint)
    record = optimum_tasks.record_of(checkpoint, task, words)
    check_room(destination.parent, plan.artifact_bytes)
    with bundles.new_bundle(destination, force=force) as staging, aside:
        artifact = optimum_tasks.write_task(staging, checkpoint, task, plan, words, progress)
        _check_size(options, artifact)
        identity = optimum_tasks.prove_words(checkpoint, staging)
        measured = None
        if options.verify:
            measured = task_quality.measure(
                artifact, checkpoint, record, identity, options.evaluation, progress, device=options.device
            )
        proven = Proven(plan, None, measured, record)
        write_manifest(staging, checkpoint, aside, proven, progress)


def _clear(staging: Path, artifact: str) -> None:
    """An earlier attempt may have left more than its artefact."""
    for path in staging.iterdir():
        if path.name != artifact:
            path.unlink()


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


def _write_artifact(
    staging: Path,
    prepared: Prepared,
    description: ModelDescription,
    words: SourceTokenizer,
    progress: Progress,
    aside: Aside | None = None,
    journal: Path | None = None,
) -> Path:
    """Write the planned tensors; types that were measured are rounded as they were then, and kept in the cache.

    With a ``journal``, what it says is there is not written again.
    """
    checkpoint, plan = prepared.checkpoint, prepared.plan
    if plan.format == "onnx":
        with paused_collector():
            from exporter.onnx_bundle import write_artifact  # needs the onnx package, which the GGUF way does without

        if aside is not None:
            aside.prove(words, staging / ARTIFACTS["onnx"])  # its vocabulary is a file of its own, written before it
        artifact, records = write_artifact(
            staging, checkpoint, description, plan, words, prepared.calibration, progress
        )
        if aside is not None:
            aside.note(staging, records)
        return artifact
    artifact = staging / ARTIFACTS[plan.format]
    metadata = _metadata(plan, description, words)

    def fill(quantizers: Mapping[str, RowQuantizer], further: str) -> None:
        def tensors(position: int, plans: Sequence[TensorPlan], inner: Progress) -> None:
            if aside is not None:
                aside.prove(words, artifact)
            sources = description.tensors
            write_tensors(artifact, position, checkpoint, sources, plans, progress=inner, quantizers=quantizers)

        writer = Writer(lambda: write_head(artifact, checkpoint.architecture, metadata, plan.tensors), tensors)
        if journal is None:
            tensors(writer.head(), plan.tensors, progress)
        else:
            key = key_of_artifact(checkpoint, plan.tensors, hash_of_metadata(metadata), further)
            write_in_parts(journal, key, artifact, plan.tensors, writer, progress)

    if prepared.measured is None:
        text = plan.calibration.text_sha256 if plan.calibration else ""
        fill(damage.quantizers(prepared.importance or {}), text)
        return artifact
    analysis = prepared.measured.analysis
    types = [(item.name, item.type) for item in plan.tensors]
    key = cache.key_of("artifact", analysis.key, types, hash_of_metadata(metadata))
    held = cache.find(key)
    if held is not None and (held / artifact.name).is_file():
        if journal is not None:
            journal.unlink(missing_ok=True)
        with write_errors(artifact):
            shutil.copyfile(held / artifact.name, artifact)
        return artifact
    fill(analysis.rounding(), analysis.key)
    with cache.new_entry(key) as directory:
        if directory is not None:
            shutil.copyfile(artifact, directory / artifact.name)
    return artifact


def _measure(
    options: ExportOptions, prepared: Prepared, artifact: Path, identity: TokenIdentity, progress: Progress
) -> Quality | EmbeddingQuality | None:
    """The quality of the artefact. What was measured before of the very same bytes, by the same programs on the same
    kind of processor, is taken from the cache."""
    if not options.verify:
        return None
    if describe(prepared.checkpoint).encoder is not None:
        placement = Placement(device=options.device)
        return embedding_quality.measure(
            artifact, prepared.checkpoint, identity, options.evaluation, progress, placement=placement
        )
    if prepared.measured is None:
        return _measured_now(options, prepared.checkpoint, artifact, identity, progress)
    with progress.stage("hashing", 1) as stage:
        digest = bundles.file_record(artifact).sha256
        stage.advance()
    programs = [(name, version(name)) for name in ("edgelm", "llama-cpp-python", "torch", "transformers")]
    text = evaluation_text(options.evaluation).sha256
    host = (cpu_name(), instruction_set())
    key = cache.key_of("quality", prepared.measured.analysis.key, digest, text, quality.MIN_TOKENS, programs, host)
    held = cache.find(key)
    if held is not None:
        try:
            return Quality.model_validate_json((held / _QUALITY).read_bytes())
        except (OSError, ValueError):
            cache.remove(key)
    found = _measured_now(options, prepared.checkpoint, artifact, identity, progress)
    with cache.new_entry(key) as directory:
        if directory is not None:
            (directory / _QUALITY).write_text(found.model_dump_json(), encoding="utf-8")
    return found


def _measured_now(
    options: ExportOptions, checkpoint: Checkpoint, artifact: Path, identity: TokenIdentity, progress: Progress
) -> Quality:
    placement = Placement(device=options.device)
    found = quality.measure(artifact, checkpoint, identity, options.evaluation, progress, placement=placement)
    words = tokenizer.read_tokenizer(checkpoint)
    chat = prove_chat(artifact.parent, artifact, checkpoint, words, progress)
    return found.model_copy(update={"chat": chat})


def _check_quality(options: ExportOptions, measured: Quality | EmbeddingQuality | None) -> None:
    if options.max_kl is not None and isinstance(measured, Quality) and not measured.kl_mean <= options.max_kl:
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
        quality_found = _measured_now(options, checkpoint, artifact, quality_found.token_identity, progress)
    worst = automatic.worst_tensors(plan, types.analysis)
    return plan, quality_found.model_copy(update={"worst_tensors": worst})
