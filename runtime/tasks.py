"""Models with a task of their own, ready to be asked: translation, masked words, labels. From bundles only.

``run``, ``serve`` and the proof all come here, so they agree on special tokens, limits and choices. Knows where things
are stored; nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgelm.bundle import Bundle, Manifest, Seq2SeqRecord, TaskKind, TaskRecord
from edgelm.errors import BundleError, EngineError, UsageError
from runtime.engines.onnx_seq2seq import Seq2SeqEngine
from runtime.engines.onnx_text import (
    Session,
    TextFacts,
    check_context,
    check_ids,
    read_facts,
    read_text_graph,
    text_feed,
)
from runtime.model import TOKENIZER_NAME, artifact_of
from runtime.tokenizer import JsonTokenizer

HEAD = "head-1"
TOP = 5
TOP_LIMIT = 100
Row = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """``context`` of 0 means: what the plan chose; ``threads`` of 0: ask the host."""

    context: int = 0
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """What a text is asked for. ``max_tokens`` 0: as many as the model usually writes; ``top``: how many words."""

    text: str
    max_tokens: int = 0
    top: int = TOP


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """``document`` is what is shown as JSON, ``lines`` what people read. Counts are tokens."""

    document: Mapping[str, Any]
    lines: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int = 0


class TaskModel(Protocol):
    """What all tasks have in common. Not thread-safe, except for ``interrupt``."""

    name: str
    kind: TaskKind
    context: int
    facts: TextFacts
    system: str

    def answer(self, asked: Asked) -> TaskAnswer:
        """Raises ``UsageError`` for a text without what the task needs, ``ContextOverflowError`` and ``EngineError``,
        and ``EngineInterruptedError`` when it was interrupted."""
        ...

    def warm_up(self) -> None:
        """Compute something small. Raises ``EngineError``."""
        ...

    def interrupt(self) -> None:
        """Stop the ``answer`` under way. Callable from any thread."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def holds_task(path: Path) -> TaskKind | None:
    """The task of a bundle, hashes unchecked; None for other models. Raises ``BundleError``."""
    _, bundle = artifact_of(path, check_hashes=False)
    return bundle.manifest.task.kind if bundle and bundle.manifest.task else None


def open_task(path: Path, options: TaskOptions) -> TaskModel:
    """Load a bundle with a task. Raises ``BundleError``, ``UsageError`` for other models, and ``EngineError``."""
    _, bundle = artifact_of(path)
    if bundle is None or bundle.manifest.task is None:
        raise UsageError(f"{path} has no task of its own", hint="edgelm run BUNDLE PROMPT answers with other models")
    words = _words(bundle, TOKENIZER_NAME)
    manifest, record = bundle.manifest, bundle.manifest.task
    if record.seq2seq is None:
        return HeadModel(bundle.artifact_path, manifest.name, record, words, options)
    writer = bundle.path / record.seq2seq.decoder
    engine = Seq2SeqEngine(bundle.artifact_path, writer, threads=options.threads, context=options.context)
    target = record.seq2seq.target_tokenizer
    return Translator(engine, manifest, words, _words(bundle, target) if target else words)


def _words(bundle: Bundle, name: str) -> JsonTokenizer:
    path = bundle.file(name)
    if path is None:
        raise BundleError(f"{bundle.path} has no {name}", hint="export it again")
    return JsonTokenizer(path)


def task_ids(words: JsonTokenizer, record: TaskRecord, text: str) -> list[int]:
    """Ids of a text as the model was trained on it, special tokens around it."""
    prefix, suffix = words.frame()
    ids = words.encode(text)
    if record.unknown_token is not None:
        ids = [token if token < record.vocabulary else record.unknown_token for token in ids]
    return [*prefix, *ids, *suffix]


class Translator:
    """``TaskModel`` of an encoder-decoder: writes the likeliest token each time."""

    kind: TaskKind = "translate"

    def __init__(self, engine: Seq2SeqEngine, manifest: Manifest, source: JsonTokenizer, target: JsonTokenizer) -> None:
        assert manifest.task is not None
        assert manifest.task.seq2seq is not None
        self.name, self.engine, self._source, self._target = manifest.name, engine, source, target
        self._record: TaskRecord = manifest.task
        self._seq2seq: Seq2SeqRecord = manifest.task.seq2seq
        self.context, self.facts = engine.context, engine.facts
        self.system = engine.system

    def answer(self, asked: Asked) -> TaskAnswer:
        """See ``TaskModel.answer``."""
        ids = task_ids(self._source, self._record, asked.text)
        written = self.generate(ids, asked.max_tokens)
        ended = bool(written) and written[-1] in self._seq2seq.end_tokens
        text = self._target.decode(written)
        document = {"text": text, "finish_reason": "stop" if ended else "length"}
        return TaskAnswer(document, (text,), len(ids), len(written))

    def generate(self, ids: Sequence[int], max_tokens: int = 0) -> list[int]:
        """The tokens that are written for a text, the one that ends it included."""
        self.engine.read(ids)
        return greedy(self.engine.write, self._seq2seq, max_tokens or self._seq2seq.max_tokens)

    def warm_up(self) -> None:
        self.generate([self._seq2seq.end_tokens[0]], 1)

    def interrupt(self) -> None:
        self.engine.interrupt()

    def close(self) -> None:
        self.engine.close()


