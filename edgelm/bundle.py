"""The bundle: a directory with one model artefact and everything needed to run, judge and reproduce it.

``manifest.json`` names every other file with its size and SHA-256. A bundle is written into a temporary sibling and
renamed into place, so a half bundle never exists under its name. This module knows the format and nothing of how an
artefact is made or run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgelm.errors import BundleError, EdgelmError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MANIFEST_LIMIT_BYTES = 16 * 2**20
_PIECE_BYTES = 2**20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

Format = Literal["gguf", "onnx"]
Pooling = Literal["mean", "cls", "last"]
"""How the vectors of all tokens become one: their mean, the first token's or the last one's."""
TaskKind = Literal["translate", "fill-mask", "classify"]
"""``translate`` is every encoder-decoder: translation, summaries, whatever text it writes for a text."""


class Record(BaseModel):
    """Base of everything that is stored as JSON: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(Record):
    """One file: plain name, size and SHA-256 (hex)."""

    name: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SourceRecord(Record):
    """Where the weights came from. ``location`` is a hub id, ``demo:NAME`` or the last part of a local path."""

    kind: Literal["huggingface", "gguf"]
    location: str
    revision: str | None = None
    architecture: str
    parameters: int = Field(ge=0)
    files: tuple[FileRecord, ...]


class TensorPlan(Record):
    """What becomes of one tensor. ``shape`` is row-major as in the source (rows first, row length last)."""

    name: str
    source_name: str
    shape: tuple[int, ...]
    type: str
    size_bytes: int = Field(ge=0)
    reason: str


class Choice(Record):
    """A value that was decided for the user, with the reason that is shown to them."""

    value: int | float | str
    reason: str


class RamParts(Record):
    """Predicted or measured resident memory by purpose, in bytes."""

    weights_bytes: int
    repack_bytes: int
    kv_bytes: int
    compute_bytes: int
    process_bytes: int


class Prediction(Record):
    """What a target is expected to reach. Rates in tokens per second, ``*_band`` the 80 % interval when known.

    ``load_warm_s`` is loading a file that is in the page cache, ``load_cold_s`` one that comes from storage; None where
    it is not predicted or the rate of the storage is not known.
    """

    target: str
    ram_bytes: int
    ram_parts: RamParts
    prefill_tps: float | None
    decode_tps: float | None
    prefill_tps_band: tuple[float, float] | None = None
    decode_tps_band: tuple[float, float] | None = None
    load_warm_s: float | None = None
    load_cold_s: float | None = None
    fits: Literal["fits", "pages", "no"]
    fit_reason: str


class ModelShape(Record):
    """What prediction needs of a model beside its tensors, so that a bundle can be judged for any other target.

    ``lookup_tensor`` names the planned tensor of which one row per token is read (an untied token embedding), None
    when the embedding is the head as well. ``kv_elements_per_token`` counts keys and values of all layers.
    """

    layers: int = Field(ge=0)
    hidden: int = Field(ge=0)
    vocabulary: int = Field(ge=0)
    kv_elements_per_token: int = Field(ge=0)
    lookup_tensor: str | None = None


class CalibrationRecord(Record):
    """The text that types were measured on: its name, SHA-256 and the number of tokens read."""

    text: str
    text_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tokens: int = Field(ge=0)


class ExportPlan(Record):
    """Everything that was decided before the first byte was written. Kept verbatim in the manifest.

    ``quant`` is the mix or type that was asked for or chosen (``Q4_K_M``), ``tensors`` what it really means here.
    ``bits_per_weight`` counts all stored tensor bytes over all parameters. ``predicted_kl`` (nats per token) and
    ``calibration`` are known when types were chosen by measured damage.
    """

    target: str
    format: Format
    quant: str
    architecture: str
    parameters: int
    bits_per_weight: float
    artifact_bytes: int
    context: Choice
    threads_decode: Choice
    threads_prefill: Choice
    tensors: tuple[TensorPlan, ...]
    predicted: Prediction
    shape: ModelShape | None = None
    notes: tuple[str, ...] = ()
    predicted_kl: float | None = None
    calibration: CalibrationRecord | None = None

    @property
    def type_counts(self) -> dict[str, int]:
        """Number of tensors per type, most frequent first."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


class TokenIdentity(Record):
    """Outcome of encoding a hard corpus with the source tokenizer and with the artefact's own."""

    identical: bool
    texts: int
    tokens: int
    first_difference: str | None = None


