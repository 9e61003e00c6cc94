"""Checkpoints with a task of their own: which task, its plan, its words, and its files, all through optimum.

Encoder-decoders (Marian, T5) translate; BERT and its kin with a head fill masks or give labels. Knows no proofs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgelm.bundle import Choice, ExportPlan, Seq2SeqRecord, TaskKind, TaskRecord, TokenIdentity
from edgelm.errors import CheckpointError, DoesNotFitError, ProofError, UsageError
from edgelm.progress import Progress
from exporter import optimum_plan
from exporter.checkpoint import Checkpoint
from exporter.gguf import write_errors
from exporter.optimum_bundle import ARTIFACT, keep_outputs, text_notes
from exporter.optimum_graphs import Task, draw_graphs, open_task_model, require_optimum
from exporter.optimum_weights import round_weights, rounding_named, store_graphs
from exporter.options import ExportOptions
from exporter.plan import Candidate, choose, missed_limits
from exporter.seq2seq_graphs import joined_graphs
from exporter.token_identity import compare_files, open_tokenizer
from exporter.tokenizer import read_tokenizer
from exporter.tokenizer_marian import is_marian, prove_marian, read_marian
from runtime.engines.onnx_seq2seq import READER, WRITER
from runtime.tasks import HEAD
from targets.predict import RunSettings, predict
from targets.profile import TargetProfile
from targets.workload import TypedWeights, Workload

DECODER, TOKENIZER, TARGET_TOKENIZER = "decoder.onnx", "tokenizer.json", "tokenizer_target.json"
TASKS: Mapping[TaskKind, Task] = {
    "translate": "text2text-generation-with-past",
    "fill-mask": "fill-mask",
    "classify": "text-classification",
}
_WRITERS = frozenset({"t5", "marian"})
_READERS = frozenset({"bert", "distilbert", "roberta", "xlm-roberta", "camembert"})
_DEFAULT_CONTEXT = 512
_DEFAULT_WRITTEN = 256


@dataclass(frozen=True)
class Words:
    """The tokenizer files of a bundle, and what is known of ids."""

    files: Mapping[str, str]
    vocabulary: int
    unknown: int | None


def task_of(checkpoint: Checkpoint, options: ExportOptions) -> TaskKind | None:
    """The task that an export is for; None for decoders and for models that make vectors of texts.

    A head counts with ``--format onnx`` only, and not in a checkpoint that says how its vectors are pooled.
    """
    if checkpoint.source.kind != "huggingface":
        return None
    if checkpoint.architecture in _WRITERS:
        return "translate"
    named = checkpoint.config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if checkpoint.architecture not in _READERS or options.format != "onnx":
        return None
    if (checkpoint.source.path / "modules.json").is_file():
        return None
    if name.endswith("ForMaskedLM"):
        return "fill-mask"
    return "classify" if name.endswith("ForSequenceClassification") else None


def plans(options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile) -> list[ExportPlan]:
    """What the export could become: as asked for, or all that ``--quant auto`` chooses from, most bits first.

    Raises ``UsageError`` for options that make no sense here and ``CheckpointError``.
    """
    if options.format == "gguf":
        raise UsageError(f"{checkpoint.source.location} becomes ONNX only", hint="use --format onnx")
    for name, given in (
        ("--type", bool(options.type_overrides)),
        ("--max-kl", options.max_kl is not None),
        ("--min-decode-tps", options.min_decode_tps is not None),
        ("--min-prefill-tps", options.min_prefill_tps is not None),
        ("--calibration", options.calibration is not None),
    ):
        if given:
            raise UsageError(f"{name} is for models that continue texts", hint="leave it out")
    require_optimum()
    names = optimum_plan.CANDIDATES if options.quant.lower() == "auto" else (options.quant,)
    return [_plan(options, name, checkpoint, profile) for name in names]


def choices(
    options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile
) -> tuple[list[Candidate], Candidate | None, DoesNotFitError | None]:
    """The plans and whether they keep all limits, and either the best of them or why there is none."""
    found = []
    for plan in plans(options, checkpoint, profile):
        missed = missed_limits(options, plan)
        found.append(Candidate(plan, not missed, "; ".join(missed) or plan.predicted.fit_reason))
    try:
        return found, choose(found, profile), None
    except DoesNotFitError as error:
        return found, None, error


def resolve(options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile) -> ExportPlan:
    """The plan of an export. Raises ``DoesNotFitError`` and what ``plans`` raises."""
    found, best, error = choices(options, checkpoint, profile)
    if error is not None or best is None:
        raise error or DoesNotFitError(found[0].reason)
    # What was asked for by name was not chosen, and gets no note that says so.
    return best.plan if options.quant.lower() == "auto" else found[0].plan


def _plan(options: ExportOptions, quant: str, checkpoint: Checkpoint, profile: TargetProfile) -> ExportPlan:
    rounding = rounding_named(quant)
    headers = checkpoint.tensors.values()
    tensors = optimum_plan.tensor_plans(((item.name, item.name, item.shape) for item in headers), rounding)
    parameters = sum(prod(item.shape) for item in tensors)
    size_bytes = sum(item.size_bytes for item in tensors)
    groups: dict[str, tuple[int, int]] = {}
    for item in tensors:
        count, held = groups.get(item.type, (0, 0))
        groups[item.type] = (count + prod(item.shape), held + item.size_bytes)
    trained = context_of(checkpoint)
    context = options.context or trained
    if context > trained:
        raise UsageError(f"--context {context} is more than the {trained} tokens that the model reads")
    workload = Workload(
        format="onnx",
        architecture=checkpoint.architecture,
        parameters=parameters,
        file_bytes=size_bytes + optimum_plan.GRAPH_BYTES,
        weights=tuple(TypedWeights(name, *sizes) for name, sizes in groups.items()),
        lookup=None,
        layers=_first(checkpoint.config, "num_layers", "encoder_layers", "num_hidden_layers", "n_layers"),
        hidden=_first(checkpoint.config, "d_model", "hidden_size", "dim"),
        vocabulary=_first(checkpoint.config, "vocab_size"),
        kv_elements_per_token=_cached_elements(checkpoint.config) if checkpoint.architecture in _WRITERS else 0,
    )
    # Memory is that of any model; how long a text takes depends on what is written, which nobody knows beforehand.
    speeds = ("prefill_tps", "prefill_tps_band", "decode_tps", "decode_tps_band")
    predicted = predict(workload, profile, RunSettings(context=context)).model_copy(update=dict.fromkeys(speeds))
    return ExportPlan(
        target=profile.label,
        format="onnx",
        quant=rounding.name,
        architecture=checkpoint.architecture,
        parameters=parameters,
        bits_per_weight=8 * size_bytes / parameters,
        artifact_bytes=workload.file_bytes,
        context=Choice(value=context, reason="asked for" if options.context else "tokens that the model reads"),
        threads_decode=profile.threads_decode,
        threads_prefill=profile.threads_prefill,
        tensors=tensors,
        predicted=predicted,
    )


def _cached_elements(config: Mapping[str, Any]) -> int:
    """Keys and values that a decoder holds for a token read and one written, which is twice there while it is appended.

    With it, 174, 96 and 92 MB that a random T5 of 30 M parameters took in fp32, int8-32 and int8 were predicted as
    171, 86 and 83.
    """
    width = _first(config, "num_heads") * _first(config, "d_kv") if "d_kv" in config else _first(config, "d_model")
    return 3 * 2 * _first(config, "decoder_layers", "num_decoder_layers", "num_layers") * width


def context_of(checkpoint: Checkpoint) -> int:
    """Tokens of one text. T5 has no limit of its own, it was trained on so many."""
    value = checkpoint.config.get("max_position_embeddings", checkpoint.config.get("n_positions"))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**24:
        return _DEFAULT_CONTEXT
    # Rows up to the one of padding are not for tokens.
    padded = checkpoint.architecture in ("roberta", "xlm-roberta", "camembert")
    return value - 1 - _first(checkpoint.config, "pad_token_id") if padded else value


def _first(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise CheckpointError(f"config.json has no {' or '.join(names)} that is a count")


def load_words(checkpoint: Checkpoint) -> Words:
    """The tokenizer in the form of the runtime. Raises ``CheckpointError``."""
    rows = _first(checkpoint.config, "vocab_size")
    if is_marian(checkpoint.source.path):
        marian = read_marian(checkpoint.source.path)
        if marian.vocabulary != rows:
            raise CheckpointError(
                f"{checkpoint.source.location}: vocab.json has {marian.vocabulary} tokens, the embedding {rows} rows"
            )
        return Words({TOKENIZER: marian.source_json, TARGET_TOKENIZER: marian.target_json}, rows, marian.unknown)
    words = read_tokenizer(checkpoint)
    if len(words.gguf_metadata["tokenizer.ggml.tokens"]) > rows:
        raise CheckpointError(f"{checkpoint.source.location}: the tokenizer has more tokens than the model has rows")
    return Words({TOKENIZER: words.tokenizer_json}, rows, None)


def prove_words(checkpoint: Checkpoint, staging: Path) -> TokenIdentity:
    """Whether the bundle's words are the checkpoint's. Raises ``ProofError`` when they are not."""
    if is_marian(checkpoint.source.path):
        identity = prove_marian(checkpoint.source.path, read_marian(checkpoint.source.path))
    else:
        identity = compare_files(read_tokenizer(checkpoint).tokenizer_json, staging / TOKENIZER)
    if not identity.identical:
        raise ProofError(f"the bundle's tokenizer gives other ids than the source's: {identity.first_difference}")
    return identity


def record_of(checkpoint: Checkpoint, kind: TaskKind, words: Words) -> TaskRecord:
    """What the runtime has to know of the task. Raises ``CheckpointError`` for what it cannot do."""
    if kind == "translate":
        seq2seq = _seq2seq(checkpoint, words)
        return TaskRecord(kind=kind, seq2seq=seq2seq, vocabulary=words.vocabulary, unknown_token=words.unknown)
    if kind == "fill-mask":
        tokenizer = open_tokenizer(words.files[TOKENIZER], TOKENIZER)
        mask = next((tokenizer.token_to_id(name) for name in ("[MASK]", "<mask>") if tokenizer.token_to_id(name)), None)
        if mask is None:
            raise CheckpointError(f"{checkpoint.source.location}: its tokenizer has no token for a masked word")
        return TaskRecord(kind=kind, mask_token=mask, vocabulary=words.vocabulary)
    table = checkpoint.config.get("id2label")
    labels = tuple(str(table[key]) for key in sorted(table, key=int)) if isinstance(table, Mapping) and table else ()
    problem = checkpoint.config.get("problem_type")
    if problem == "regression" or len(labels) == 1:
        raise CheckpointError(f"{checkpoint.source.location} gives numbers, not labels, which is not supported")
    labels = labels or ("LABEL_0", "LABEL_1")  # what transformers assumes
    multiple = problem == "multi_label_classification"
    return TaskRecord(kind=kind, labels=labels, multi_label=multiple, vocabulary=words.vocabulary)


def generation_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json, with generation_config.json over it."""
    path = checkpoint.source.path / "generation_config.json"
    own: Any = {}
    if path.is_file():
        try:
            own = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    return {**checkpoint.config, **(own if isinstance(own, dict) else {})}


