"""The encoder seam over llama.cpp: vectors, batches, limits, and opening by bundle and by bare file."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from artifacts import write_artifact
from tiny_encoders import TEXTS, VOCABULARY, make_tiny_bert
from tiny_models import make_tiny_llama

from edgelm.errors import BundleError, ContextOverflowError, EngineError, UsageError
from exporter.checkpoint import open_checkpoint, open_source
from runtime.embedding import open_encoder, unit_length
from runtime.encoder import Encoder, EncoderOptions
from runtime.engine import EngineInterruptedError, EngineOptions
from runtime.engines.llamacpp_encoder import load_encoder
from runtime.model import open_model

pytestmark = pytest.mark.tiny
ONE = EncoderOptions(threads=1)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    make_tiny_bert(directory / "model")
    return write_artifact(open_checkpoint(open_source(str(directory / "model"))), directory / "tiny.gguf", "F32")


@pytest.fixture(scope="module")
def encoder(gguf: Path) -> Encoder:
    return load_encoder(gguf, ONE)


def random_ids(lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(5, VOCABULARY, length).tolist() for length in lengths]


def test_what_it_says_of_itself(encoder: Encoder) -> None:
    info = encoder.info
    assert (info.architecture, info.pooling, info.dimensions, info.vocabulary) == ("bert", "mean", 64, VOCABULARY)
    assert (info.context, info.context_trained, info.batch) == (96, 96, 512)


def test_vectors_do_not_depend_on_neighbours(encoder: Encoder) -> None:
    """Far more tokens than one batch, so several steps; one sequence alone gives the same vector."""
    sequences = random_ids([1, 96, 3, 40, 96, 96, 96, 96, 96, 2, 17, 5])
    together = encoder.encode(sequences)
    assert together.shape == (12, 64)
    assert together.dtype == np.float32
    alone = np.concatenate([encoder.encode([ids]) for ids in sequences])
    assert np.abs(together - alone).max() < 2e-3  # flash attention rounds to 16 bits
    assert np.abs(together[1] - together[4]).max() > 0.1
    assert encoder.encode([]).shape == (0, 64)


def test_more_sequences_than_a_step_takes(gguf: Path, encoder: Encoder) -> None:
    narrow = load_encoder(gguf, EncoderOptions(threads=1, sequences=3, batch=1))
    try:
        assert narrow.info.batch == 96  # one sequence of any allowed length
        assert narrow.info.sequences == 3
        sequences = random_ids([4] * 10)
        assert np.abs(narrow.encode(sequences) - encoder.encode(sequences)).max() < 2e-3
    finally:
        narrow.close()


def test_what_it_refuses(encoder: Encoder) -> None:
    with pytest.raises(ContextOverflowError, match="sequence 1 has 97 tokens, the encoder takes 96"):
        encoder.encode(random_ids([3, 97]))
    with pytest.raises(EngineError, match="sequence 0 has no tokens"):
        encoder.encode([[]])
    with pytest.raises(EngineError, match=f"token {VOCABULARY} is outside"):
        encoder.encode([[5, VOCABULARY]])
    with pytest.raises(EngineError, match="token -1 is outside"):
        encoder.encode([[-1]])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (EncoderOptions(context=-1), "context"),
        (EncoderOptions(batch=0), "batch must be at least 1"),
        (EncoderOptions(sequences=0), "sequences must be at least 1"),
        (EncoderOptions(sequences=1000), "at most 256 sequences"),
        (EncoderOptions(threads=-1), "threads must be between"),
    ],
)
def test_senseless_options(gguf: Path, options: EncoderOptions, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        load_encoder(gguf, options)


def test_a_context_beyond_the_positions_is_refused(gguf: Path) -> None:
    with pytest.raises(EngineError, match="97 tokens was asked for"):
        load_encoder(gguf, EncoderOptions(context=97))


def _encode_for_ever(encoder: Encoder, sequences: list[list[int]]) -> None:
    while True:  # one call may be over before the next interruption
        encoder.encode(sequences)


def test_interrupt(gguf: Path) -> None:
    encoder = load_encoder(gguf, ONE)
    sequences = random_ids([96] * 200)
    expected = encoder.encode(sequences[:1])
    stop = threading.Event()

    def keep_interrupting() -> None:
        while not stop.wait(0.0005):
            encoder.interrupt()

    thread = threading.Thread(target=keep_interrupting)
    thread.start()
    try:
        with pytest.raises(EngineInterruptedError):
            _encode_for_ever(encoder, sequences)
    finally:
        stop.set()
        thread.join()
    assert np.array_equal(encoder.encode(sequences[:1]), expected)
    encoder.close()


def test_a_closed_encoder_refuses_work(gguf: Path) -> None:
    encoder = load_encoder(gguf, ONE)
    encoder.close()
    encoder.close()
    with pytest.raises(EngineError, match="closed"):
        encoder.encode([[1]])


def test_a_bare_file_is_opened_with_its_own_words(gguf: Path) -> None:
    loaded = open_encoder(gguf, ONE)
    try:
        assert (loaded.prefix, loaded.suffix) == ((2,), (3,))
        assert loaded.normalized
        ids = loaded.text_ids(TEXTS[0])
        assert (ids[0], ids[-1]) == (2, 3)
        vectors = loaded.embed(TEXTS)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        # Sorting by length on the way does not change whose vector is whose.
        for index, text in enumerate(TEXTS):
            assert float(loaded.embed([text])[0] @ vectors[index]) > 0.9999
        assert float(vectors[0] @ vectors[1]) < 0.99
    finally:
        loaded.close()


def test_decoders_and_encoders_are_told_apart(gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is an encoder"):
        open_model(gguf, EngineOptions(context=64))
    checkpoint = open_checkpoint(open_source(str(make_tiny_llama(tmp_path / "llama", layers=1))))
    decoder = write_artifact(checkpoint, tmp_path / "llama.gguf", "F32")
    with pytest.raises(UsageError, match="generates text and makes no vectors"):
        open_encoder(decoder, ONE)
    with pytest.raises(BundleError, match="does not say how the vectors"):
        load_encoder(decoder, EncoderOptions(context=64, threads=1))


def test_unit_length_leaves_zeros_alone() -> None:
    vectors = unit_length(np.array([[3, 4], [0, 0]], np.float32))
    assert vectors.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
