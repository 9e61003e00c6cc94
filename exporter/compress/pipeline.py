"""The whole way from a teacher to a distilled student on disk; the body of ``compress`` is the list of its stages."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgelm.bundle import file_record
from edgelm.errors import CheckpointError, MissingDependencyError, UsageError
from edgelm.progress import SILENT, Progress
from exporter import tokenizer
from exporter.architectures import describe
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.compress import data, importance, result, surgery
from exporter.compress.data import Corpus
from exporter.compress.fake_quant import FakeQuantizer
from exporter.compress.importance import DepthMeasure, Measure
from exporter.compress.proposal import Proposal, propose
from exporter.compress.result import Comparison, CompressRecord
from exporter.compress.shape import Shape, parameters, row_remarks, shape_of, wanted_shape
from exporter.compress.training import Trainer, TrainingOptions
from exporter.options import ExportOptions
from exporter.quality import Window, compare_models, cut_windows
from exporter.reference import TransformersModel, open_torch_model
from exporter.texts import evaluation_text
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import SourceTokenizer
from targets.profile import load_profile

DeviceChoice = Literal["auto", "cpu", "cuda"]
IMPORTANCE_WINDOWS = 16
EVALUATION_TOKENS = 2000
_HELD_OUT = 8  # windows of the teacher's own words that nobody learns from
_WRITING_BATCH = {"cpu": 16, "cuda": 512}
_OWN_WORDS = "own_words.npy"
_TOOLS = ("edgelm", "torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """What was typed for ``edgelm compress``. None means: as the teacher has it, or not asked for.

    ``target`` with limits chooses ``layers`` and ``neurons`` by prediction. ``heads`` counts attention heads.
    ``texts`` replace the built-in one; ``own_share`` of the training tokens are written by the teacher. ``finish`` is
    the mix (Q4_0, Q4_K_M ...) that the last ``finish_tokens`` are trained for.
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
    seed: int = 0
    device: DeviceChoice = "auto"


@dataclass(frozen=True)
class Student:
    """A finished student: where it lies and what was recorded of it."""

    path: Path
    record: CompressRecord


@dataclass
class _Run:
    """What the stages share."""

    options: CompressOptions
    checkpoint: Checkpoint
    words: SourceTokenizer
    state: Path
    progress: Progress
    comparisons: list[Comparison] = field(default_factory=list)


