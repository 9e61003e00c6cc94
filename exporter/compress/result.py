"""The student on disk: a Hugging Face directory with a model card that says how it was made and what it lost.

``compress.json`` holds the same as a table for programs, ``training.jsonl`` the curve of training. The directory
appears complete or not at all. Does not know how any figure was measured.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter

from edgelm.bundle import FileRecord, Record
from edgelm.errors import CheckpointError, UsageError
from exporter.architectures.shared.encoders import sentence_files
from exporter.checkpoint import Checkpoint, finished_name
from exporter.compress.anatomy import ANATOMIES
from exporter.compress.grid import Grid
from exporter.compress.vocabulary import VocabularyCut, rewrite
from exporter.given_types import STUDENT_RECORD
from exporter.safetensors_header import FINISHED
from exporter.tokenizer import SourceTokenizer

RECORD_NAME, CURVE_NAME = STUDENT_RECORD, "training.jsonl"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class Comparison(Record):
    """A student beside its teacher on one text: mean KL in nats per token, share of equal likeliest tokens.

    Once the vocabulary is cut, the text is in the tokens that stayed, and so are the teacher's predictions that KL and
    perplexities count: what it gave to other tokens is shared among these. Bits per byte of text count everything, the
    teacher's by all of its tokens; None where tokens need not be text.
    """

    stage: str
    text: str
    tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    ppl: float
    ppl_teacher: float
    bits_per_byte: float | None = None
    bits_per_byte_teacher: float | None = None


class VectorComparison(Record):
    """An encoder's vectors beside its teacher's for the same passages, as ``EmbeddingQuality`` has them."""

    stage: str
    text: str
    texts: int
    tokens: int
    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    error_max: float
    nearest_agreement: float


Row = Comparison | VectorComparison
ROW: TypeAdapter[Row] = TypeAdapter(Row)


class CompressRecord(Record):
    """Everything that a student was made from and by. ``source`` was pruned; it often is its own teacher."""

    teacher: str
    teacher_files: tuple[FileRecord, ...]
    source: str
    source_files: tuple[FileRecord, ...]
    shape_teacher: str
    shape_source: str
    shape: str
    parameters_teacher: int
    parameters: int
    layers_kept: tuple[int, ...]
    vocabulary: int
    zeros: float | None
    """The share of zeros in the matrices of layers, where it was asked for."""
    measured_by: str
    data: tuple[str, ...]
    data_sha256: str
    tokens: int
    settings: dict[str, Any]
    trained_for: str | None
    types: dict[str, str] | None
    """By GGUF name, what it was trained for: ``edgelm export --types-from`` takes them."""
    remarks: tuple[str, ...]
    comparisons: tuple[Row, ...]
    elapsed_s: float
    tool_versions: dict[str, str]


@contextmanager
def new_directory(destination: Path, *, force: bool) -> Iterator[Path]:
    """A temporary directory that becomes ``destination`` when the block ends well.

    With ``force`` an earlier student is replaced, nothing else. Raises ``UsageError`` or ``CheckpointError``.
    """
    check_destination(destination, force=force)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {destination.parent}: {error.strerror}") from error
    try:
        yield staging
        staging.chmod(0o755)
        if destination.exists():
            old = staging.with_suffix(".old")
            destination.rename(old)
            staging.rename(destination)
            shutil.rmtree(old, ignore_errors=True)
        else:
            staging.rename(destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse early what ``new_directory`` would refuse. Raises ``UsageError``."""
    if not destination.exists():
        return
    if not force:
        raise UsageError(f"{destination} exists", hint="choose another output or add --force to replace it")
    if not (destination / RECORD_NAME).is_file():
        raise UsageError(f"{destination} exists and was not made by edgelm compress, so --force does not replace it")


