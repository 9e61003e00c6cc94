"""The narrow seam between what turns texts into vectors and everything that uses one.

Sequences of token ids in, one pooled float32 vector for each out. No text, no HTTP, no scaling to length one: that is
the bundle's business (``runtime.embedding``). Implementations stand in ``engines/``. As engines, encoders are not
thread-safe: one owner calls at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgelm.bundle import Pooling
from edgelm.errors import ContextOverflowError, EngineError, UsageError
from targets.vram import OffloadPlan

Vectors = npt.NDArray[np.float32]
THREADS_LIMIT = 512


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """How to load an encoder.

    ``context`` is the most tokens of one sequence, 0 for as many as the model has positions. ``batch`` is the most
    tokens computed in one step, over all its sequences; it is raised to ``context``, since attention looks both ways
    and a sequence cannot be computed in parts. ``sequences`` is the most sequences of one step. ``threads`` of 0 means:
    ask the host (``targets.host``). ``mmap`` maps the file instead of copying it into anonymous memory. ``gpu_layers``
    and ``gpu`` are those of ``runtime.engine.EngineOptions``.
    """

    context: int = 0
    batch: int = 512
    sequences: int = 64
    threads: int = 0
    mmap: bool = True
    gpu_layers: int = 0
    gpu: str = ""


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What a loaded encoder says of itself. Sizes in bytes, ``dimensions`` is the length of a vector. ``buffers`` and
    ``offload`` are those of ``runtime.engine.EngineInfo``."""

    engine: str
    versions: dict[str, str]
    model_name: str
    architecture: str
    vocabulary: int
    dimensions: int
    pooling: Pooling
    context: int
    context_trained: int
    batch: int
    sequences: int
    threads: int
    weights_bytes: int
    parameters: int
    load_s: float
    system: str
    buffers: dict[str, int] = field(default_factory=dict)
    offload: OffloadPlan | None = None


class Encoder(Protocol):
    """A loaded model that makes one vector of each sequence."""

    @property
    def info(self) -> EncoderInfo:
        """Facts that do not change while the encoder lives."""
        ...

    def encode(self, sequences: Sequence[Sequence[int]]) -> Vectors:
        """Pooled vectors, float32 of shape (sequences, dimensions), in the order given; not normalised.

        The ids are taken as they are: whoever calls puts [CLS] and its like around them. Any number of sequences is
        allowed, each with 1 to ``info.context`` tokens; they are computed in as many steps as it takes. The array
        belongs to the caller.

        Raises ``ContextOverflowError`` or ``EngineError`` before anything is computed for what cannot be, and
        ``EngineInterruptedError`` or ``EngineError`` when the computation ends early. Nothing is kept between calls.
        """
        ...

    def interrupt(self) -> None:
        """Stop the ``encode`` under way, which then raises ``EngineInterruptedError``. Callable from any thread."""
        ...

    def close(self) -> None:
        """Free the model. Calling it twice is allowed, any other use afterwards is not."""
        ...


def check_encoder_options(options: EncoderOptions) -> None:
    """Refuse options that make no sense for any encoder. Raises ``UsageError``."""
    if options.context < 0:
        raise UsageError(f"context must be at least 1, or 0 for the model's own, not {options.context}")
    for name in ("batch", "sequences"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} must be at least 1, not {getattr(options, name)}")
    if not 0 <= options.threads <= THREADS_LIMIT:
        raise UsageError(f"threads must be between 0 (ask the host) and {THREADS_LIMIT}, not {options.threads}")


def check_sequences(info: EncoderInfo, sequences: Sequence[Sequence[int]]) -> None:
    """What every encoder refuses before it computes anything, as ``Encoder.encode`` promises."""
    for index, tokens in enumerate(sequences):
        if len(tokens) == 0:
            raise EngineError(f"sequence {index} has no tokens")
        if len(tokens) > info.context:
            raise ContextOverflowError(
                f"sequence {index} has {len(tokens)} tokens, the encoder takes {info.context}",
                hint="use a shorter text, or split it",
            )
        if min(tokens) < 0 or max(tokens) >= info.vocabulary:
            wrong = next(token for token in tokens if not 0 <= token < info.vocabulary)
            raise EngineError(f"token {wrong} is outside the vocabulary of {info.vocabulary}")


def steps(sequences: Sequence[Sequence[int]], *, batch: int, most: int) -> list[range]:
    """Which sequences go into each step: neighbours, at most ``most`` of them with ``batch`` tokens together."""
    found: list[range] = []
    start = tokens = 0
    for index, ids in enumerate(sequences):
        if index > start and (tokens + len(ids) > batch or index - start == most):
            found.append(range(start, index))
            start, tokens = index, 0
        tokens += len(ids)
    if start < len(sequences):
        found.append(range(start, len(sequences)))
    return found
