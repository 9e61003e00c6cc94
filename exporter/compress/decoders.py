"""How decoders are taught and judged: windows of text, the teacher's own words, KL to its distribution."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from exporter import quality
from exporter.architectures import describe
from exporter.calibration import opening_of_a_turn
from exporter.checkpoint import Checkpoint
from exporter.compress import data, importance
from exporter.compress.data import Corpus
from exporter.compress.fake_quant import FakeQuantizer
from exporter.compress.importance import DepthMeasure, Importance
from exporter.compress.result import Comparison
from exporter.compress.run import OWN_WORDS, WRITTEN, Run
from exporter.compress.shape import Shape
from exporter.compress.training import Trainer, TrainingOptions
from exporter.compress.vocabulary import VocabularyCut
from exporter.compress.writing import own_words, starts, told
from exporter.device import DeviceChoice, memory_errors
from exporter.quality import Window, compare_models, cut_windows
from exporter.reference import ScoringModel, TransformersModel, open_torch_model
from exporter.texts import evaluation_text
from exporter.token_identity import open_tokenizer
from runtime.engine import Logits

IMPORTANCE_WINDOWS = 16
EVALUATION_TOKENS = 2000
_HELD_OUT = 16  # windows of the teacher's own words that nobody learns from


class Decoders:
    """The kind of models that continue a text."""

    figure = "kl"

    def __init__(self, run: Run) -> None:
        self._run = run
        self.depth: DepthMeasure = run.options.depth or "influence"

    def open(self, checkpoint: Checkpoint, device: DeviceChoice) -> AbstractContextManager[Any]:
        """The model as transformers has it."""
        return open_torch_model(checkpoint, self._run.progress, device=device)

    def check_teacher(self, teacher: Any, student: Any) -> None:
        """Any teacher of the same tokens will do."""

    def samples(self, corpus: Corpus) -> list[list[int]]:
        """Windows spread evenly over what is learned from."""
        rows = corpus.windows[:: max(1, len(corpus.windows) // IMPORTANCE_WINDOWS)]
        return [row.tolist() for row in rows[:IMPORTANCE_WINDOWS]]

    def measure(self, base: Any, corpus: Corpus, wanted: Shape) -> Importance:
        """On these windows."""
        options, read = self._run.options, self.samples(corpus)
        return importance.measure(base, read, wanted, self._run.progress, units=options.units, depth=self.depth)

    def corpus(self, teacher: Any) -> tuple[Corpus, Corpus | None]:
        """What the student learns from, and windows of the teacher's own words that are held out."""
        run, options = self._run, self._run.options
        length = min(options.length, describe(run.checkpoint).dimensions.context_trained)
        corpus = data.from_texts(options.texts or (None,), run.words, length)
        total = max(options.tokens, options.finish_tokens if options.finish is not None else 0)
        if not total * options.own_share:
            return corpus, None
        shared = max(1, round(total * options.own_share / length))
        own = min(shared, max(1, round((options.own_tokens or total) / length)))
        path, kinds = run.state / OWN_WORDS, starts(opening_of_a_turn(run.words), length)
        if path.is_file():
            words = np.load(path, allow_pickle=False)
        else:
            with memory_errors("one sequence that the teacher writes", "try a shorter --length, or --device cpu"):
                words = own_words(
                    teacher, own + _HELD_OUT, length, options.seed, kinds, run.state / WRITTEN, run.progress
                )
            partial = path.with_name(f".partial.{path.name}")
            np.save(partial, words)
            partial.replace(path)
            shutil.rmtree(run.state / WRITTEN, ignore_errors=True)
        written = data.written_by_teacher(words, told(kinds), options.seed)
        held_out = Corpus(written.windows[:_HELD_OUT], ())
        learned = Corpus(np.resize(written.windows[_HELD_OUT:], (shared, length)), written.sources)
        if options.own_share == 1:
            return learned, held_out
        # Texts are repeated or thinned so that the shares are as asked for.
        wanted = max(1, round(shared * (1 - options.own_share) / options.own_share))
        chosen = np.random.default_rng(options.seed).permutation(np.resize(np.arange(len(corpus.windows)), wanted))
        return data.together(learned, Corpus(corpus.windows[chosen], corpus.sources)), held_out

    def compare(self, stage: str, teacher: Any, student: Any, held_out: Corpus | None) -> None:
        """Add a row for each evaluation text, unless an earlier part of this run has done so."""
        run = self._run
        if run.compared(stage):
            return
        name, windows = self._text()
        one, other = TransformersModel(teacher, "teacher"), TransformersModel(student, "student")
        tokenizer = open_tokenizer(run.words.tokenizer_json, "tokenizer.json")
        found = compare_models(one, other, windows, run.progress)
        size_bytes = sum(_counted_bytes(tokenizer, window) for window in windows)
        run.comparisons.append(_figures(stage, name, found, size_bytes))
        if held_out is not None:
            own = [Window(tuple(row.tolist()), 31) for row in held_out.windows]
            found = compare_models(one, other, own, run.progress)
            run.comparisons.append(_figures(stage, "the teacher's own words", found, None))
        run.keep_comparisons()

    def compare_cut(self, stage: str, teacher: Any, student: Any, cut: VocabularyCut) -> None:
        """The same text in the tokens that stayed, beside the teacher's predictions of these alone."""
        run = self._run
        if run.compared(stage):
            return
        name, windows = self._text()
        whole = open_tokenizer(run.words.tokenizer_json, "tokenizer.json")
        smaller = open_tokenizer(cut.tokenizer_json, "tokenizer.json")
        limit = describe(run.checkpoint).dimensions.context_trained
        texts = [_in_other_tokens(whole, smaller, window, limit) for window in windows]
        one, other = _Restricted(TransformersModel(teacher, "teacher"), cut.kept), TransformersModel(student, "student")
        found = compare_models(one, other, [window for window, _ in texts], run.progress)
        row = _figures(stage, name, found, sum(size_bytes for _, size_bytes in texts))
        theirs = next(item for item in run.comparisons if isinstance(item, Comparison) and item.text == name)
        run.comparisons.append(row.model_copy(update={"bits_per_byte_teacher": theirs.bits_per_byte_teacher}))
        run.keep_comparisons()

    def _text(self) -> tuple[str, list[Window]]:
        """The name of the evaluation text, and windows of it."""
        text, run = evaluation_text(), self._run
        tokenizer = open_tokenizer(run.words.tokenizer_json, "tokenizer.json")
        ids = tokenizer.encode(text.content, add_special_tokens=False).ids
        length = min(512, describe(run.checkpoint).dimensions.context_trained)
        return text.name, cut_windows(ids, EVALUATION_TOKENS, length=length, name=text.name)

    def step_tokens(self, corpus: Corpus) -> int:
        """Every window has all of its tokens."""
        return self._run.options.batch * int(corpus.windows.shape[1])

    def trainer(
        self, teacher: Any, student: Any, corpus: Corpus, options: TrainingOptions, directory: Path,
        quantizer: FakeQuantizer | None,
    ) -> Trainer:  # fmt: skip
        """By the teacher's distribution over the next token."""
        return Trainer(teacher, student, corpus, options, directory, quantizer)


