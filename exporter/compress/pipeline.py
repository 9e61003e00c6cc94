"""The whole way from a teacher to a distilled student on disk; the body of ``compress`` is the list of its stages."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelm.bundle import MANIFEST_NAME, file_record, read_manifest
from edgelm.errors import CheckpointError, UsageError
from edgelm.progress import SILENT, Progress
from exporter import tokenizer
from exporter.architectures import describe
from exporter.calibration import read_conversations
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.compress import result, surgery
from exporter.compress.anatomy import POSITIONS_AFTER_PADDING
from exporter.compress.data import Corpus
from exporter.compress.decoders import Decoders
from exporter.compress.encoders import Encoders, check_encoder, is_encoder
from exporter.compress.fake_quant import FakeQuantizer
from exporter.compress.grid import Grid, fits, read_grids
from exporter.compress.proposal import Proposal, imagined, propose
from exporter.compress.result import CompressRecord
from exporter.compress.run import CompressOptions, Kind, Run, check_steps, claim_state, state_kept_if_worth_it
from exporter.compress.shape import Shape, group_of, row_remarks, shape_of, steps_between, told, wanted_shape
from exporter.compress.sparsity import (
    NO_GAIN,
    Masks,
    Pattern,
    check_rows,
    choose_masks,
    load_masks,
    parse_pattern,
    save_masks,
)
from exporter.compress.surgery import Kept
from exporter.compress.training import TrainingOptions, write_atomically
from exporter.compress.vocabulary import VocabularyCut, check_vocabulary, choose_tokens, cut_tables
from exporter.device import DeviceChoice, resolve_device
from exporter.given_types import read_types
from exporter.options import ExportOptions
from exporter.plan import resolve
from exporter.reference import open_torch_model
from exporter.tokenizer import SourceTokenizer
from targets.profile import load_profile

if TYPE_CHECKING:
    from exporter.pipeline import Prepared

_SETTINGS = (
    "batch", "learning_rate", "temperature", "hidden_weight", "attention_weight", "own_share",
    "own_tokens", "finish_tokens", "seed", "length",
)  # fmt: skip
_TOOLS = ("edgelm", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Student:
    """A finished student: where it lies and what was recorded of it."""

    path: Path
    record: CompressRecord


@dataclass(frozen=True)
class Lessons:
    """What a student is taught with and judged by."""

    run: Run
    kind: Kind
    teacher: Any
    corpus: Corpus
    held_out: Corpus | None

    def compare(self, stage: str, student: Any) -> None:
        """Figures of a student after a stage."""
        self.kind.compare(stage, self.teacher, student, self.held_out)

    def train(self, pruned: Pruned, options: TrainingOptions, name: str, quantizer: FakeQuantizer | None = None) -> int:
        """Train for all steps under the stage's name; about how many tokens that took."""
        run = self.run
        trainer = self.kind.trainer(self.teacher, pruned.student, self.corpus, options, run.state / name, quantizer)
        if pruned.masks is not None:
            trainer.after_step = pruned.masks.apply
        trainer.run(run.progress)
        rows = (asdict(item) for item in trainer.curve)
        run.curve += [{"stage": name, self.kind.figure: row.pop("kl"), **row} for row in rows]
        return options.steps * self.kind.step_tokens(self.corpus)