class TensorDamage(Record):
    """The KL that one tensor's type is estimated to cause, in nats per token."""

    name: str
    type: str
    kl: float


class ChatProof(Record):
    """A bundle's prompts beside those of its source, all alike or there is no bundle; and one answer of the artefact.

    ``compared_with`` rendered the conversations for the source. ``answer`` is greedy; ``stopped`` tells whether the
    model ended it, or the limit on its length did.
    """

    compared_with: str
    conversations: int
    prompt: str
    answer: str
    answer_tokens: int
    stopped: bool


class Quality(Record):
    """The artefact against the unquantised model on evaluation text, in lockstep.

    ``kl_*`` in nats per token, KL(reference || artefact); perplexities over the same positions. Intervals are the
    95 % ones of the mean over windows of text. ``worst_tensors`` are estimates, worst first, when types were measured.
    ``chat`` is None for models without a chat template. ``computed_by`` tells what computed the artefact where a GPU
    was asked for, None is the CPU.
    """

    reference: str
    computed_by: str | None = None
    text: str
    text_sha256: str
    tokens: int
    kl_mean: float
    kl_mean_interval: tuple[float, float] | None = None
    kl_p90: float | None = None
    kl_p99: float
    kl_max: float
    top1_agreement: float
    ppl: float
    ppl_interval: tuple[float, float] | None = None
    ppl_reference: float
    worst_tensors: tuple[TensorDamage, ...] = ()
    chat: ChatProof | None = None
    token_identity: TokenIdentity


class EncoderRecord(Record):
    """What an encoder makes of a text: one vector of ``dimensions`` numbers, scaled to length one if ``normalized``."""

    pooling: Pooling
    normalized: bool
    dimensions: int = Field(gt=0)


class EmbeddingQuality(Record):
    """Vectors of an encoder's artefact beside those of the unquantised model, for the same texts and token ids.

    Cosines are between the two vectors of each text. ``error_max`` is the largest difference of any number of a vector,
    both scaled to length one. ``nearest_agreement`` is the share of texts whose nearest other text is the same one.
    ``computed_by`` is that of ``Quality``.
    """

    reference: str
    computed_by: str | None = None
    text: str
    text_sha256: str
    texts: int
    tokens: int
    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    error_max: float
    nearest_agreement: float
    token_identity: TokenIdentity


class Seq2SeqRecord(Record):
    """How an encoder-decoder is run beside what its graphs say.

    ``decoder`` is the graph that writes, the artefact reads. ``target_tokenizer`` is the file of the words written,
    where they are others than those read. ``start_token`` begins every answer, ``first_token`` follows if there is one,
    ``end_tokens`` end it; ``suppressed`` ones are never written.
    """

    decoder: str
    target_tokenizer: str | None = None
    start_token: int = Field(ge=0)
    first_token: int | None = Field(default=None, ge=0)
    end_tokens: tuple[int, ...]
    suppressed: tuple[int, ...] = ()
    max_tokens: int = Field(gt=0)


class TaskRecord(Record):
    """What a model does with a text that is neither to go on with it nor a vector.

    ``unknown`` and above: ids that only the tokenizer knows; the model reads ``unknown_token`` there. ``mask_token`` is
    what fill-mask replaces, ``labels`` are those of a classifier, independent of each other if ``multi_label``.
    """

    kind: TaskKind
    mask_token: int | None = Field(default=None, ge=0)
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    seq2seq: Seq2SeqRecord | None = None
    vocabulary: int = Field(gt=0)
    unknown_token: int | None = Field(default=None, ge=0)


class TaskQuality(Record):
    """What an artefact does with texts beside the unquantised model.

    ``agreement`` is the share of texts with the same outcome: the same greedy answer, the same likeliest word at the
    mask, the same label. ``kl_*`` in nats per prediction, KL(reference || artefact) over words or labels;
    ``top1_agreement`` is the share of predictions with the same first choice.
    """

    reference: str
    text: str
    text_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    texts: int
    predictions: int
    agreement: float
    top1_agreement: float
    kl_mean: float
    kl_max: float
    token_identity: TokenIdentity


