"""Lets a model of the exporter's own read text, to see how large the values are that its matrices read.

Runs in ONNX Runtime, without torch: a graph that was built to be observed has the sums of squares as outputs. Knows
neither what they are for nor what a tensor is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgelm.progress import Progress
from exporter.onnx_layout import Decoder
from exporter.onnx_moments import CalibrationWindows
from runtime.engines.onnx_session import choose_threads, load_library, open_session

WINDOW, WINDOWS = 256, 8


def mean_squares(
    path: Path, decoder: Decoder, outputs: Mapping[str, str], text: CalibrationWindows, progress: Progress
) -> dict[str, npt.NDArray[np.float64]]:
    """Mean squares of every channel over a text, by the keys of ``outputs``, whose values name outputs of the model.

    Raises ``EngineError`` when ONNX Runtime cannot run it.
    """
    session = open_session(load_library(), path, choose_threads(0))
    names = list(outputs.values())
    totals: list[npt.NDArray[np.float64]] | None = None
    with progress.stage("balancing", len(text.windows), unit="windows") as stage:
        for window in text.windows:
            found = [np.asarray(value, np.float64) for value in session.run(names, _inputs(decoder, window))]
            totals = found if totals is None else [total + value for total, value in zip(totals, found, strict=True)]
            stage.advance()
    assert totals is not None
    return {key: total / text.tokens for key, total in zip(outputs, totals, strict=True)}


def _inputs(decoder: Decoder, window: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
    """A prompt that starts from nothing; all of its positions go through the last layer, too."""
    count = len(window)
    inputs: dict[str, npt.NDArray[np.generic]] = {
        "input_ids": np.asarray([window], np.int64),
        "seqlens_k": np.asarray([count - 1], np.int32),
        "total_sequence_length": np.asarray(count, np.int32),
        "logit_rows": np.arange(count, dtype=np.int64),
    }
    for index, layer in enumerate(decoder.layers):
        empty = np.zeros((1, layer.kv_heads, count, decoder.head_size), np.float32)
        inputs |= {f"past_key_values.{index}.{part}": empty for part in ("key", "value")}
    return inputs