@dataclass(frozen=True)
class Pruned:
    """A student, which of its weights may differ from zero (None: all), SOURCE's layers that are left, and on how many
    tokens it was distilled."""

    student: Any
    masks: Masks | None
    layers: tuple[int, ...]
    tokens: int

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of zeros."""
        return () if self.masks is None else (f"{self.masks.zeros:.1%} of the weights of layers are zero: {NO_GAIN}",)


@dataclass(frozen=True)
class _Finished:
    """What a student was trained through: the name of the plan, the type of each GGUF tensor, on how much, how
    parameters are stored whose scales an export could not find again, and what a user should know."""

    quant: str
    types: dict[str, str]
    tokens: int
    stored: dict[str, Grid]
    remarks: tuple[str, ...]


def proposal(options: CompressOptions, progress: Progress = SILENT) -> tuple[Shape, Shape, Proposal | None, list[str]]:
    """The teacher's shape, the student's, the export it was chosen for, and remarks on its rows; nothing is computed.

    Raises ``UsageError``, ``CheckpointError`` and, when no shape meets the limits, ``DoesNotFitError``.
    """
    _check(options)
    checkpoint = open_checkpoint(open_source(options.source))
    _check_kind(options, checkpoint)
    if options.vocabulary is not None:
        check_vocabulary(tokenizer.read_tokenizer(checkpoint), options.vocabulary)
    config = _config(checkpoint, progress)
    full, wanted, found = _shape(options, checkpoint, config)
    _check_shape(options, checkpoint, config, (full, wanted))
    return full, wanted, found, row_remarks(config, wanted)


def compress(
    options: CompressOptions, destination: Path, *, force: bool = False, progress: Progress = SILENT
) -> Student:
    """Prune, distil and finish; the student appears at ``destination`` when all is done.

    A run that was killed leaves its state beside ``destination``; the same call goes on from it. Raises ``UsageError``,
    ``CheckpointError``, ``DoesNotFitError`` and ``EngineError``.
    """
    _check(options)
    result.check_destination(destination, force=force)
    started = time.monotonic()
    checkpoint = open_checkpoint(open_source(options.source))
    _check_kind(options, checkpoint)
    words = tokenizer.read_tokenizer(checkpoint)
    if options.vocabulary is not None:
        check_vocabulary(words, options.vocabulary)
    teacher_checkpoint = _teacher(options, checkpoint, words)
    state = destination.with_name(f".{destination.name}.training")
    run = Run(options, checkpoint, words, state, progress)
    kind = _kind(run)
    with _models(run, kind, teacher_checkpoint) as (base, teacher):
        full, wanted, _ = _shape(options, checkpoint, base.config)
        _check_shape(options, checkpoint, base.config, (full, wanted))
        kind.check_teacher(teacher, base)
        claim_state(run, teacher_checkpoint, wanted)
        with state_kept_if_worth_it(state):
            lessons = Lessons(run, kind, teacher, *kind.corpus(teacher))
            pruned = _prune_and_distil(lessons, base, steps_between(full, wanted, options.stages))
            student = pruned.student
            finished = _finish(lessons, pruned) if options.finish else None
            cut = _cut_vocabulary(lessons, student) if options.vocabulary else None
            record = CompressRecord(
                teacher=teacher_checkpoint.source.location,
                teacher_files=tuple(file_record(path) for path in teacher_checkpoint.files),
                source=checkpoint.source.location,
                source_files=tuple(file_record(path) for path in checkpoint.files),
                shape_teacher=told(teacher.config),
                shape_source=str(full),
                shape=str(wanted),
                parameters_teacher=teacher.num_parameters(),
                parameters=student.num_parameters(),
                layers_kept=pruned.layers,
                zeros=pruned.masks.zeros if pruned.masks else None,
                vocabulary=student.config.vocab_size,
                measured_by=f"{options.units} (layers: {kind.depth})",
                data=lessons.corpus.sources,
                data_sha256=lessons.corpus.sha256,
                tokens=pruned.tokens + (finished.tokens if finished else 0),
                settings={name: getattr(options, name) for name in _SETTINGS},
                trained_for=finished.quant if finished else None,
                types=finished.types if finished else None,
                comparisons=tuple(run.comparisons),
                remarks=(
                    *row_remarks(base.config, wanted),
                    *pruned.remarks,
                    *(finished.remarks if finished else ()),
                    *([cut.remark] if cut else ()),
                ),
                elapsed_s=time.monotonic() - started,
                tool_versions={tool: version(tool) for tool in _TOOLS},
            )
            with result.new_directory(destination, force=force) as staging:
                result.write_student(
                    staging, student, checkpoint, words, record, cut, finished.stored if finished else {}
                )
                result.write_curve(staging, run.curve)
    shutil.rmtree(state, ignore_errors=True)
    return Student(destination, record)


def _check(options: CompressOptions) -> None:
    positive = (
        "tokens", "own_tokens", "length", "batch", "micro_batch", "learning_rate", "temperature", "finish_tokens",
        "stages",
    )  # fmt: skip
    for name in positive:
        value = getattr(options, name)
        if value is not None and not value > 0 and not (name == "tokens" and value == 0):
            raise UsageError(f"--{name.replace('_', '-')} must be above zero, not {value}")
    if not 0 <= options.own_share <= 1:
        raise UsageError(f"--own-share is a share from 0 to 1, not {options.own_share}")
    if options.own_tokens is not None and options.own_share == 0:
        raise UsageError(
            "--own-tokens says how many of the teacher's own words are written, and none are asked for",
            hint="give --own-share, too",
        )
    limits = (options.min_decode_tps, options.max_ram_bytes, options.max_artifact_bytes)
    if any(limit is not None for limit in limits) and options.target is None:
        raise UsageError("limits of speed, memory or size need a --target that they hold for")
    if options.target is not None and (options.layers or options.neurons or options.heads or options.hidden):
        raise UsageError(
            "--target chooses the shape: it goes with none of --layers, --neurons, --heads and --hidden",
            hint="look at its choice with --dry-run, then name a shape without it",
        )
    for path in options.texts:
        if not path.is_file():
            raise UsageError(f"--text: {path} is no file")
    if options.sparsity is not None:
        parse_pattern(options.sparsity)
        if options.units == "fisher":
            raise UsageError(
                "--sparsity goes by --importance activation or magnitude; fisher is measured of whole units",
                hint="choose one of these",
            )
    if options.finish is not None:
        _finish_export(options, "")
    matched = options.hidden_weight > 0 or options.attention_weight > 0
    if matched and options.teacher is not None:
        raise UsageError(
            "--hidden-weight and --attention-weight compare layers with those of SOURCE that they were; "
            "another --teacher has none of them",
            hint="leave out the weights, or the teacher",
        )


def _check_kind(options: CompressOptions, checkpoint: Checkpoint) -> None:
    """Raises ``UsageError`` for what goes only with the other kind of model."""
    if is_encoder(checkpoint):
        check_encoder(options, checkpoint)
        return
    told = f"{options.batch} sequences of {options.length} tokens"
    check_steps(options, options.batch * options.length, told)
    if options.depth == "cosine":
        raise UsageError("--depth-by cosine compares vectors of texts: it is for encoders", hint="use influence or kl")


def _kind(run: Run) -> Kind:
    return Encoders(run) if is_encoder(run.checkpoint) else Decoders(run)


def _check_shape(options: CompressOptions, checkpoint: Checkpoint, config: Any, shapes: tuple[Shape, Shape]) -> None:
    """Refuse now what would fail after hours of training. Raises ``UsageError`` and ``CheckpointError``."""
    full, wanted = shapes
    if full.hidden != wanted.hidden and (options.hidden_weight > 0 or options.attention_weight > 0):
        raise UsageError(
            f"--hidden-weight and --attention-weight compare vectors: the teacher's have {full.hidden} numbers, the "
            f"student's {wanted.hidden}",
            hint="leave out the weights, or --hidden",
        )
    if options.sparsity is not None:
        check_rows(parse_pattern(options.sparsity), wanted)
    if options.finish is None:
        return
    if not is_encoder(checkpoint):
        resolve(_finish_export(options, ""), imagined(config, wanted, checkpoint), load_profile("host"))
    elif not Path(options.finish).is_dir():  # the name of a mix means the same for any shape
        resolve(_finish_export(options, ""), checkpoint, load_profile("host"))


def _finish_export(options: CompressOptions, source: str) -> ExportOptions:
    """The export whose types are trained for. Raises ``UsageError`` for what has no types until it is measured."""
    finish = options.finish or ""
    if finish.lower() == "auto":
        raise UsageError(
            "--finish auto: which types are best is measured on a student that is there",
            hint="export it with --quant auto first, then name that bundle: --finish BUNDLE",
        )
    if Path(finish).is_dir():
        return ExportOptions(source=source, format="gguf", types=read_types(Path(finish)))
    return ExportOptions(source=source, format="gguf", quant=finish)


def _config(checkpoint: Checkpoint, progress: Progress) -> Any:
    if checkpoint.source.kind == "huggingface":
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(checkpoint.source.path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.source.location}: {str(error).splitlines()[0]}") from error
    with open_torch_model(checkpoint, progress, device="cpu") as model:
        return model.config


def _shape(options: CompressOptions, checkpoint: Checkpoint, config: Any) -> tuple[Shape, Shape, Proposal | None]:
    full = shape_of(config)
    if options.target is None:
        return full, wanted_shape(
            full, layers=options.layers, neurons=options.neurons, heads=_kv_heads(options, config),
            hidden=options.hidden,
        ), None  # fmt: skip
    export = ExportOptions(
        source=options.source,
        target=options.target,
        format="gguf",
        quant=options.quant,
        max_ram_bytes=options.max_ram_bytes,
        max_artifact_bytes=options.max_artifact_bytes,
        min_decode_tps=options.min_decode_tps,
    )
    if options.vocabulary is not None:
        config = copy.copy(config)
        config.vocab_size = options.vocabulary
    found = propose(config, full, checkpoint, export, load_profile(options.target))
    return full, found.shape, found


def _kv_heads(options: CompressOptions, config: Any) -> int | None:
    if options.heads is None:
        return None
    group = group_of(config)
    if options.heads % group:
        raise UsageError(
            f"--heads {options.heads}: {group} heads share one head of keys and values",
            hint=f"give a multiple of {group}",
        )
    return options.heads // group


def _teacher(options: CompressOptions, checkpoint: Checkpoint, words: SourceTokenizer) -> Checkpoint:
    """The teacher's checkpoint. Raises ``CheckpointError`` when it speaks in other tokens."""
    if options.teacher is None:
        return checkpoint
    teacher = open_checkpoint(open_source(options.teacher))
    ours, theirs = (item.gguf_metadata["tokenizer.ggml.tokens"] for item in (words, tokenizer.read_tokenizer(teacher)))
    if ours != theirs:
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise CheckpointError(
            f"{options.teacher} and {options.source} have different tokenizers: they differ from token {place} on",
            hint="logits can be compared only over the same vocabulary; choose a teacher of the same family",
        )
    return teacher