class FormatCandidate(Record):
    """One of the formats that ``--format auto`` made on this machine.

    ``failed`` tells why there is no artefact of it, or why it was not measured. ``prefill_tps`` and ``decode_tps`` have
    one median per process, in the order of the processes; none where the mean KL decided.
    """

    format: Format
    quant: str
    artifact_bytes: int | None = None
    kl_mean: float | None = None
    prefill_tps: tuple[float, ...] = ()
    decode_tps: tuple[float, ...] = ()
    failed: str | None = None


class FormatContest(Record):
    """How ``--format auto`` was decided by measuring; ``kl_limit`` is the mean KL up to which speed decides."""

    reason: str
    kl_limit: float
    candidates: tuple[FormatCandidate, ...]


class Manifest(Record):
    """``manifest.json``. Raises no errors of its own; ``read_manifest`` maps validation failures.

    ``encoder`` is set for models that make vectors of texts, ``task`` for those with another task than to go on with a
    text. Theirs are ``embedding_quality`` and ``task_quality``, ``quality`` is that of models that predict tokens.
    ``contest`` is there when the format was chosen by measuring.
    """

    schema_version: Literal[1] = 1
    name: str
    created: str
    format: Format
    artifact: str
    source: SourceRecord
    plan: ExportPlan
    quality: Quality | None
    files: tuple[FileRecord, ...]
    tool_versions: dict[str, str]
    encoder: EncoderRecord | None = None
    embedding_quality: EmbeddingQuality | None = None
    task: TaskRecord | None = None
    task_quality: TaskQuality | None = None
    contest: FormatContest | None = None

    @property
    def proof(self) -> Quality | EmbeddingQuality | TaskQuality | None:
        """What was measured of the artefact, whichever kind of model it is; None when the proof was left out."""
        return self.task_quality or self.embedding_quality or self.quality

    @property
    def artifact_bytes(self) -> int:
        """Size of the artefact with the data files that belong to it (``model.onnx.data``)."""
        belonging = f"{self.artifact}."
        graphs = {self.artifact}
        if self.task is not None and self.task.seq2seq is not None:
            graphs.add(self.task.seq2seq.decoder)
        return sum(item.size_bytes for item in self.files if item.name in graphs or item.name.startswith(belonging))


class Bundle(Record):
    """An opened bundle: its directory and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def artifact_path(self) -> Path:
        return self.path / self.manifest.artifact

    def file(self, name: str) -> Path | None:
        """Path of a file that the manifest lists, None when the bundle has no such file."""
        return self.path / name if any(record.name == name for record in self.manifest.files) else None


def file_record(path: Path, *, stopped: Callable[[], bool] = lambda: False) -> FileRecord:
    """Size and SHA-256 of a file, read in pieces of 1 MiB: still in the cache when they are hashed, and few enough
    that a thread seldom waits for the interpreter's lock, as behind one that imports modules.

    ``stopped`` is asked before each piece. Raises ``CancelledError`` once it says yes.
    """
    digest, size_bytes = hashlib.sha256(), 0
    piece = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            if stopped():
                raise CancelledError
            digest.update(piece[:count])
            size_bytes += count
    return FileRecord(name=path.name, size_bytes=size_bytes, sha256=digest.hexdigest())


def _check_name(name: str, manifest: Path) -> None:
    if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST_NAME:
        raise BundleError(f"{manifest} lists {name!r}, which is not a plain file name", hint="export the bundle again")


def _check_file(directory: Path, record: FileRecord) -> None:
    path = directory / record.name
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is missing or not a regular file", hint="export the bundle again")
    size_bytes = path.stat().st_size
    if size_bytes != record.size_bytes:
        raise BundleError(
            f"{path} has {size_bytes} bytes, its manifest says {record.size_bytes}", hint="copy or export it again"
        )


def read_manifest(directory: Path) -> Manifest:
    """The validated manifest of a bundle directory. Raises ``BundleError``."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(
            f"{directory} is not a bundle: it has no {MANIFEST_NAME}", hint="make one with: edgelm export"
        )
    if path.stat().st_size > MANIFEST_LIMIT_BYTES:
        raise BundleError(f"{path} is larger than {MANIFEST_LIMIT_BYTES} bytes")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise BundleError(f"{path} is not a valid manifest: {where}: {first['msg']}") from error
    for record in manifest.files:
        _check_name(record.name, path)
    seq2seq = manifest.task.seq2seq if manifest.task else None
    for name in (seq2seq.decoder, seq2seq.target_tokenizer) if seq2seq else ():
        if name is not None and all(record.name != name for record in manifest.files):
            raise BundleError(f"{path} needs {name!r} but does not list it among its files")
    if all(record.name != manifest.artifact for record in manifest.files):
        raise BundleError(f"{path} names the artefact {manifest.artifact!r} but does not list it among its files")
    return manifest


