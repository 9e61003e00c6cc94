"""How encoders are taught and judged: passages of text, and the teacher's vectors of them.

What is learned from are sentences and paragraphs of the texts and, as far as more is asked for than these hold, spans
of any length from any place: a few thousand sentences would be learned by heart. Figures are those of an export's
proof (``embedding_quality``), over passages that nobody learned from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.errors import CheckpointError, UsageError
from exporter.architectures import describe
from exporter.architectures.base import EncoderDescription
from exporter.calibration import read_conversations
from exporter.checkpoint import Checkpoint
from exporter.compress import importance
from exporter.compress.anatomy import ANATOMIES
from exporter.compress.data import Corpus, Ids
from exporter.compress.fake_quant import FakeQuantizer
from exporter.compress.importance import DepthMeasure, Importance
from exporter.compress.result import VectorComparison
from exporter.compress.run import CompressOptions, Run, check_steps
from exporter.compress.shape import Shape
from exporter.compress.surgery import without_pooler
from exporter.compress.training import Trainer, TrainingOptions
from exporter.compress.vector_training import PADDING, VectorTrainer, pooled
from exporter.compress.vocabulary import VocabularyCut
from exporter.device import DeviceChoice
from exporter.embedding_quality import Figures, cut_passages, embed_all, embedder, figures
from exporter.reference import open_transformers_encoder
from exporter.texts import evaluation_text
from exporter.token_identity import open_tokenizer
from runtime.tokenizer import ends_added

IMPORTANCE_TEXTS = 48
_SHORTEST = 3  # tokens of a text that says anything
_MOST_TOKENS = 2_000_000  # in memory at once: what is asked for beyond them is read again
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+")
_GGUF_ARCHITECTURES = ("bert",)


def is_encoder(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint makes vectors of texts."""
    anatomy = ANATOMIES.get(checkpoint.architecture)
    return checkpoint.architecture in _GGUF_ARCHITECTURES or (anatomy is not None and anatomy.encoder)


def check_encoder(options: CompressOptions, checkpoint: Checkpoint) -> None:
    """Refuse what an encoder has not. Raises ``UsageError`` and ``CheckpointError``."""
    width = "an encoder's vectors have its width, and a teacher's can be compared only with as many numbers"
    heads = "in these configurations the width and the heads decide the size of a head, so heads cannot go alone"
    choose = "--target chooses among decoders' shapes; give an encoder's by --layers and --neurons"
    refused = (
        ("--hidden", options.hidden is not None, width),
        ("--heads", options.heads is not None, heads),
        ("--target", options.target is not None, choose),
        ("--own-share", options.own_share > 0, "an encoder writes no text"),
        ("--own-tokens", options.own_tokens is not None, "an encoder writes no text"),
        ("--temperature", options.temperature != 1, "an encoder predicts no distribution"),
        ("--attention-weight", options.attention_weight > 0, "of an encoder only --hidden-weight is compared"),
        ("--depth-by kl", options.depth == "kl", "an encoder predicts no tokens; --depth-by cosine is its like"),
    )
    for name, given, reason in refused:
        if given:
            raise UsageError(f"{name} does not go with an encoder: {reason}", hint=f"leave out {name}")
    named = checkpoint.config.get("architectures")
    head = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    sentences = checkpoint.source.kind == "gguf" or (checkpoint.source.path / "modules.json").is_file()
    if "For" in head and not sentences:
        raise CheckpointError(
            f"{checkpoint.source.location} is a {head}: its head would be lost, only models of vectors are compressed",
            hint="name a sentence model, which has a modules.json",
        )