@contextmanager
def _models(run: Run, kind: Kind, teacher_checkpoint: Checkpoint) -> Iterator[tuple[Any, Any]]:
    """The model to prune and the teacher, which may be the same, on the device."""
    # Both on one device: what holds the first model alone could lack room for the second.
    device: DeviceChoice = "cuda" if resolve_device(run.options.device).value == "cuda" else "cpu"
    with kind.open(run.checkpoint, device) as base:
        _ready(base)
        if teacher_checkpoint is run.checkpoint:
            yield base, base
            return
        with kind.open(teacher_checkpoint, device) as teacher:
            _ready(teacher)
            yield base, teacher


def _ready(model: Any) -> None:
    model.set_attn_implementation("sdpa")
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _prune_and_distil(lessons: Lessons, base: Any, shapes: Sequence[Shape]) -> Pruned:
    """Prune to each shape in turn, which is often only one, and distil after each."""
    options, current = lessons.run.options, Pruned(base, None, tuple(range(base.config.num_hidden_layers)), 0)
    pattern = parse_pattern(options.sparsity) if options.sparsity is not None else None
    for number, shape in enumerate(shapes, 1):
        part = f"-{number}" if len(shapes) > 1 else ""
        told = f", stage {number} of {len(shapes)}" if part else ""
        kept = _kept(lessons, current.student, shape, lessons.run.state / f"kept{part}.json")
        student = surgery.cut(current.student, shape, kept)
        current = replace(current, student=student, layers=tuple(current.layers[index] for index in kept.layers))
        lessons.compare(f"pruned{told}", student)
        if pattern is not None:
            now = pattern.at(number / len(shapes))
            masks = _masks(lessons, student, now, lessons.run.state / f"masks{part}.npz")
            masks.apply()
            current = replace(current, masks=masks)
            lessons.compare(f"sparsity {now}{told}", student)
        steps = options.tokens // len(shapes) // lessons.kind.step_tokens(lessons.corpus)
        if steps:
            learned = lessons.train(current, _training(options, steps, current.layers), f"distil{part}")
            current = replace(current, tokens=current.tokens + learned)
            lessons.compare(f"distilled{told}", student)
    return current