def _seq2seq(checkpoint: Checkpoint, words: Words) -> Seq2SeqRecord:
    settings, where = generation_settings(checkpoint), checkpoint.source.location

    def token(name: str) -> int | None:
        value = settings.get(name)
        if value is not None and not (isinstance(value, int) and 0 <= value < words.vocabulary):
            raise CheckpointError(f"{where}: {name} is {value!r}, which is no token")
        return value

    ends = settings.get("eos_token_id")
    listed = tuple(ends) if isinstance(ends, list) else (ends,)
    start = token("decoder_start_token_id")
    if start is None or not all(isinstance(end, int) and 0 <= end < words.vocabulary for end in listed):
        raise CheckpointError(f"{where} does not say how an answer begins or ends")
    banned = settings.get("bad_words_ids") or []
    if not all(isinstance(item, list) and len(item) == 1 and isinstance(item[0], int) for item in banned):
        raise CheckpointError(f"{where}: bad_words_ids has words of several tokens, which is not supported")
    longest = settings.get("max_new_tokens") or settings.get("max_length")
    usual = longest - 1 if isinstance(longest, int) and longest > 20 else _DEFAULT_WRITTEN  # 20 means: not set
    # Learned positions end where the table does.
    limit = context_of(checkpoint) if checkpoint.architecture == "marian" else 2**16
    return Seq2SeqRecord(
        decoder=DECODER,
        target_tokenizer=TARGET_TOKENIZER if TARGET_TOKENIZER in words.files else None,
        start_token=start,
        first_token=token("forced_bos_token_id"),
        end_tokens=listed,
        suppressed=tuple(item[0] for item in banned),
        max_tokens=min(usual, limit),
    )