class Encoders:
    """The kind of models that make one vector of a text."""

    figure = "distance"

    def __init__(self, run: Run) -> None:
        self._run = run
        self.depth: DepthMeasure = run.options.depth or "cosine"
        encoder = describe(run.checkpoint).encoder
        assert encoder is not None
        self._encoder: EncoderDescription = encoder

    def open(self, checkpoint: Checkpoint, device: DeviceChoice) -> AbstractContextManager[Any]:
        """The model as transformers has it, without a layer behind the first token."""
        return self._opened(checkpoint, device)

    @contextmanager
    def _opened(self, checkpoint: Checkpoint, device: DeviceChoice) -> Iterator[Any]:
        with open_transformers_encoder(checkpoint, self._run.progress, device=device) as (_, model):
            yield without_pooler(model)

    def check_teacher(self, teacher: Any, student: Any) -> None:
        """Raises ``CheckpointError`` for a teacher whose vectors have another length."""
        theirs, ours = teacher.config.hidden_size, student.config.hidden_size
        if theirs != ours:
            raise CheckpointError(
                f"{self._run.options.teacher} makes vectors of {theirs} numbers, {self._run.options.source} of {ours}",
                hint="choose a teacher of the same width",
            )

    def corpus(self, teacher: Any) -> tuple[Corpus, None]:
        """Ids of texts of all lengths, special tokens around each, filled up with ``PADDING``."""
        options, run = self._run.options, self._run
        tokenizer = open_tokenizer(run.words.tokenizer_json, "tokenizer.json")
        bare, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
        prefix, suffix = ends_added(bare, whole)
        longest = min(options.length, self._encoder.context)
        room = longest - len(prefix) - len(suffix)
        pieces: list[list[int]] = []
        streams: list[list[int]] = []
        sources = []
        for path in options.texts or (None,):
            text = read_conversations(path, run.words)
            found = list(_pieces(text.content, tokenizer, room))
            pieces += found
            streams.append(tokenizer.encode(text.content, add_special_tokens=False).ids)
            sources.append(f"{text.name}: {len(found)} sentences and paragraphs, SHA-256 {text.sha256}")
        if not pieces:
            raise UsageError("the training text holds no sentence: nothing to learn from", hint="give longer texts")
        asked = max(options.tokens, options.finish_tokens if options.finish is not None else 0)
        lacking = min(asked, _MOST_TOKENS) - sum(map(len, pieces))
        spans = list(_spans(streams, room, lacking, options.seed))
        if spans:
            sources.append(f"{len(spans)} spans of these, {sum(map(len, spans))} tokens, seed {options.seed}")
        rows = [[*prefix, *piece, *suffix] for piece in (*pieces, *spans)]
        windows: Ids = np.full((len(rows), max(map(len, rows))), PADDING, np.int32)
        for row, ids in zip(windows, rows, strict=True):
            row[: len(ids)] = ids
        corpus = Corpus(windows, tuple(sources))
        step = self.step_tokens(corpus)
        check_steps(options, step, f"{options.batch} texts of about {step // options.batch} tokens")
        return corpus, None

    def samples(self, corpus: Corpus) -> list[list[int]]:
        """Texts spread evenly over what is learned from."""
        rows = corpus.windows[:: max(1, len(corpus.windows) // IMPORTANCE_TEXTS)][:IMPORTANCE_TEXTS]
        return [row[row != PADDING].tolist() for row in rows]

    def measure(self, base: Any, corpus: Corpus, wanted: Shape) -> Importance:
        """On these texts."""
        options, record = self._run.options, self._encoder.record

        def pool(states: Any) -> Any:
            import torch

            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            return pooled(states, mask, record)

        texts = self.samples(corpus)
        return importance.measure(
            base, texts, wanted, self._run.progress, units=options.units, depth=self.depth, pool=pool
        )

    def compare(self, stage: str, teacher: Any, student: Any, held_out: Corpus | None) -> None:
        """Add a row for the evaluation text, unless an earlier part of this run has done so."""
        run = self._run
        if run.compared(stage):
            return
        text = evaluation_text()
        passages = cut_passages(text, run.checkpoint, self._encoder.context)
        expected, found = (
            embed_all(embedder(model, self._encoder.record), passages, "measuring quality", run.progress)
            for model in (teacher, student)
        )
        self._add(stage, text.name, passages, figures(expected, found))

    def _add(self, stage: str, text: str, passages: Sequence[Sequence[int]], found: Figures) -> None:
        count = sum(map(len, passages))
        row = VectorComparison(stage=stage, text=text, texts=len(passages), tokens=count, **asdict(found))
        self._run.comparisons.append(row)
        self._run.keep_comparisons()

    def compare_cut(self, stage: str, teacher: Any, student: Any, cut: VocabularyCut) -> None:
        """The passages as texts, each model's in its own tokens; those that become too long are cut as in use."""
        run, record, context = self._run, self._encoder.record, self._encoder.context
        if run.compared(stage):
            return
        text = evaluation_text()
        whole = open_tokenizer(run.words.tokenizer_json, "tokenizer.json")
        spans = [whole.decode(ids) for ids in cut_passages(text, run.checkpoint, context)]
        passages = [_read(whole, spans, context), _read(open_tokenizer(cut.tokenizer_json, "new"), spans, context)]
        expected, found = (
            embed_all(embedder(model, record), texts, "measuring quality", run.progress)
            for model, texts in zip((teacher, student), passages, strict=True)
        )
        self._add(stage, text.name, passages[1], figures(expected, found))

    def step_tokens(self, corpus: Corpus) -> int:
        """Texts of a step times the mean of their lengths."""
        return max(1, round(self._run.options.batch * float((corpus.windows != PADDING).sum(axis=1).mean())))

    def trainer(
        self, teacher: Any, student: Any, corpus: Corpus, options: TrainingOptions, directory: Path,
        quantizer: FakeQuantizer | None,
    ) -> Trainer:  # fmt: skip
        """By the teacher's vectors."""
        return VectorTrainer(teacher, student, corpus, options, directory, quantizer, self._encoder.record)


def _read(tokenizer: Any, texts: Sequence[str], context: int) -> list[list[int]]:
    """Ids of texts, special tokens around each, the last one kept when a text is too long."""
    found = [tokenizer.encode(text).ids for text in texts]
    return [ids if len(ids) <= context else [*ids[: context - 1], ids[-1]] for ids in found]


def _pieces(text: str, tokenizer: Any, room: int) -> Iterator[list[int]]:
    """Ids of sentences and of paragraphs of several; those that are longer than the room are cut."""
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    for paragraph in paragraphs:
        sentences = [part for part in _SENTENCE_END.split(paragraph) if part.strip()]
        for part in sentences if len(sentences) < 2 else [*sentences, paragraph]:
            ids = tokenizer.encode(part, add_special_tokens=False).ids
            cuts = (ids[start : start + room] for start in range(0, len(ids), room))
            yield from (list(piece) for piece in cuts if len(piece) >= _SHORTEST)


def _spans(streams: Sequence[Sequence[int]], room: int, tokens: int, seed: int) -> Iterator[list[int]]:
    """Spans from random places with ``tokens`` tokens in all, as many short as long ones by the factor."""
    rng = np.random.default_rng(seed)
    lengths = np.array([len(ids) for ids in streams], dtype=np.float64)
    while tokens > 0:
        ids = streams[int(rng.choice(len(streams), p=lengths / lengths.sum()))]
        length = min(room, len(ids), round(_SHORTEST * (room / _SHORTEST) ** rng.random()))
        start = int(rng.integers(len(ids) - length + 1))
        yield list(ids[start : start + length])
        tokens -= length
