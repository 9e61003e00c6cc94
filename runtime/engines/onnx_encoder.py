"""The ONNX Runtime encoder: sequences of ids in, one pooled vector of each out.

The graph gives a vector of every token (``last_hidden_state``); pooling is done here. Knows no text, and no scaling to
length one. Importing this module does not load the library; ``load_encoder`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from edgelm.bundle import Pooling
from edgelm.errors import BundleError, EngineError, UsageError
from runtime.encoder import EncoderInfo, EncoderOptions, Vectors, check_encoder_options, check_sequences
from runtime.engines.onnx_text import (
    Session,
    check_context,
    padded_steps,
    read_facts,
    read_text_graph,
    text_feed,
)
from runtime.onnx_header import OnnxModel

GRAPH = "encoder-1"
OUTPUT = "last_hidden_state"


def load_encoder(path: Path, options: EncoderOptions) -> OnnxEncoder:
    """Load a ``model.onnx`` of an encoder that ``edgelm export`` made.

    Raises ``BundleError`` when a file is missing or malformed, ``UsageError`` for options that make no sense here and
    ``EngineError`` when ONNX Runtime refuses.
    """
    check_encoder_options(options)
    if not options.mmap:
        raise UsageError("ONNX Runtime maps weights by itself; mmap cannot be switched off", hint="leave it on")
    model = read_text_graph(path, GRAPH, frozenset({OUTPUT}))
    facts = read_facts(path, model)
    pooling = next((name for name in get_args(Pooling) if name == model.metadata.get("edgelm.pooling")), None)
    shape = model.outputs[0].shape or ()
    dimensions = shape[-1] if len(shape) == 3 else None
    if pooling is None or not isinstance(dimensions, int) or not 0 < dimensions < 2**20:
        raise BundleError(f"{path} does not say how its vectors are pooled or how long they are", hint="export again")
    context = check_context(options.context, facts, path)
    session = Session(path, options.threads)
    info = EncoderInfo(
        engine="onnxruntime",
        versions={"onnxruntime": session.version},
        model_name=facts.name,
        architecture=facts.architecture,
        vocabulary=facts.vocabulary,
        dimensions=dimensions,
        pooling=pooling,
        context=context,
        context_trained=facts.context_trained,
        batch=max(options.batch, context),
        sequences=options.sequences,
        threads=session.threads.count,
        weights_bytes=facts.weights_bytes,
        parameters=facts.parameters,
        load_s=session.load_s,
        system=session.system,
    )
    return OnnxEncoder(session, model, info, facts.padding)


class OnnxEncoder:
    """``runtime.encoder.Encoder`` over one ONNX Runtime session. Not thread-safe, except for ``interrupt``."""

    def __init__(self, session: Session, model: OnnxModel, info: EncoderInfo, padding: int) -> None:
        self._session, self._model, self._info, self._padding = session, model, info, padding

    @property
    def info(self) -> EncoderInfo:
        return self._info

    def encode(self, sequences: Sequence[Sequence[int]]) -> Vectors:
        """See ``Encoder.encode``. Sequences of like lengths share a step, whatever their order."""
        self._session.begin()
        check_sequences(self._info, sequences)
        vectors = np.empty((len(sequences), self._info.dimensions), np.float32)
        for step in padded_steps(sequences, batch=self._info.batch, most=self._info.sequences):
            feed = text_feed(self._model, [sequences[index] for index in step], self._padding)
            (states,) = self._session.run([OUTPUT], feed)
            if states.shape != (*feed["input_ids"].shape, self._info.dimensions):
                raise EngineError(f"the graph gave vectors of the shape {states.shape}")
            vectors[step] = pool(states, feed["attention_mask"], self._info.pooling)
        return vectors

    def interrupt(self) -> None:
        """See ``Encoder.interrupt``. Takes effect before the next operator of the graph."""
        self._session.interrupt()

    def close(self) -> None:
        self._session.close()


def pool(states: Vectors, mask: npt.NDArray[np.int64], pooling: Pooling) -> Vectors:
    """One vector of the vectors (sequences, tokens, dimensions) of each sequence, padding (mask 0) left out."""
    lengths = mask.sum(axis=1)
    if pooling != "mean":
        chosen: Vectors = states[np.arange(len(states)), lengths - 1 if pooling == "last" else 0]
        return chosen
    weights = mask.astype(np.float32) / lengths[:, None].astype(np.float32)
    mean: Vectors = np.matmul(weights[:, None, :], states)[:, 0]
    return mean