def proposal(options: CompressOptions, progress: Progress = SILENT) -> tuple[Shape, Shape, Proposal | None, list[str]]:
    """The teacher's shape, the student's, the export it was chosen for, and remarks on its rows; nothing is computed.

    Raises ``UsageError``, ``CheckpointError`` and, when no shape meets the limits, ``DoesNotFitError``.
    """
    _check(options)
    checkpoint = open_checkpoint(open_source(options.source))
    config = _config(checkpoint, progress)
    full, wanted, found = _shape(options, checkpoint, config)
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
    with _state_kept_if_worth_it(state), _models(run, teacher_checkpoint) as (base, teacher):
        full, wanted, _ = _shape(options, checkpoint, base.config)
        _claim_state(run, wanted)
        corpus, held_out = _corpus(run, teacher)
        windows = [row.tolist() for row in corpus.windows[:: max(1, len(corpus.windows) // IMPORTANCE_WINDOWS)]]
        found = importance.measure(
            base, windows[:IMPORTANCE_WINDOWS], wanted, progress, units=options.units, depth=options.depth
        )
        kept = surgery.choose(found, full, wanted)
        student = surgery.cut(base, wanted, kept)
        _compare(run, "pruned", teacher, student, held_out)
        steps = _train(run, teacher, student, corpus, kept.layers)
        if steps:
            _compare(run, "distilled", teacher, student, held_out)
        finished = _finish(run, teacher, student, corpus, kept.layers, held_out) if options.finish else None
        record = _record(run, teacher_checkpoint, (full, wanted), kept.layers, corpus, (base.config, started, finished))
        with result.new_directory(destination, force=force) as staging:
            result.write_student(staging, student, checkpoint, words, record)
    shutil.rmtree(state, ignore_errors=True)
    return Student(destination, record)


@contextmanager
def _state_kept_if_worth_it(state: Path) -> Iterator[None]:
    """On any exception, keep what took long to compute and nothing else."""
    try:
        yield
    except BaseException:
        if not (state / _OWN_WORDS).is_file() and not list(state.glob("*/state.json")):
            shutil.rmtree(state, ignore_errors=True)
        raise


def _check(options: CompressOptions) -> None:
    positive = ("tokens", "length", "batch", "micro_batch", "learning_rate", "temperature", "finish_tokens")
    for name in positive:
        value = getattr(options, name)
        if not value > 0 and not (name == "tokens" and value == 0):
            raise UsageError(f"--{name.replace('_', '-')} must be above zero, not {value}")
    if not 0 <= options.own_share <= 1:
        raise UsageError(f"--own-share is a share from 0 to 1, not {options.own_share}")
    limits = (options.min_decode_tps, options.max_ram_bytes, options.max_artifact_bytes)
    if any(limit is not None for limit in limits) and options.target is None:
        raise UsageError("limits of speed, memory or size need a --target that they hold for")
    if options.target is not None and (options.layers or options.neurons):
        raise UsageError("--target chooses layers and neurons; give it or them, not both")
    for path in options.texts:
        if not path.is_file():
            raise UsageError(f"--text: {path} is no file")


def _device(choice: DeviceChoice) -> str:
    import torch

    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise MissingDependencyError(
            "torch sees no CUDA device here", hint="use --device cpu, or install torch for CUDA"
        )
    return "cuda" if available and choice != "cpu" else "cpu"


def _config(checkpoint: Checkpoint, progress: Progress) -> Any:
    if checkpoint.source.kind == "huggingface":
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(checkpoint.source.path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.source.location}: {str(error).splitlines()[0]}") from error
    with open_torch_model(checkpoint, progress) as model:
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
    device = _device(run.options.device)
    with open_torch_model(run.checkpoint, run.progress) as base:
        _ready(base, device)
        if teacher_checkpoint is run.checkpoint:
            yield base, base
            return
        with open_torch_model(teacher_checkpoint, run.progress) as teacher:
            _ready(teacher, device)
            yield base, teacher


def _ready(model: Any, device: str) -> None:
    model.set_attn_implementation("sdpa")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.to(device)


def _claim_state(run: _Run, wanted: Shape) -> None:
    """Make the state directory this run's own. Raises ``UsageError`` when it is another run's."""
    options = {name: str(value) for name, value in asdict(run.options).items() if name not in ("device", "micro_batch")}
    files = [file_record(path).sha256 for path in run.checkpoint.files]
    document = json.dumps({"options": options, "shape": str(wanted), "source": files}, indent=2)
    path = run.state / "run.json"
    if path.is_file():
        if path.read_text(encoding="utf-8") != document:
            raise UsageError(
                f"{run.state} holds the state of a run with other settings",
                hint="repeat that run's command to go on with it, or remove the directory to start anew",
            )
        return
    run.state.mkdir(parents=True, exist_ok=True)
    path.write_text(document, encoding="utf-8")


def _corpus(run: _Run, teacher: Any) -> tuple[Corpus, Corpus | None]:
    """What the student learns from, and windows of the teacher's own words that are held out."""
    options = run.options
    length = min(options.length, describe(run.checkpoint).dimensions.context_trained)
    corpus = data.from_texts(options.texts or (None,), run.words, length)
    own = round(options.tokens * options.own_share / length)
    if not own:
        return corpus, None
    path = run.state / _OWN_WORDS
    if path.is_file():
        windows = np.load(path, allow_pickle=False)
        written = Corpus(windows, (f"the teacher's own words: {windows.size} tokens, temperature 1",))
    else:
        batch = _WRITING_BATCH[teacher.device.type]
        written = data.own_words(teacher, own + _HELD_OUT, length, batch, options.seed, run.progress)
        np.save(path, written.windows)
    held_out = Corpus(written.windows[:_HELD_OUT], ())
    learned = Corpus(written.windows[_HELD_OUT:], written.sources)
    if options.own_share == 1:
        return learned, held_out
    # Texts are repeated or thinned so that the shares are as asked for.
    wanted = max(1, round(own * (1 - options.own_share) / options.own_share))
    chosen = np.random.default_rng(options.seed).permutation(np.resize(np.arange(len(corpus.windows)), wanted))
    return data.together(learned, Corpus(corpus.windows[chosen], corpus.sources)), held_out


def _train(run: _Run, teacher: Any, student: Any, corpus: Corpus, layers: tuple[int, ...]) -> int:
    steps = run.options.tokens // (run.options.batch * int(corpus.windows.shape[1]))
    if steps:
        trainer = Trainer(teacher, student, corpus, _training(run.options, steps, layers), run.state / "distil")
        trainer.run(run.progress)
    return steps


def _training(options: CompressOptions, steps: int, layers: tuple[int, ...], rate: float = 1.0) -> TrainingOptions:
    return TrainingOptions(
        steps=steps,
        batch=options.batch,
        micro_batch=min(options.micro_batch, options.batch),
        learning_rate=options.learning_rate * rate,
        temperature=options.temperature,
        hidden_weight=options.hidden_weight,
        attention_weight=options.attention_weight,
        matched=layers,
        seed=options.seed,
    )


def _finish(
    run: _Run, teacher: Any, student: Any, corpus: Corpus, layers: tuple[int, ...], held_out: Corpus | None
) -> str:
    """Train on through the types that an export by ``--quant`` would give each tensor; what they are, in words."""
    from exporter.pipeline import prepare

    options = run.options
    assert options.finish is not None
    directory = run.state / "unfinished"
    _save_plain(run, student, directory)
    plan = prepare(ExportOptions(source=str(directory), format="gguf", quant=options.finish), run.progress).plan
    types = {item.source_name: item.type for item in plan.tensors if item.type not in ("F32", "F16", "BF16")}
    quantizer = FakeQuantizer(student, types)
    with quantizer.applied():
        _compare(run, f"quantised to {plan.quant}", teacher, student, held_out)
    steps = max(1, options.finish_tokens // (options.batch * corpus.windows.shape[1]))
    training = _training(options, steps, layers, rate=0.25)
    Trainer(teacher, student, corpus, training, run.state / "finish", quantizer).run(run.progress)
    with quantizer.applied():
        _compare(run, f"finished for {plan.quant}", teacher, student, held_out)
    return plan.quant


def _save_plain(run: _Run, student: Any, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    student.save_pretrained(directory, safe_serialization=True)
    result.write_tokenizer(directory, run.checkpoint, run.words)


def _compare(run: _Run, stage: str, teacher: Any, student: Any, held_out: Corpus | None) -> None:
    """Add a row for each evaluation text."""
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


def _record(
    run: _Run, teacher: Checkpoint, shapes: tuple[Shape, Shape], layers: tuple[int, ...], corpus: Corpus,
    rest: tuple[Any, float, str | None],
) -> CompressRecord:  # fmt: skip
    config, started, finished = rest
    options = run.options
    names = (
        "batch",
        "learning_rate",
        "temperature",
        "hidden_weight",
        "attention_weight",
        "own_share",
        "seed",
        "length",
    )
    return CompressRecord(
        teacher=teacher.source.location,
        teacher_files=tuple(file_record(path) for path in teacher.files),
        shape_teacher=str(shapes[0]),
        shape=str(shapes[1]),
        parameters_teacher=parameters(config, shapes[0]),
        parameters=parameters(config, shapes[1]),
        layers_kept=layers,
        measured_by=f"{options.units} (layers: {options.depth})",
        data=corpus.sources,
        data_sha256=corpus.sha256,
        tokens=options.tokens + (options.finish_tokens if finished else 0),
        settings={name: getattr(options, name) for name in names},
        trained_for=finished,
        comparisons=tuple(run.comparisons),
        elapsed_s=time.monotonic() - started,
        tool_versions={tool: version(tool) for tool in _TOOLS},
    )