def _kept(lessons: Lessons, base: Any, wanted: Shape, path: Path) -> Kept:
    """What stays of a model: measured once, then read, so that a resumed run prunes the very same."""
    import torch

    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        neurons, heads = (tuple(torch.tensor(row) for row in found[name]) for name in ("neurons", "heads"))
        return Kept(tuple(found["layers"]), torch.tensor(found["hidden"]), neurons, heads)
    kept = surgery.choose(lessons.kind.measure(base, lessons.corpus, wanted), shape_of(base.config), wanted)
    rows = {name: [row.tolist() for row in getattr(kept, name)] for name in ("neurons", "heads")}
    write_atomically(path, json.dumps({"layers": kept.layers, "hidden": kept.hidden.tolist(), **rows}))
    return kept


def _masks(lessons: Lessons, student: Any, pattern: Pattern, path: Path) -> Masks:
    """Which weights stay: chosen once, then read, as ``_kept``."""
    run = lessons.run
    if not path.is_file():
        read = lessons.kind.samples(lessons.corpus)
        by_activation = run.options.units == "activation"
        save_masks(path, choose_masks(student, pattern, read, run.progress, by_activation=by_activation))
    return Masks(student, load_masks(path, student))


def _training(options: CompressOptions, steps: int, layers: tuple[int, ...]) -> TrainingOptions:
    return TrainingOptions(
        steps=steps,
        batch=options.batch,
        micro_batch=min(options.micro_batch, options.batch),
        learning_rate=options.learning_rate,
        temperature=options.temperature,
        hidden_weight=options.hidden_weight,
        attention_weight=options.attention_weight,
        matched=layers,
        seed=options.seed,
    )


