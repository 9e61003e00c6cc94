"""A scripted encoder: vectors that a test can foresee, without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fake_engine import BOS, EOS, VOCABULARY, FakeTokenizer, wait_until
from live_server import LiveServer, running_server

from edgelm.errors import EngineError
from runtime.embedding import LoadedEncoder
from runtime.encoder import EncoderInfo, Vectors, check_sequences
from runtime.engine import EngineInterruptedError
from runtime.server.embedding_worker import EmbeddingWorker
from runtime.server.limits import Access
from runtime.server.metrics import Metrics


@dataclass
class FakeEncoder:
    """``runtime.encoder.Encoder`` whose vector of a sequence is (length, first, last, sum of its ids, 1).

    ``step_delay_s`` is slept in every call, so that ``interrupt`` works; ``fail_at`` names the call (counted from 0)
    that raises ``EngineError``. ``on_encode`` is called with the sequences of every call before it computes.
    """

    context: int = 32
    batch: int = 64
    sequences: int = 4
    step_delay_s: float = 0.0
    fail_at: int | None = None
    value: float = 1.0
    on_encode: Callable[[Sequence[Sequence[int]]], None] | None = None
    calls: list[list[int]] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self._interrupted = threading.Event()

    @property
    def info(self) -> EncoderInfo:
        return EncoderInfo(
            engine="fake",
            versions={"fake": "1"},
            model_name="fake",
            architecture="fake",
            vocabulary=VOCABULARY,
            dimensions=5,
            pooling="mean",
            context=self.context,
            context_trained=self.context,
            batch=self.batch,
            sequences=self.sequences,
            threads=1,
            weights_bytes=1000,
            parameters=1000,
            load_s=0.001,
            system="fake",
        )

    def encode(self, sequences: Sequence[Sequence[int]]) -> Vectors:
        self._interrupted.clear()
        check_sequences(self.info, sequences)
        if self.on_encode is not None:
            self.on_encode(sequences)
        call = len(self.calls)
        self.calls.append([len(ids) for ids in sequences])
        if self.step_delay_s and self._interrupted.wait(self.step_delay_s):
            raise EngineInterruptedError("the computation was interrupted")
        if call == self.fail_at:
            raise EngineError("the fake encoder was told to fail")
        return np.array([vector_of(ids, self.value) for ids in sequences], np.float32).reshape(len(sequences), 5)

    def interrupt(self) -> None:
        self._interrupted.set()

    def close(self) -> None:
        self.closed = True


def vector_of(ids: Sequence[int], value: float = 1.0) -> list[float]:
    """What the encoder makes of ids."""
    return [len(ids), ids[0], ids[-1], sum(ids), value]


def fake_encoder_model(encoder: FakeEncoder, *, normalized: bool = False) -> LoadedEncoder:
    """A loaded encoder that puts BOS and EOS around every text."""
    return LoadedEncoder(
        name="fake",
        artifact=Path("fake.gguf"),
        encoder=encoder,
        tokenizer=FakeTokenizer(),
        prefix=(BOS,),
        suffix=(EOS,),
        normalized=normalized,
        manifest=None,
    )


@contextmanager
def live_embedding_server(model: LoadedEncoder, access: Access | None = None) -> Iterator[LiveServer]:
    """Serve ``model`` on a free loopback port until the block ends; waits for readiness, and for every thread."""
    metrics = Metrics()
    with running_server(EmbeddingWorker(model, metrics), metrics, access) as running:
        assert wait_until(lambda: running.worker.state != "starting", 30)
        yield running
