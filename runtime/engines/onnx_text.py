"""ONNX graphs that read whole texts at once: sequences of ids in, padded to one length, arrays out.

What encoders, heads and the first half of encoder-decoders share: notes of the exporter, one session, steps that waste
little on padding, interruption. Knows no text and not what the outputs mean.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import BundleError, ContextOverflowError, EngineError
from runtime.engine import EngineInterruptedError
from runtime.engines.onnx_session import choose_threads, first_line, load_library, open_session, runtime_errors
from runtime.onnx_header import INT64, OnnxModel, read_onnx_model, stored_bytes

Array = npt.NDArray[Any]
TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
STEP_TOKENS = 512
"""Tokens of one step, padding included: more are no faster on CPUs, and activations stay small."""


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What the exporter noted in a graph's metadata. ``padding`` is the id that fills up short sequences."""

    name: str
    architecture: str
    vocabulary: int
    context: int
    context_trained: int
    padding: int
    parameters: int
    weights_bytes: int


class Session:
    """One ONNX Runtime session. Not thread-safe, except for ``interrupt``.

    Raises ``EngineError`` when ONNX Runtime refuses the file, which has to be validated before.
    """

    def __init__(self, path: Path, threads: int) -> None:
        started = time.perf_counter()
        runtime = load_library()
        self.threads = choose_threads(threads)
        self.version = str(runtime.__version__)
        self._session: Any = open_session(runtime, path, self.threads)
        self._errors = runtime_errors(runtime)
        self._options = runtime.RunOptions()
        self._options.log_severity_level = 4
        self._interrupted = False
        self.load_s = time.perf_counter() - started

    @property
    def system(self) -> str:
        """Where and how it computes, in words."""
        return f"CPUExecutionProvider, {self.threads.count} threads, {self.threads.waiting.reason}"

    def begin(self) -> None:
        """Forget interruptions of what was computed before. Raises ``EngineError`` when it is closed."""
        if self._session is None:
            raise EngineError("the model is closed")
        self._interrupted = self._options.terminate = False

    def run(self, wanted: Sequence[str], feed: dict[str, Array]) -> list[Array]:
        """The outputs named. Raises ``EngineInterruptedError`` and ``EngineError``."""
        if self._session is None:
            raise EngineError("the model is closed")
        try:
            found: list[Array] = self._session.run(list(wanted), feed, self._options)
        except self._errors as error:
            if self._interrupted:
                raise EngineInterruptedError("the computation was interrupted") from error
            raise EngineError(f"ONNX Runtime failed to compute: {first_line(error)}") from error
        return found

    def interrupt(self) -> None:
        """Stop the ``run`` under way, and those that follow until ``begin``. Callable from any thread."""
        self._interrupted = True
        self._options.terminate = True

    def close(self) -> None:
        """Free the session."""
        self._session = None


def read_facts(path: Path, model: OnnxModel) -> TextFacts:
    """The exporter's notes. Raises ``BundleError`` for those that are missing or no counts."""
    counts = {}
    for name in ("vocabulary", "context", "context_trained", "padding", "parameters"):
        value = model.metadata.get(f"edgelm.{name}", "")
        if not re.fullmatch(r"0|[1-9][0-9]{0,14}", value):
            raise BundleError(
                f"{path}: its metadata edgelm.{name} is {value!r}, which is no count", hint="export again"
            )
        counts[name] = int(value)
    if not 0 < counts["context"] <= counts["context_trained"] < 2**31 or not 0 < counts["vocabulary"] < 2**31:
        raise BundleError(f"{path}: its metadata state no context or no vocabulary", hint="export it again")
    return TextFacts(
        name=model.metadata.get("edgelm.name", path.stem),
        architecture=model.metadata.get("edgelm.architecture", "unknown"),
        vocabulary=counts["vocabulary"],
        context=counts["context"],
        context_trained=counts["context_trained"],
        padding=counts["padding"],
        parameters=counts["parameters"],
        weights_bytes=stored_bytes(model.initializers),
    )


def read_text_graph(path: Path, graph: str, outputs: frozenset[str]) -> OnnxModel:
    """A validated file that states to be ``graph`` and takes texts. Raises ``BundleError``."""
    model = read_onnx_model(path)
    if model.metadata.get("edgelm.graph") != graph:
        raise BundleError(
            f"{path} is no {graph} graph that EdgeLM exported: its inputs are "
            f"{', '.join(value.name for value in model.inputs)[:300]}",
            hint="export the checkpoint with: edgelm export SOURCE --format onnx",
        )
    inputs = {value.name: value for value in model.inputs}
    odd = sorted(set(inputs) - TEXT_INPUTS) or sorted({"input_ids", "attention_mask"} - set(inputs))
    if odd or any(value.type != INT64 or len(value.shape or ()) != 2 for value in inputs.values()):
        raise BundleError(f"{path} does not have the inputs of its graph {graph}", hint="export it again")
    if {value.name for value in model.outputs} != outputs:
        raise BundleError(f"{path} does not have the outputs of its graph {graph}", hint="export it again")
    return model


def text_feed(model: OnnxModel, sequences: Sequence[Sequence[int]], padding: int) -> dict[str, Array]:
    """Inputs of a graph for sequences, each (sequences, longest) int64, filled up behind with ``padding``."""
    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), padding, np.int64)
    mask = np.zeros((len(sequences), longest), np.int64)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {value.name: values[value.name] for value in model.inputs}


def padded_steps(sequences: Sequence[Sequence[int]], *, batch: int, most: int) -> Iterator[list[int]]:
    """Which sequences are computed together: of like lengths, at most ``most``, with padding at most ``batch`` tokens
    if there is more than one."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    step: list[int] = []
    for index in order:
        if step and (len(step) == most or (len(step) + 1) * len(sequences[index]) > batch):
            yield step
            step = []
        step.append(index)
    if step:
        yield step


def check_ids(facts: TextFacts, tokens: Sequence[int], context: int, what: str) -> None:
    """Refuse ids that cannot be computed. Raises ``EngineError`` and ``ContextOverflowError``."""
    if len(tokens) == 0:
        raise EngineError(f"{what} has no tokens")
    if len(tokens) > context:
        raise ContextOverflowError(f"{what} has {len(tokens)} tokens, the model takes {context}", hint="shorten it")
    if min(tokens) < 0 or max(tokens) >= facts.vocabulary:
        wrong = next(token for token in tokens if not 0 <= token < facts.vocabulary)
        raise EngineError(f"token {wrong} is outside the vocabulary of {facts.vocabulary}")


def check_context(asked: int, facts: TextFacts, path: Path) -> int:
    """Tokens of one text: as asked for, or (0) as planned. Raises ``EngineError`` for more than there are positions."""
    if asked > facts.context_trained:
        raise EngineError(
            f"a context of {asked} tokens was asked for, {path.name} has {facts.context_trained} positions",
            hint=f"use --context {facts.context_trained} or less",
        )
    return asked or facts.context
