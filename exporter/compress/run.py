"""What the stages of a compression share: what was asked for, the state on disk, and the seam between kinds of models.

Decoders and encoders differ in what they are taught with and judged by (``Kind``); the stages are the same. Does not
know any stage.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgelm.bundle import MANIFEST_NAME, file_record
from edgelm.errors import UsageError
from edgelm.progress import Progress
from exporter.checkpoint import Checkpoint
from exporter.compress.data import Corpus
from exporter.compress.fake_quant import FakeQuantizer
from exporter.compress.importance import DepthMeasure, Importance, Measure
from exporter.compress.result import ROW, Row
from exporter.compress.shape import Shape
from exporter.compress.training import Trainer, TrainingOptions, write_atomically
from exporter.compress.vocabulary import VocabularyCut
from exporter.device import DeviceChoice
from exporter.tokenizer import SourceTokenizer

OWN_WORDS, COMPARISONS = "own_words.npy", "comparisons.json"
WRITTEN = "own_words"  # batches of words while the teacher still writes
# A killed run may go on with these changed: they say how it is computed, or what to do about a loss that is no number.
_CHANGEABLE = ("device", "micro_batch", "learning_rate")


@dataclass(frozen=True, slots=True)
class CompressOptions:
    """What was typed for ``edgelm compress``. None means: as the teacher has it, or not asked for.

    ``target`` with limits chooses ``layers`` and ``neurons`` by prediction. ``heads`` counts attention heads.
    ``texts`` replace the built-in one and choose the ``vocabulary`` tokens that stay; ``own_share`` of the training
    tokens are the teacher's own, who writes ``own_tokens`` of them, all where that is None; fewer are read more than
    once. ``finish`` is what the last ``finish_tokens`` are trained for: a mix (Q4_0, Q4_K_M ...) or a bundle, whose
    types are taken, and whose numbers where they are this model's. ``sparsity`` is the share of zeros, or 2:4;
    ``stages`` is in how many steps shape and zeros are reached, each of which distils its part of ``tokens``.
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
    depth: DepthMeasure | None = None
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
    vocabulary: int | None = None
    sparsity: str | None = None
    stages: int = 1
    finish: str | None = None
    finish_tokens: int = 200_000
    seed: int = 0
    device: DeviceChoice = "auto"


@dataclass
class Run:
    """What the stages share."""

    options: CompressOptions
    checkpoint: Checkpoint
    words: SourceTokenizer
    state: Path
    progress: Progress
    comparisons: list[Row] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def compared(self, stage: str) -> bool:
        """Whether an earlier part of this run has measured a stage."""
        return any(item.stage == stage for item in self.comparisons)

    def keep_comparisons(self) -> None:
        """Write all figures so far, so that a resumed run has them."""
        write_atomically(self.state / COMPARISONS, json.dumps([item.model_dump() for item in self.comparisons]))


class Kind(Protocol):
    """How one kind of model is taught and judged.

    ``figure`` is what its training curve calls the distance, ``depth`` what decides which layers go.
    """

    figure: str
    depth: DepthMeasure

    def open(self, checkpoint: Checkpoint, device: DeviceChoice) -> AbstractContextManager[Any]:
        """A model in float32 on the device."""

    def check_teacher(self, teacher: Any, student: Any) -> None:
        """Raises ``CheckpointError`` when a model cannot be the teacher of another."""

    def corpus(self, teacher: Any) -> tuple[Corpus, Corpus | None]:
        """What the student learns from, and what the teacher wrote beside it for judging."""

    def measure(self, base: Any, corpus: Corpus, wanted: Shape) -> Importance:
        """How much the units of a model matter on some of the text that is learned from."""

    def samples(self, corpus: Corpus) -> list[list[int]]:
        """That text, as token ids."""

    def compare(self, stage: str, teacher: Any, student: Any, held_out: Corpus | None) -> None:
        """Add figures of text that nobody learns from, unless an earlier part of this run has done so."""

    def compare_cut(self, stage: str, teacher: Any, student: Any, cut: VocabularyCut) -> None:
        """The same of a student that has lost tokens."""

    def step_tokens(self, corpus: Corpus) -> int:
        """About how many tokens a step reads."""

    def trainer(
        self, teacher: Any, student: Any, corpus: Corpus, options: TrainingOptions, directory: Path,
        quantizer: FakeQuantizer | None,
    ) -> Trainer:  # fmt: skip
        """What trains the student."""


def check_steps(options: CompressOptions, step_tokens: int, told: str) -> None:
    """Refuse a training that would have no step. ``told`` is what a step reads. Raises ``UsageError``."""
    each = options.tokens // options.stages
    if options.tokens and each < step_tokens:
        named = f" in each of {options.stages} stages" if options.stages > 1 else ""
        raise UsageError(
            f"--tokens {options.tokens}{named} is less than one step, {told}",
            hint="give more tokens, a smaller --batch, fewer --stages or a shorter --length; 0 prunes only",
        )


def claim_state(run: Run, teacher: Checkpoint, wanted: Shape) -> None:
    """Make the state directory this run's own. Raises ``UsageError`` when it is another run's."""
    options = {name: str(value) for name, value in asdict(run.options).items() if name not in _CHANGEABLE}
    manifest = Path(run.options.finish or "") / MANIFEST_NAME  # of a bundle: what training for it begins with
    bundle = (manifest,) if run.options.finish is not None and manifest.is_file() else ()
    paths = dict.fromkeys((*run.checkpoint.files, *teacher.files, *run.options.texts, *bundle))
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
    path = run.state / COMPARISONS
    if path.is_file():
        run.comparisons += [ROW.validate_python(item) for item in json.loads(path.read_text(encoding="utf-8"))]


@contextmanager
def state_kept_if_worth_it(state: Path) -> Iterator[None]:
    """On any exception, keep what took long to compute; without that, nothing."""
    try:
        yield
    except BaseException:
        kept = (OWN_WORDS, f"{WRITTEN}/*.npy", "*/state.json")
        if not any(list(state.glob(pattern)) for pattern in kept):
            shutil.rmtree(state, ignore_errors=True)
        raise
