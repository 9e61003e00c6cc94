"""The ONNX Runtime engine of encoder-decoders: one text read, then one token after the other written.

Two graphs: the first reads a text and gives keys and values of all its tokens for every layer of the second, which
appends one token at a time to its own cache. Knows no text and no choice of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgelm.errors import BundleError, EngineError
from runtime.engines.onnx_text import (
    Array,
    Session,
    TextFacts,
    check_context,
    check_ids,
    read_facts,
    read_text_graph,
    text_feed,
)
from runtime.onnx_header import FLOAT, INT64, OnnxModel, read_onnx_model

READER, WRITER = "seq2seq-encoder-1", "seq2seq-decoder-1"
MASK = "encoder_attention_mask"
_CACHE = re.compile(r"past_key_values\.[0-9]{1,4}\.decoder\.(?:key|value)")
_CROSS = re.compile(r"past_key_values\.[0-9]{1,4}\.encoder\.(?:key|value)")


class Seq2SeqEngine:
    """Two sessions and the state of one text. Not thread-safe, except for ``interrupt``.

    Raises ``BundleError`` when a file is missing or malformed, ``EngineError`` when ONNX Runtime refuses it.
    """

    def __init__(self, reader: Path, writer: Path, *, threads: int = 0, context: int = 0) -> None:
        written = read_onnx_model(writer)
        self._caches, self._crossing, self._inputs = _check_writer(writer, written)
        present = frozenset(_present(name) for name in self._crossing)
        self._model = read_text_graph(reader, READER, present)
        self.facts: TextFacts = read_facts(reader, self._model)
        self.context = check_context(context, self.facts, reader)
        self._reader = Session(reader, threads)
        self._writer = Session(writer, threads)
        self._wanted = ["logits", *(_present(name) for name in self._caches)]
        self._feed: dict[str, Array] = {}

    @property
    def version(self) -> str:
        """Of ONNX Runtime."""
        return self._reader.version

    @property
    def system(self) -> str:
        """Where and how it computes, in words."""
        return self._reader.system

    @property
    def threads(self) -> int:
        return self._reader.threads.count

    @property
    def load_s(self) -> float:
        return self._reader.load_s + self._writer.load_s

    def read(self, tokens: Sequence[int]) -> None:
        """Read a text; what was written before is forgotten. Raises ``ContextOverflowError`` and ``EngineError``."""
        self._reader.begin()
        self._writer.begin()
        check_ids(self.facts, tokens, self.context, "the text")
        feed = text_feed(self._model, [tokens], self.facts.padding)
        found = self._reader.run([_present(name) for name in self._crossing], feed)
        self._feed = dict(zip(self._crossing, found, strict=True))
        self._feed[MASK] = feed["attention_mask"]
        for name, shape in self._caches.items():
            self._feed[name] = np.zeros((1, shape[0], 0, shape[1]), np.float32)

    def write(self, token: int) -> npt.NDArray[np.float32]:
        """Append a token; logits (vocabulary,) of what follows it. Raises ``EngineError``."""
        if not self._feed:
            raise EngineError("no text was read yet")
        if not 0 <= token < self.facts.vocabulary:
            raise EngineError(f"token {token} is outside the vocabulary of {self.facts.vocabulary}")
        self._feed["input_ids"] = np.array([[token]], np.int64)
        logits, *caches = self._writer.run(self._wanted, {name: self._feed[name] for name in self._inputs})
        self._feed |= dict(zip(self._caches, caches, strict=True))
        row: npt.NDArray[np.float32] = logits[0, -1]
        if row.shape != (self.facts.vocabulary,):
            raise EngineError(f"the graph gave {row.shape} logits for {self.facts.vocabulary} tokens")
        return row

    def interrupt(self) -> None:
        """Stop what is computed, and all until the next ``read``. Callable from any thread."""
        self._reader.interrupt()
        self._writer.interrupt()

    def close(self) -> None:
        """Free both sessions."""
        self._feed = {}
        self._reader.close()
        self._writer.close()


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")


def _check_writer(path: Path, model: OnnxModel) -> tuple[dict[str, tuple[int, int]], list[str], list[str]]:
    """Own caches with heads and head size, caches of the text, and all inputs. Raises ``BundleError``."""
    if model.metadata.get("edgelm.graph") != WRITER:
        raise BundleError(f"{path} is no {WRITER} graph that EdgeLM exported", hint="export it again")
    caches: dict[str, tuple[int, int]] = {}
    crossing, names = [], []
    for value in model.inputs:
        shape = value.shape or ()
        if _CACHE.fullmatch(value.name) or _CROSS.fullmatch(value.name):
            heads, size = (shape[1], shape[3]) if len(shape) == 4 else (None, None)
            good = isinstance(heads, int) and isinstance(size, int) and 0 < heads < 2**16 and 0 < size < 2**16
            if value.type != FLOAT or not good:
                raise BundleError(f"{path}: {value.name} does not state its heads and their size", hint="export again")
            assert isinstance(heads, int)
            assert isinstance(size, int)
            if _CROSS.fullmatch(value.name):
                crossing.append(value.name)
            else:
                caches[value.name] = (heads, size)
        elif value.name not in ("input_ids", MASK) or value.type != INT64 or len(shape) != 2:
            raise BundleError(f"{path} has the unknown input {value.name}", hint="export it again")
        names.append(value.name)
    outputs = {value.name for value in model.outputs}
    if not caches or not crossing or "input_ids" not in names:
        raise BundleError(f"{path} does not have the inputs of its graph {WRITER}", hint="export it again")
    if outputs != {"logits", *(_present(name) for name in caches)}:
        raise BundleError(f"{path} does not have the outputs of its graph {WRITER}", hint="export it again")
    return caches, crossing, names