def write_task(
    staging: Path, checkpoint: Checkpoint, kind: TaskKind, plan: ExportPlan, words: Words, progress: Progress
) -> Path:
    """Write graphs, weights and tokenizers; the artefact's path. Raises ``CheckpointError`` and ``BundleError``."""
    with open_task_model(checkpoint, TASKS[kind], progress) as model:
        graphs = draw_graphs(model, TASKS[kind], checkpoint, progress)
    counts = (words.vocabulary, int(plan.context.value), context_of(checkpoint))
    if kind == "translate":
        reader, writer = joined_graphs(graphs, checkpoint.source.location)
        drawn, forms = {ARTIFACT: reader, DECODER: writer}, {ARTIFACT: READER, DECODER: WRITER}
    else:
        keep_outputs(graphs["model"], ("logits",), checkpoint)
        drawn, forms = {ARTIFACT: graphs["model"]}, {ARTIFACT: HEAD}
    rounding = rounding_named(plan.quant)
    with progress.stage("rounding", len(drawn)) as stage:
        for name in drawn:
            drawn[name] = round_weights(drawn[name], rounding)
            stage.advance()
    notes = {name: text_notes(form, checkpoint, plan, counts) for name, form in forms.items()}
    store_graphs(staging, drawn, notes)
    for name, text in words.files.items():
        with write_errors(staging / name):
            (staging / name).write_text(text, encoding="utf-8")
    return staging / ARTIFACT
