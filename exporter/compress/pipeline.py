"""The whole way from a teacher to a distilled student on disk; the body of ``compress`` is the list of its stages."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle import file_record
from edgelm.errors import CheckpointError, UsageError
from edgelm.progress import SILENT, Progress
from exporter import tokenizer
from exporter.architectures import describe
from exporter.calibration import opening_of_a_turn
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.compress import data, importance, result, surgery
from exporter.compress.data import Corpus
from exporter.compress.fake_quant import FakeQuantizer
from exporter.compress.importance import DepthMeasure, Measure
from exporter.compress.optimizer import Rule
from exporter.compress.proposal import Proposal, imagined, propose
from exporter.compress.result import Comparison, CompressRecord
from exporter.compress.shape import Shape, row_remarks, shape_of, told, wanted_shape
from exporter.compress.surgery import Kept
from exporter.compress.training import Trainer, TrainingOptions, write_atomically
from exporter.compress.writing import own_words, starts
from exporter.device import DeviceChoice, memory_errors, resolve_device
from exporter.given_types import read_types
from exporter.options import ExportOptions
from exporter.plan import resolve
from exporter.quality import Window, compare_models, cut_windows
from exporter.reference import TransformersModel, open_torch_model
from exporter.texts import evaluation_text
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import SourceTokenizer
from targets.profile import load_profile

IMPORTANCE_WINDOWS = 16
EVALUATION_TOKENS = 2000
_HELD_OUT = 16  # windows of the teacher's own words that nobody learns from
_OWN_WORDS, _KEPT, _COMPARISONS = "own_words.npy", "kept.json", "comparisons.json"
_WRITTEN = "own_words"  # batches of words while the teacher still writes
# A killed run may go on with these changed: they say how it is computed, or what to do about a loss that is no number.
_CHANGEABLE = ("device", "micro_batch", "learning_rate")
_SETTINGS = (
    "batch", "learning_rate", "optimizer", "temperature", "hidden_weight", "attention_weight", "own_share",
    "own_tokens", "finish_tokens", "seed", "length",
)  # fmt: skip
_TOOLS = ("edgelm", "torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """What was typed for ``edgelm compress``. None means: as the teacher has it, or not asked for.

    ``target`` with limits chooses ``layers`` and ``neurons`` by prediction. ``heads`` counts attention heads.
    ``texts`` replace the built-in one; ``own_share`` of the training tokens are the teacher's own, who writes
    ``own_tokens`` of them, all where that is None; fewer are read more than once. ``finish`` is
    what the last ``finish_tokens`` are trained for: a mix (Q4_0, Q4_K_M ...) or a bundle, whose types are taken.
    """

    source: str
    teacher: str | None = None
    layers: int | None = None
    neurons: int | None = None
    heads: int | None = None
    hidden: int | None = None
    target: str | None = None
    quant: str = "Q4_K_M"
    min_decode_tps: float | None = None
    max_ram_bytes: int | None = None
    max_artifact_bytes: int | None = None
    units: Measure = "activation"
    depth: DepthMeasure = "influence"
    texts: tuple[Path, ...] = ()
    own_share: float = 0.0
    own_tokens: int | None = None
    tokens: int = 1_000_000
    length: int = 512
    batch: int = 8
    micro_batch: int = 4
    learning_rate: float = 4e-4
    temperature: float = 1.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    finish: str | None = None
    finish_tokens: int = 200_000
    optimizer: Rule = "auto"
    seed: int = 0
    device: DeviceChoice = "auto"


@dataclass(frozen=True)
class Student:
    """A finished student: where it lies and what was recorded of it."""

    path: Path
    record: CompressRecord


@dataclass(frozen=True)
class _Finished:
    """What a student was trained through: the name of the plan, the type of each GGUF tensor, and on how much."""

    quant: str
    types: dict[str, str]
    tokens: int


@dataclass
class _Run:
    """What the stages share."""

    options: CompressOptions
    checkpoint: Checkpoint
    words: SourceTokenizer
    state: Path
    progress: Progress
    comparisons: list[Comparison] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)


def proposal(options: CompressOptions, progress: Progress = SILENT) -> tuple[Shape, Shape, Proposal | None, list[str]]:
    """The teacher's shape, the student's, the export it was chosen for, and remarks on its rows; nothing is computed.

    Raises ``UsageError``, ``CheckpointError`` and, when no shape meets the limits, ``DoesNotFitError``.
    """
    _check(options)
    checkpoint = open_checkpoint(open_source(options.source))
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
    words = tokenizer.read_tokenizer(checkpoint)
    teacher_checkpoint = _teacher(options, checkpoint, words)
    state = destination.with_name(f".{destination.name}.training")
    run = _Run(options, checkpoint, words, state, progress)
    with _models(run, teacher_checkpoint) as (base, teacher):
        full, wanted, _ = _shape(options, checkpoint, base.config)
        _check_shape(options, checkpoint, base.config, (full, wanted))
        _claim_state(run, teacher_checkpoint, wanted)
        with _state_kept_if_worth_it(state):
            corpus, held_out = _corpus(run, teacher)
            kept = _kept(run, base, corpus, (full, wanted))
            student = surgery.cut(base, wanted, kept)
            _compare(run, "pruned", teacher, student, held_out)
            learned = _train(run, teacher, student, corpus, kept.layers)
            if learned:
                _compare(run, "distilled", teacher, student, held_out)
            finished = _finish(run, teacher, student, corpus, kept.layers, held_out) if options.finish else None
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
                layers_kept=kept.layers,
                measured_by=f"{options.units} (layers: {options.depth})",
                data=corpus.sources,
                data_sha256=corpus.sha256,
                tokens=learned + (finished.tokens if finished else 0),
                settings={name: getattr(options, name) for name in _SETTINGS},
                trained_for=finished.quant if finished else None,
                types=finished.types if finished else None,
                comparisons=tuple(run.comparisons),
                remarks=tuple(row_remarks(base.config, wanted)),
                elapsed_s=time.monotonic() - started,
                tool_versions={tool: version(tool) for tool in _TOOLS},
            )
            with result.new_directory(destination, force=force) as staging:
                result.write_student(staging, student, checkpoint, words, record)
                result.write_curve(staging, run.curve)
    shutil.rmtree(state, ignore_errors=True)
    return Student(destination, record)


@contextmanager
def _state_kept_if_worth_it(state: Path) -> Iterator[None]:
    """On any exception, keep what took long to compute; without that, nothing."""
    try:
        yield
    except BaseException:
        kept = (_OWN_WORDS, f"{_WRITTEN}/*.npy", "*/state.json")
        if not any(list(state.glob(pattern)) for pattern in kept):
            shutil.rmtree(state, ignore_errors=True)
        raise


def _check(options: CompressOptions) -> None:
    positive = (
        "tokens",
        "own_tokens",
        "length",
        "batch",
        "micro_batch",
        "learning_rate",
        "temperature",
        "finish_tokens",
    )
    for name in positive:
        value = getattr(options, name)
        if value is not None and not value > 0 and not (name == "tokens" and value == 0):
            raise UsageError(f"--{name.replace('_', '-')} must be above zero, not {value}")
    if not 0 <= options.own_share <= 1:
        raise UsageError(f"--own-share is a share from 0 to 1, not {options.own_share}")
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
    if 0 < options.tokens < options.batch * options.length:
        raise UsageError(
            f"--tokens {options.tokens} is less than one step, {options.batch} sequences of {options.length} tokens",
            hint="give more tokens, a smaller --batch or a shorter --length; 0 prunes only",
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


def _check_shape(options: CompressOptions, checkpoint: Checkpoint, config: Any, shapes: tuple[Shape, Shape]) -> None:
    """Refuse now what would fail after hours of training. Raises ``UsageError`` and ``CheckpointError``."""
    full, wanted = shapes
    if full.hidden != wanted.hidden and (options.hidden_weight > 0 or options.attention_weight > 0):
        raise UsageError(
            f"--hidden-weight and --attention-weight compare vectors: the teacher's have {full.hidden} numbers, the "
            f"student's {wanted.hidden}",
            hint="leave out the weights, or --hidden",
        )
    if options.finish is not None:
        resolve(_finish_export(options, ""), imagined(config, wanted, checkpoint), load_profile("host"))


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
    found = propose(config, full, checkpoint, export, load_profile(options.target))
    return full, found.shape, found


def _kv_heads(options: CompressOptions, config: Any) -> int | None:
    if options.heads is None:
        return None
    group = config.num_attention_heads // config.num_key_value_heads
    if options.heads % group:
        raise UsageError(
            f"--heads {options.heads}: {group} heads share one head of keys and values",
            hint=f"give a multiple of {group}",
        )
    return options.heads // int(group)


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
def _models(run: _Run, teacher_checkpoint: Checkpoint) -> Iterator[tuple[Any, Any]]:
    """The model to prune and the teacher, which may be the same, on the device."""
    # Both on one device: what holds the first model alone could lack room for the second.
    device: DeviceChoice = "cuda" if resolve_device(run.options.device).value == "cuda" else "cpu"
    with open_torch_model(run.checkpoint, run.progress, device=device) as base:
        _ready(base)
        if teacher_checkpoint is run.checkpoint:
            yield base, base
            return
        with open_torch_model(teacher_checkpoint, run.progress, device=device) as teacher:
            _ready(teacher)
            yield base, teacher


def _ready(model: Any) -> None:
    model.set_attn_implementation("sdpa")
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _claim_state(run: _Run, teacher: Checkpoint, wanted: Shape) -> None:
    """Make the state directory this run's own. Raises ``UsageError`` when it is another run's."""
    options = {name: str(value) for name, value in asdict(run.options).items() if name not in _CHANGEABLE}
    paths = dict.fromkeys((*run.checkpoint.files, *teacher.files, *run.options.texts))
    files = [file_record(path).sha256 for path in paths]
    document = json.dumps({"options": options, "shape": str(wanted), "files": files}, indent=2)
    path = run.state / "run.json"
    if path.is_file():
        if path.read_text(encoding="utf-8") != document:
            raise UsageError(
                f"{run.state} holds the state of a run with other settings or files",
                hint="repeat that run's command to go on with it, or remove the directory to start anew",
            )
    else:
        run.state.mkdir(parents=True, exist_ok=True)
        write_atomically(path, document)
    path = run.state / _COMPARISONS
    if path.is_file():
        run.comparisons += [Comparison.model_validate(item) for item in json.loads(path.read_text(encoding="utf-8"))]


def _kept(run: _Run, base: Any, corpus: Corpus, shapes: tuple[Shape, Shape]) -> Kept:
    """What stays of the teacher: measured once, then read, so that a resumed run prunes the very same."""
    import torch

    path = run.state / _KEPT
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        neurons, heads = (tuple(torch.tensor(row) for row in found[name]) for name in ("neurons", "heads"))
        return Kept(tuple(found["layers"]), torch.tensor(found["hidden"]), neurons, heads)
    full, wanted = shapes
    windows = [row.tolist() for row in corpus.windows[:: max(1, len(corpus.windows) // IMPORTANCE_WINDOWS)]]
    measured = importance.measure(
        base, windows[:IMPORTANCE_WINDOWS], wanted, run.progress, units=run.options.units, depth=run.options.depth
    )
    kept = surgery.choose(measured, full, wanted)
    rows = {name: [row.tolist() for row in getattr(kept, name)] for name in ("neurons", "heads")}
    write_atomically(path, json.dumps({"layers": kept.layers, "hidden": kept.hidden.tolist(), **rows}))
    return kept


def _corpus(run: _Run, teacher: Any) -> tuple[Corpus, Corpus | None]:
    """What the student learns from, and windows of the teacher's own words that are held out."""
    options = run.options
    length = min(options.length, describe(run.checkpoint).dimensions.context_trained)
    corpus = data.from_texts(options.texts or (None,), run.words, length)
    total = max(options.tokens, options.finish_tokens if options.finish is not None else 0)
    if not total * options.own_share:
        return corpus, None
    shared = max(1, round(total * options.own_share / length))
    own = min(shared, max(1, round((options.own_tokens or total) / length)))
    path = run.state / _OWN_WORDS
    if path.is_file():
        written = data.written_by_teacher(np.load(path, allow_pickle=False), options.seed)
    else:
        with memory_errors("one sequence that the teacher writes", "try a shorter --length, or --device cpu"):
            kinds = starts(opening_of_a_turn(run.words))
            words = own_words(teacher, own + _HELD_OUT, length, options.seed, kinds, run.state / _WRITTEN, run.progress)
        written = data.written_by_teacher(words, options.seed)
        partial = path.with_name(f".partial.{path.name}")
        np.save(partial, written.windows)
        partial.replace(path)
        shutil.rmtree(run.state / _WRITTEN, ignore_errors=True)
    held_out = Corpus(written.windows[:_HELD_OUT], ())
    learned = Corpus(np.resize(written.windows[_HELD_OUT:], (shared, length)), written.sources)
    if options.own_share == 1:
        return learned, held_out
    # Texts are repeated or thinned so that the shares are as asked for.
    wanted = max(1, round(shared * (1 - options.own_share) / options.own_share))
    chosen = np.random.default_rng(options.seed).permutation(np.resize(np.arange(len(corpus.windows)), wanted))
    return data.together(learned, Corpus(corpus.windows[chosen], corpus.sources)), held_out


