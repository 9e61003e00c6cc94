"""How decoders are taught and judged: windows of text, the teacher's own words, KL to its distribution."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from exporter.architectures import describe
from exporter.checkpoint import Checkpoint
from exporter.compress import data, importance
from exporter.compress.data import Corpus
from exporter.compress.fake_quant import FakeQuantizer
from exporter.compress.importance import Importance
from exporter.compress.result import Comparison
from exporter.compress.run import OWN_WORDS, WRITTEN, Run
from exporter.compress.shape import Shape
from exporter.compress.training import Trainer, TrainingOptions
from exporter.compress.writing import own_words
from exporter.device import DeviceChoice, memory_errors
from exporter.quality import Window, compare_models, cut_windows
from exporter.reference import TransformersModel, open_torch_model
from exporter.texts import evaluation_text
from exporter.token_identity import open_tokenizer

IMPORTANCE_WINDOWS = 16
EVALUATION_TOKENS = 2000
_HELD_OUT = 8  # windows of the teacher's own words that nobody learns from


class Decoders:
    """The kind of models that continue a text."""

    figure = "kl"

    def __init__(self, run: Run) -> None:
        self._run = run

    def open(self, checkpoint: Checkpoint, device: DeviceChoice) -> AbstractContextManager[Any]:
        """The model as transformers has it."""
        return open_torch_model(checkpoint, self._run.progress, device=device)

    def check_teacher(self, teacher: Any, student: Any) -> None:
        """Any teacher of the same tokens will do."""

    def measure(self, base: Any, corpus: Corpus, wanted: Shape) -> Importance:
        """On windows spread evenly over what is learned from."""
        options = self._run.options
        windows = [row.tolist() for row in corpus.windows[:: max(1, len(corpus.windows) // IMPORTANCE_WINDOWS)]]
        return importance.measure(
            base, windows[:IMPORTANCE_WINDOWS], wanted, self._run.progress, units=options.units, depth=options.depth
        )

    def corpus(self, teacher: Any) -> tuple[Corpus, Corpus | None]:
        """What the student learns from, and windows of the teacher's own words that are held out."""
        run, options = self._run, self._run.options
        length = min(options.length, describe(run.checkpoint).dimensions.context_trained)
        corpus = data.from_texts(options.texts or (None,), run.words, length)
        total = max(options.tokens, options.finish_tokens if options.finish is not None else 0)
        if not total * options.own_share:
            return corpus, None
        own = max(1, round(total * options.own_share / length))
        path = run.state / OWN_WORDS
        if path.is_file():
            written = data.written_by_teacher(np.load(path, allow_pickle=False), options.seed)
        else:
            with memory_errors("one sequence that the teacher writes", "try a shorter --length, or --device cpu"):
                words = own_words(teacher, own + _HELD_OUT, length, options.seed, run.state / WRITTEN, run.progress)
            written = data.written_by_teacher(words, options.seed)
            partial = path.with_name(f".partial.{path.name}")
            np.save(partial, written.windows)
            partial.replace(path)
            shutil.rmtree(run.state / WRITTEN, ignore_errors=True)
        held_out = Corpus(written.windows[:_HELD_OUT], ())
        learned = Corpus(written.windows[_HELD_OUT:], written.sources)
        if options.own_share == 1:
            return learned, held_out
        # Texts are repeated or thinned so that the shares are as asked for.
        wanted = max(1, round(own * (1 - options.own_share) / options.own_share))
        chosen = np.random.default_rng(options.seed).permutation(np.resize(np.arange(len(corpus.windows)), wanted))
        return data.together(learned, Corpus(corpus.windows[chosen], corpus.sources)), held_out

    def compare(self, stage: str, teacher: Any, student: Any, held_out: Corpus | None) -> None:
        """Add a row for each evaluation text, unless an earlier part of this run has done so."""
        run = self._run
        if run.compared(stage):
            return
        text = evaluation_text()
        ids = open_tokenizer(run.words.tokenizer_json, "tokenizer.json").encode(
            text.content, add_special_tokens=False
        ).ids  # fmt: skip
        length = min(512, describe(run.checkpoint).dimensions.context_trained)
        texts: Mapping[str, list[Window]] = {
            text.name: cut_windows(ids, EVALUATION_TOKENS, length=length, name=text.name)
        }
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
        run.keep_comparisons()

    def step_tokens(self, corpus: Corpus) -> int:
        """Every window has all of its tokens."""
        return self._run.options.batch * int(corpus.windows.shape[1])

    def trainer(
        self, teacher: Any, student: Any, corpus: Corpus, options: TrainingOptions, directory: Path,
        quantizer: FakeQuantizer | None,
    ) -> Trainer:  # fmt: skip
        """By the teacher's distribution over the next token."""
        return Trainer(teacher, student, corpus, options, directory, quantizer)