def open_bundle(directory: Path, *, check_hashes: bool = True) -> Bundle:
    """Open a bundle, checking names, sizes and (unless ``check_hashes`` is off) the SHA-256 of every file.

    Raises ``BundleError`` naming the first file that is missing, linked, of another size or changed.
    """
    if not directory.is_dir():
        raise BundleError(f"bundle {directory} does not exist", hint="make one with: edgelm export SOURCE -o BUNDLE")
    manifest = read_manifest(directory)
    for record in manifest.files:
        _check_file(directory, record)
        if check_hashes and file_record(directory / record.name).sha256 != record.sha256:
            raise BundleError(f"{directory / record.name} does not match its SHA-256", hint="copy or export it again")
    return Bundle(path=directory, manifest=manifest)


@contextmanager
def new_bundle(destination: Path, *, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """A temporary directory beside ``destination`` that takes its name when the block ends well.

    On any exception, Ctrl-C included, the temporary directory is removed and ``destination`` stays what it was; with
    ``resume`` an interruption or a failure to write leaves it (and ``journal_path``) to the next call with ``resume``.
    An existing ``destination`` is replaced only with ``force`` and only if it is a bundle or empty; it is kept until
    the new one is complete. Raises ``BundleError``.
    """
    check_destination(destination, force=force)
    with _kept(destination) if resume else _temporary(destination) as staging:
        yield staging
        staging.chmod(0o755)
        _replace(staging, destination)


def journal_path(destination: Path) -> Path:
    """Where an export that can be resumed notes what is done: beside the temporary directory, not inside."""
    return _kept_path(destination).with_suffix(".journal")


def kept_bytes(destination: Path) -> int:
    """Disk space that an interrupted export of ``destination`` holds already."""
    return sum(path.stat().st_blocks * 512 for path in _kept_path(destination).glob("*"))


def _kept_path(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.resume"


@contextmanager
def _temporary(destination: Path) -> Iterator[Path]:
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    except OSError as error:
        raise BundleError(f"cannot write to {destination.parent}: {error.strerror}") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _kept(destination: Path) -> Iterator[Path]:
    """A directory of a fixed name, for one process at a time. Only what another try would meet again removes it."""
    staging = _kept_path(destination)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise BundleError(f"cannot write to {destination.parent}: {error.strerror}") from error
    keep = False
    try:
        if not _locked(descriptor):
            keep = True
            raise BundleError(f"another export is writing {destination}", hint="wait for it or choose another output")
        yield staging
    except EdgelmError as error:
        keep = keep or isinstance(error, BundleError)
        raise
    except BaseException:
        keep = True
        raise
    finally:
        os.close(descriptor)
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
            journal_path(destination).unlink(missing_ok=True)


def _locked(descriptor: int) -> bool:
    """Lock a file for this process; False when another has it. Where there are no such locks nobody has."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse early what ``new_bundle`` would refuse. Raises ``BundleError``."""
    if not destination.exists() and not destination.is_symlink():
        return
    if not force:
        raise BundleError(f"{destination} exists", hint="choose another output or add --force to replace it")
    replaceable = destination.is_dir() and not destination.is_symlink()
    if not replaceable or not ((destination / MANIFEST_NAME).is_file() or not any(destination.iterdir())):
        raise BundleError(f"{destination} exists and is not a bundle, so --force does not replace it")


def _replace(staging: Path, destination: Path) -> None:
    if not destination.exists():
        staging.rename(destination)
    elif not _exchange(staging, destination):
        # Two renames: a kill between them leaves the old bundle under its .old name, complete.
        old = staging.with_suffix(".old")
        destination.rename(old)
        try:
            staging.rename(destination)
        except OSError:
            old.rename(destination)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2); False where the C library or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` and flush it to disk."""
    with (directory / MANIFEST_NAME).open("w", encoding="utf-8") as stream:
        stream.write(manifest.model_dump_json(indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
