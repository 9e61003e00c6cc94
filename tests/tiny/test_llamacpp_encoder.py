"""The encoder seam over llama.cpp: vectors, batches, limits, and opening by bundle and by bare file."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from artifacts import write_artifact
from tiny_encoders import TEXTS, VOCABULARY, make_tiny_bert
from tiny_models import make_tiny_llama

from edgelm.cli.app import run_cli
from edgelm.errors import BundleError, ContextOverflowError, DoesNotFitError, EngineError, UsageError
from exporter.checkpoint import open_checkpoint, open_source
from runtime import offload
from runtime.embedding import open_encoder, unit_length
from runtime.encoder import Encoder, EncoderOptions
from runtime.engine import EngineInterruptedError, EngineOptions
from runtime.engines.llamacpp import load_library
from runtime.engines.llamacpp_devices import find_devices
from runtime.engines.llamacpp_encoder import encoder_offload, load_encoder
from runtime.gguf_header import read_gguf_header
from runtime.model import open_model
from runtime.offload import layered_model
from runtime.server import serving
from runtime.server.metrics import Metrics
from runtime.server.serving import make_backend
from targets.vram import AUTO_LAYERS, RESERVE_BYTES, Device, Room, vram_parts

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


# -- on a GPU ------------------------------------------------------------------------------------------------------

CARD = Device("CUDA0", "a card", "CUDA", "gpu", 2**30, 2**30)


def test_an_encoder_has_neither_head_nor_cache_on_a_gpu(gguf: Path) -> None:
    header = read_gguf_header(gguf)
    model = layered_model(header, "tiny")
    inside = sum(tensor.size_bytes for tensor in header.tensors if tensor.name.startswith("blk."))
    assert (sum(model.layers), model.head_bytes, model.tied_bytes, model.encoder_heads) == (inside, 0, 0, 4)
    parts = vram_parts(model, Room(512, batch=512), model.most)
    assert (parts.weights_bytes, parts.kv_bytes) == (inside, 0)


@pytest.mark.parametrize("batch", [128, 512, 2048])
def test_the_room_for_a_batch_is_at_least_what_is_announced(gguf: Path, batch: int) -> None:
    """The CPU announces what flash attention leaves alive, which is less; without it more grows with the square."""
    encoder = load_encoder(gguf, EncoderOptions(batch=batch, threads=1))
    announced = encoder.info.buffers["compute"]
    encoder.close()
    model = layered_model(read_gguf_header(gguf), "tiny")
    planned = vram_parts(model, Room(batch, batch=batch), model.most).compute_bytes
    assert announced < planned < announced + (model.encoder_heads + 1) * 4 * batch * batch + 2**18


def test_the_plan_of_an_encoder_counts_its_longest_text_as_a_batch(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, library = read_gguf_header(gguf), load_library()
    monkeypatch.setattr(offload, "find_devices", lambda library: (CARD,))
    plan = encoder_offload(library, header, EncoderOptions(gpu_layers=AUTO_LAYERS), "tiny")
    assert (plan.gpu_layers, plan.most, plan.device) == (3, 3, CARD)
    assert plan.spared_bytes == plan.parts.weights_bytes
    longer = encoder_offload(library, header, EncoderOptions(context=4096, gpu_layers=AUTO_LAYERS), "tiny")
    assert longer.parts.compute_bytes > 50 * plan.parts.compute_bytes
    small = Device("CUDA0", "a card", "CUDA", "gpu", RESERVE_BYTES + 2**20, 2**30)
    monkeypatch.setattr(offload, "find_devices", lambda library: (small,))
    with pytest.raises(DoesNotFitError, match=r"3 of 3 layers of tiny need .* on CUDA0"):
        encoder_offload(library, header, EncoderOptions(gpu_layers=3), "tiny")
    assert encoder_offload(library, header, EncoderOptions(gpu_layers=AUTO_LAYERS), "tiny").device is None


def test_without_a_gpu_layers_are_refused_and_never_dropped(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offload, "find_devices", lambda library: ())
    monkeypatch.setattr(offload, "can_offload", lambda library: False)
    for options in (
        EngineOptions(context=64, gpu_layers=2),
        EngineOptions(context=64, gpu_layers=AUTO_LAYERS, gpu="CUDA0"),
    ):
        with pytest.raises(UsageError, match=r"2 layers were to go to a GPU|no GPU 'CUDA0'"):
            make_backend(gguf, options, Metrics(), in_process=False)
    assert run_cli(["run", str(gguf), "a text", "--gpu-layers", "2"]) == 2
    assert "2 layers were to go to a GPU" in capsys.readouterr().err
    monkeypatch.setattr(serving, "holds_task", lambda path: "translate")
    with pytest.raises(UsageError, match="is an ONNX model: --gpu-layers and --gpu are for GGUF"):
        make_backend(gguf, EngineOptions(gpu_layers=2), Metrics(), in_process=False)
    encoder = load_encoder(gguf, EncoderOptions(threads=1, gpu_layers=AUTO_LAYERS))
    assert encoder.info.offload is not None
    assert encoder.info.offload.reason == "this build of llama.cpp is for CPUs only"
    assert encoder.device_now() is None
    encoder.close()


@pytest.mark.gpu
def test_vectors_of_a_gpu_are_those_of_the_cpu(gguf: Path) -> None:
    device = next((found for found in find_devices(load_library()) if found.is_gpu), None)
    if device is None:
        pytest.skip("no GPU that this build of llama.cpp can use (docs/gpu.md has the builds)")
    sequences = random_ids([1, 96, 3, 40, 96, 17])
    expected = load_encoder(gguf, ONE)
    found = load_encoder(gguf, EncoderOptions(threads=1, gpu_layers=AUTO_LAYERS))
    plan, buffers = found.info.offload, found.info.buffers
    assert plan is not None
    assert (plan.gpu_layers, plan.device and plan.device.name) == (3, device.name)
    assert buffers["vram_weights"] == pytest.approx(plan.parts.weights_bytes, abs=2**16)
    assert buffers["vram_compute"] <= 1.1 * plan.parts.compute_bytes + 2**16
    cosines = (unit_length(expected.encode(sequences)) * unit_length(found.encode(sequences))).sum(axis=1)
    assert cosines.min() > 0.9999
    expected.close()
    found.close()