def _finish(lessons: Lessons, pruned: Pruned) -> _Finished:
    """Train on through the types that an export would give each tensor."""
    from exporter.pipeline import prepare

    run, options, student = lessons.run, lessons.run.options, pruned.student
    directory = run.state / "unfinished"
    _save_plain(run, student, directory)
    prepared = prepare(_finish_export(options, str(directory)), run.progress)
    plan = prepared.plan
    types = {item.source_name: item.type for item in plan.tensors if item.type not in ("F32", "F16", "BF16")}
    grids = _grids(options, prepared, pruned)
    quantizer = FakeQuantizer(student, types, grids)
    with quantizer.applied():
        lessons.compare(f"quantised to {plan.quant}", student)
    steps = max(1, options.finish_tokens // lessons.kind.step_tokens(lessons.corpus))
    # Small steps, each weight by itself: what quantising leaves is a matter of single weights.
    training = replace(_training(options, steps, pruned.layers), learning_rate=0.25 * options.learning_rate)
    learned = lessons.train(pruned, training, "finish", quantizer)
    with quantizer.applied():
        lessons.compare(f"finished for {plan.quant}", student)
    begun = f"{len(grids)} of {len(types)} quantised matrices were finished from the numbers of the bundle"
    remarks = () if _bundle_of(options) is None else (begun,)
    stored = {item.name: item.type for item in plan.tensors}
    return _Finished(plan.quant, stored, learned, quantizer.settle(), remarks)


def _grids(options: CompressOptions, prepared: Prepared, pruned: Pruned) -> dict[str, Grid]:
    """What a bundle of this very student stores, where ``--finish`` names one; not of matrices whose zeros would be
    none on their grid."""
    artifact = _bundle_of(options)
    if artifact is None:
        return {}
    parameters = dict(pruned.student.named_parameters())
    sparse = pruned.masks.names if pruned.masks is not None else frozenset()
    descriptions = {item.name: item for item in describe(prepared.checkpoint).tensors}
    return {
        name: grid
        for name, grid in read_grids(artifact, prepared.plan.tensors, descriptions).items()
        if (grid.has_zero or name not in sparse)
        and fits(grid, np.ascontiguousarray(parameters[name].detach().float().cpu().numpy()))
    }


def _bundle_of(options: CompressOptions) -> Path | None:
    """The artefact of the bundle that ``--finish`` names. Raises ``BundleError``."""
    directory = Path(options.finish or "")
    if options.finish is None or not (directory / MANIFEST_NAME).is_file():
        return None
    return directory / read_manifest(directory).artifact


def _cut_vocabulary(lessons: Lessons, student: Any) -> VocabularyCut:
    """Leave the tokens that the texts use. Last of all: until then student and teacher speak of the same tokens."""
    run = lessons.run
    texts = [read_conversations(path, run.words).content for path in run.options.texts or (None,)]
    # RoBERTa counts positions from the padding token's number, which has to stay what it is.
    counted = student.config.model_type in POSITIONS_AFTER_PADDING
    fixed = range(student.config.pad_token_id + 1) if counted else ()
    cut = choose_tokens(run.words, texts, run.options.vocabulary or 0, fixed)
    cut_tables(student, cut.kept)
    lessons.kind.compare_cut(f"{len(cut.kept)} tokens", lessons.teacher, student, cut)
    return cut


def _save_plain(run: Run, student: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(directory, safe_serialization=True)
    result.write_tokenizer(directory, run.checkpoint, run.words)