def _train(run: _Run, teacher: Any, student: Any, corpus: Corpus, layers: tuple[int, ...]) -> int:
    """Distil; how many tokens that took."""
    step_tokens = run.options.batch * int(corpus.windows.shape[1])
    steps = run.options.tokens // step_tokens
    if steps:
        trainer = Trainer(teacher, student, corpus, _training(run.options, steps, layers), run.state / "distil")
        trainer.run(run.progress)
        run.curve += [{"stage": "distil", **asdict(item)} for item in trainer.curve]
    return steps * step_tokens


def _training(options: CompressOptions, steps: int, layers: tuple[int, ...]) -> TrainingOptions:
    return TrainingOptions(
        steps=steps,
        batch=options.batch,
        micro_batch=min(options.micro_batch, options.batch),
        learning_rate=options.learning_rate,
        optimizer=options.optimizer,
        temperature=options.temperature,
        hidden_weight=options.hidden_weight,
        attention_weight=options.attention_weight,
        matched=layers,
        seed=options.seed,
    )


def _finish(
    run: _Run, teacher: Any, student: Any, corpus: Corpus, layers: tuple[int, ...], held_out: Corpus | None
) -> _Finished:
    """Train on through the types that an export would give each tensor."""
    from exporter.pipeline import prepare

    options = run.options
    directory = run.state / "unfinished"
    _save_plain(run, student, directory)
    plan = prepare(_finish_export(options, str(directory)), run.progress).plan
    types = {item.source_name: item.type for item in plan.tensors if item.type not in ("F32", "F16", "BF16")}
    quantizer = FakeQuantizer(student, types)
    with quantizer.applied():
        _compare(run, f"quantised to {plan.quant}", teacher, student, held_out)
    step_tokens = options.batch * int(corpus.windows.shape[1])
    steps = max(1, options.finish_tokens // step_tokens)
    # Small steps, each weight by itself: what quantising leaves is a matter of single weights.
    training = replace(_training(options, steps, layers), learning_rate=0.25 * options.learning_rate, optimizer="adamw")
    trainer = Trainer(teacher, student, corpus, training, run.state / "finish", quantizer)
    trainer.run(run.progress)
    run.curve += [{"stage": "finish", **asdict(item)} for item in trainer.curve]
    with quantizer.applied():
        _compare(run, f"finished for {plan.quant}", teacher, student, held_out)
    return _Finished(plan.quant, {item.name: item.type for item in plan.tensors}, steps * step_tokens)


def _save_plain(run: _Run, student: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(directory, safe_serialization=True)
    result.write_tokenizer(directory, run.checkpoint, run.words)


def _compare(run: _Run, stage: str, teacher: Any, student: Any, held_out: Corpus | None) -> None:
    """Add a row for each evaluation text, unless an earlier part of this run has done so."""
    if any(item.stage == stage for item in run.comparisons):
        return
    text = evaluation_text()
    ids = open_tokenizer(run.words.tokenizer_json, "tokenizer.json").encode(
        text.content, add_special_tokens=False
    ).ids  # fmt: skip
    length = min(512, describe(run.checkpoint).dimensions.context_trained)
    texts: Mapping[str, list[Window]] = {text.name: cut_windows(ids, EVALUATION_TOKENS, length=length, name=text.name)}
    if held_out is not None:
        texts = {**texts, "the teacher's own words": [Window(tuple(row.tolist()), 31) for row in held_out.windows]}
    one, other = TransformersModel(teacher, "teacher"), TransformersModel(student, "student")
    for name, windows in texts.items():
        found = compare_models(one, other, windows, run.progress)
        run.comparisons.append(
            Comparison(
                stage=stage,
                text=name,
                tokens=len(found.kl),
                kl_mean=float(found.kl.mean()),
                kl_p99=float(np.quantile(found.kl, 0.99)),
                top1_agreement=float(found.agrees.mean()),
                ppl=float(np.exp(-found.log_probability.mean())),
                ppl_teacher=float(np.exp(-found.log_probability_reference.mean())),
            )
        )
    write_atomically(run.state / _COMPARISONS, json.dumps([item.model_dump() for item in run.comparisons]))