def write_student(
    directory: Path,
    student: Any,
    checkpoint: Checkpoint,
    words: SourceTokenizer,
    record: CompressRecord,
    cut: VocabularyCut | None = None,
    stored: Mapping[str, Grid] = MappingProxyType({}),
) -> None:
    """Weights (bfloat16, or float32 after training for a quantisation), tokenizer, record and model card.

    With ``cut`` the student has the rows that stayed, and its files get the new ids. ``stored`` are parameters as
    types store them, which an export copies, but for tables that have lost rows since.
    """
    import torch
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    student.to(torch.float32 if record.trained_for else torch.bfloat16)
    student.config.dtype = student.dtype
    if checkpoint.source.kind == "gguf":  # whose configuration was made up from its dimensions
        for name in ("bos", "eos"):
            setattr(student.config, f"{name}_token_id", words.gguf_metadata.get(f"tokenizer.ggml.{name}_token_id"))
    if hasattr(student, "generation_config"):
        student.generation_config = GenerationConfig()  # the teacher's file replaces it
    student.save_pretrained(directory, safe_serialization=True)
    shapes = {name: tuple(item.shape) for name, item in student.named_parameters()}
    whole = {name: grid for name, grid in stored.items() if shapes[name] == (len(grid.stored), grid.columns)}
    if whole:
        save_file({finished_name(grid.kind, name): grid.stored for name, grid in whole.items()}, directory / FINISHED)
    write_tokenizer(directory, checkpoint, words)
    if cut is not None:
        rewrite(directory, cut)
    (directory / RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(model_card(directory.name, record), encoding="utf-8")


def write_curve(directory: Path, curve: Sequence[Mapping[str, Any]]) -> None:
    """Every step of training as JSON lines: stage, step, loss, KL in nats per token, learning rate."""
    lines = "".join(json.dumps(item) + "\n" for item in curve)
    (directory / CURVE_NAME).write_text(lines, encoding="utf-8")


def write_tokenizer(directory: Path, checkpoint: Checkpoint, words: SourceTokenizer) -> None:
    """The tokenizer's files as the source has them, and those that say how an encoder's tokens become a vector."""
    if checkpoint.source.kind == "huggingface":
        source = checkpoint.source.path
        anatomy = ANATOMIES.get(checkpoint.architecture)
        further = sentence_files(source) if anatomy is not None and anatomy.encoder else ()
        for path in (*(source / name for name in _TOKENIZER_FILES if (source / name).is_file()), *further):
            target = directory / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        return
    metadata = words.gguf_metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            settings[f"{name}_token"] = tokens[index]
    if words.chat_template is not None:
        settings["chat_template"] = words.chat_template
    (directory / "tokenizer.json").write_text(words.tokenizer_json, encoding="utf-8")
    for name, document in (("tokenizer_config.json", settings), ("generation_config.json", words.generation_config)):
        (directory / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(name: str, record: CompressRecord) -> str:
    """The README of a student: its teacher, each step, the data with hashes, and what was lost."""
    settings = "\n".join(f"| {key} | {value} |" for key, value in record.settings.items())
    named = [(record.source, item) for item in record.source_files]
    if record.teacher != record.source:
        named += [(record.teacher, item) for item in record.teacher_files]
    files = "\n".join(f"- {whose}: `{item.name}` {item.sha256}" for whose, item in named)
    data = "\n".join(f"- {item}" for item in record.data) or "- none: pruned only"
    remarks = "".join(f"\n- {item}" for item in record.remarks)
    finish = f"\nThe weights were finished for {record.trained_for}.\n" if record.trained_for else ""
    return f"""# {name}

{record.shape}, {record.vocabulary} tokens: {record.parameters / 1e6:.1f} M parameters.
Pruned with EdgeLM from {record.source}
({record.shape_source}) and distilled from {record.teacher}
({record.shape_teacher}: {record.parameters_teacher / 1e6:.1f} M).
Layers of {record.source} that stayed: {", ".join(map(str, record.layers_kept))}.
Units were chosen by {record.measured_by}.
{finish}{remarks}

## Beside the teacher

{_table(record.comparisons)}

## Training

{record.tokens} tokens in {record.elapsed_s:.0f} s, over data with the SHA-256 {record.data_sha256}:

{data}

| setting | value |
|---|---|
{settings}

## Made from (SHA-256)

{files}
"""


def figures(comparisons: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of a table of comparisons, all of one kind."""
    if all(isinstance(item, VectorComparison) for item in comparisons):
        headings: tuple[str, ...] = (
            "stage", "text", "passages", "mean cosine", "p1", "lowest", "same nearest passage",
        )  # fmt: skip
    else:
        headings = (
            "stage", "text", "tokens", "mean KL (nats)", "p99 KL", "same top token", "perplexity", "teacher's",
            "bits per byte", "teacher's",
        )  # fmt: skip
    return headings, [_figures(item) for item in comparisons]


def _figures(item: Row) -> tuple[str, ...]:
    if isinstance(item, VectorComparison):
        cosines = (f"{value:.4f}" for value in (item.cosine_mean, item.cosine_p1, item.cosine_min))
        return (item.stage, item.text, str(item.texts), *cosines, f"{item.nearest_agreement:.1%}")
    return (
        item.stage, item.text, str(item.tokens), f"{item.kl_mean:.4f}", f"{item.kl_p99:.3f}",
        f"{item.top1_agreement:.1%}", f"{item.ppl:.3f}", f"{item.ppl_teacher:.3f}",
        *("-" if bits is None else f"{bits:.4f}" for bits in (item.bits_per_byte, item.bits_per_byte_teacher)),
    )  # fmt: skip


def _table(comparisons: Sequence[Row]) -> str:
    headings, rows = figures(comparisons)
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