def greedy(write: Callable[[int], Row], record: Seq2SeqRecord, max_tokens: int) -> list[int]:
    """The likeliest token after each, from the start token on, until one ends it or there are ``max_tokens``."""
    written: list[int] = []
    last = record.start_token
    while len(written) < max_tokens:
        logits = write(last)
        if record.first_token is not None and not written:
            last = record.first_token
        else:
            if not np.isfinite(logits).any() or np.isnan(logits).any():
                raise EngineError("the model computes values that are not finite", hint="try: edgelm doctor")
            allowed = logits.copy()
            allowed[list(record.suppressed)] = -np.inf
            last = int(allowed.argmax())
        written.append(last)
        if last in record.end_tokens:
            break
    return written


class HeadModel:
    """``TaskModel`` of an encoder with a head: words at masks, or labels."""

    def __init__(self, path: Path, name: str, record: TaskRecord, words: JsonTokenizer, options: TaskOptions) -> None:
        model = read_text_graph(path, HEAD, frozenset({"logits"}))
        self.facts = read_facts(path, model)
        self.context = check_context(options.context, self.facts, path)
        self.name, self.kind, self._record, self._words, self._model = name, record.kind, record, words, model
        self._session = Session(path, options.threads)
        self.system = self._session.system

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the graph says of one text: (tokens, vocabulary) of masked words, (labels,) of a classifier."""
        self._session.begin()
        check_ids(self.facts, ids, self.context, "the text")
        (found,) = self._session.run(["logits"], text_feed(self._model, [ids], self.facts.padding))
        row: npt.NDArray[np.float32] = found[0]
        if not np.isfinite(row).all():
            raise EngineError(f"{self.name} computes values that are not finite", hint="try: edgelm doctor")
        return row

    def answer(self, asked: Asked) -> TaskAnswer:
        """See ``TaskModel.answer``."""
        ids = task_ids(self._words, self._record, asked.text)
        if self.kind == "classify":
            return self._classified(ids)
        mask = self._record.mask_token
        places = [place for place, token in enumerate(ids) if token == mask]
        if mask is None or not places:
            told = self._words.decode([mask], special=True) if mask is not None else "(none)"
            raise UsageError(f"the text has no mask: write {told} where a word is to be found")
        return self._filled(ids, places, asked.top)

    def _classified(self, ids: Sequence[int]) -> TaskAnswer:
        logits = self.logits(ids).astype(np.float64)
        if logits.shape != (len(self._record.labels),):
            raise EngineError(f"the graph gave {logits.shape} scores for {len(self._record.labels)} labels")
        scores = 1 / (1 + np.exp(-logits)) if self._record.multi_label else np.exp(logits - logits.max())
        if not self._record.multi_label:
            scores /= scores.sum()
        order = np.argsort(-scores, kind="stable")
        found = [{"label": self._record.labels[index], "score": float(scores[index])} for index in order]
        lines = tuple(f"{item['score']:.4f} {item['label']}" for item in found)
        return TaskAnswer({"labels": found}, lines, len(ids))

    def _filled(self, ids: Sequence[int], places: Sequence[int], top: int) -> TaskAnswer:
        logits = self.logits(ids)
        masks: list[list[dict[str, object]]] = []
        lines: list[str] = []
        for place in places:
            row = logits[place].astype(np.float64)
            scores = np.exp(row - row.max())
            scores /= scores.sum()
            best = np.argsort(-scores, kind="stable")[:top]
            words = [self._words.decode([int(token)], special=True).strip() for token in best]
            masks.append(
                [
                    {"token": int(token), "word": word, "score": float(scores[token])}
                    for token, word in zip(best, words, strict=True)
                ]
            )
            lines += [f"{scores[token]:.4f} {word}" for token, word in zip(best, words, strict=True)]
        return TaskAnswer({"masks": masks}, tuple(lines), len(ids))

    def warm_up(self) -> None:
        self.logits([self.facts.padding])

    def interrupt(self) -> None:
        self._session.interrupt()

    def close(self) -> None:
        self._session.close()