class _Restricted:
    """A model that knows some of its tokens only: reads and predicts them by new ids, their order among the old."""

    def __init__(self, model: ScoringModel, kept: Sequence[int]) -> None:
        self._model, self._kept = model, np.asarray(kept)
        self.name, self.vocabulary = model.name, len(kept)

    def reset(self) -> None:
        self._model.reset()

    def append(self, tokens: Sequence[int]) -> Logits:
        found: Logits = self._model.append(self._kept[list(tokens)].tolist())[:, self._kept]
        return found


def _figures(stage: str, text: str, found: quality.Comparison, size_bytes: int | None) -> Comparison:
    bits = [
        None if size_bytes is None else float(-values.sum() / np.log(2) / size_bytes)
        for values in (found.log_probability, found.log_probability_reference)
    ]
    return Comparison(
        stage=stage,
        text=text,
        tokens=len(found.kl),
        kl_mean=float(found.kl.mean()),
        kl_p99=float(np.quantile(found.kl, 0.99)),
        top1_agreement=float(found.agrees.mean()),
        ppl=float(np.exp(-found.log_probability.mean())),
        ppl_teacher=float(np.exp(-found.log_probability_reference.mean())),
        bits_per_byte=bits[0],
        bits_per_byte_teacher=bits[1],
    )


def _counted_bytes(tokenizer: Any, window: Window) -> int:
    """Bytes of the text whose tokens are predicted and counted."""
    whole, head = (
        len(tokenizer.decode(list(ids), skip_special_tokens=False).encode())
        for ids in (window.tokens, window.tokens[: window.first + 1])
    )
    return whole - head


def _in_other_tokens(whole: Any, smaller: Any, window: Window, limit: int) -> tuple[Window, int]:
    """The text of a window in the tokens of another tokenizer, ``limit`` of them at most, counted from about the same
    place on; and the bytes that are counted."""
    text = whole.decode(list(window.tokens), skip_special_tokens=False)
    head = len(whole.decode(list(window.tokens[: window.first + 1]), skip_special_tokens=False))
    encoding = smaller.encode(text, add_special_tokens=False)
    ids, offsets = encoding.ids[:limit], encoding.offsets[:limit]
    first = next(place for place, (start, _) in enumerate(offsets) if start >= head)
    counted = text[offsets[first][0] : offsets[-1][1]]
    return Window(tuple(ids), first - 1), len(counted.encode())
