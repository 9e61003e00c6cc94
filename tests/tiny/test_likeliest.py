"""Tokens that llama.cpp chooses in its graph: the same as from logits, which are there again when somebody asks.

An engine has it done where the head is on a GPU; here the CPU stands in for one, on which ggml calls the likeliest of
logits that are no numbers token 0.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from edgelm.errors import ContextOverflowError, EngineError
from exporter.checkpoint import open_checkpoint, open_source
from runtime.engine import Chunk, EngineInterruptedError, EngineOptions
from runtime.engines import llamacpp
from runtime.engines.llamacpp import LlamaCppEngine, load_engine
from runtime.engines.llamacpp_choice import DOUBTED
from runtime.generate import GenerationRequest, Session, generate
from runtime.model import LoadedModel, open_model
from runtime.offload import repacks_host
from runtime.sampling import SamplingOptions
from targets.vram import Device, OffloadPlan, VramParts
from tests.parity import ROWS, make_checkpoint, write_f32

pytestmark = pytest.mark.tiny

ONE = {"threads_decode": 1, "threads_prefill": 1}
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 320, 60)]


@pytest.fixture
def model(gguf: Path) -> Iterator[LoadedModel]:
    found = open_model(gguf, EngineOptions(context=256, sequences=2, batch=32, **ONE))
    yield found
    found.close()


def engine_of(model: LoadedModel) -> LlamaCppEngine:
    assert isinstance(model.engine, LlamaCppEngine)
    return model.engine


def tokens_of(model: LoadedModel, prompt: list[int], **options: Any) -> list[int | None]:
    """A whole generation; nothing of an earlier one is left in the sequence."""
    model.engine.truncate(0)
    request = GenerationRequest(prompt, 30, **options)
    return [event.token for event in generate(Session(model.engine), model.tokenizer, request)]


@pytest.mark.parametrize("length", [1, 20, 32, 50])
def test_tokens_are_those_of_the_logits(model: LoadedModel, length: int) -> None:
    engine = engine_of(model)
    assert not engine.chooses
    expected = tokens_of(model, TOKENS[:length])
    assert engine._choice.sequence is None
    engine.chooses = True
    assert tokens_of(model, TOKENS[:length]) == expected
    # A prompt of more than one batch is computed in several, with logits; what follows it is not.
    assert engine._choice.sequence == 0
    assert engine.length() == length + 29


def test_logits_come_back(model: LoadedModel) -> None:
    engine = engine_of(model)
    before = engine.forward([Chunk(0, TOKENS[:20])]).copy()
    engine.truncate(0)
    engine.chooses = True
    assert engine.likeliest(Chunk(0, TOKENS[:20])) == before[0].argmax()
    assert engine.likeliest(Chunk(1, TOKENS[:20])) == before[0].argmax()  # of the other sequence
    engine.truncate(0)
    assert np.array_equal(engine.forward([Chunk(0, TOKENS[:20])]), before)
    following = engine.forward([Chunk(0, TOKENS[20:21])]).copy()
    engine.truncate(20)
    assert engine.likeliest(Chunk(0, TOKENS[20:21])) == following[0].argmax()
    engine.truncate(20)
    assert np.array_equal(engine.forward([Chunk(0, TOKENS[20:21])]), following)
    assert engine._choice.sequence is None


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": SamplingOptions(temperature=0.8, seed=1)},
        {"sampling": SamplingOptions(repetition_penalty=1.2)},
        {"sampling": SamplingOptions(logit_bias=((5, 2.0),))},
        {"logprobs": 2},
        {"grammar": 'start: "a"', "stop_tokens": frozenset({319})},
    ],
)
def test_who_wants_more_than_the_likeliest_token_gets_logits(model: LoadedModel, options: dict[str, Any]) -> None:
    expected = tokens_of(model, TOKENS[:20], **options)
    engine_of(model).chooses = True
    assert tokens_of(model, TOKENS[:20], **options) == expected
    assert engine_of(model)._choice.sequence is None


def test_without_a_choice_there_are_logits(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp tells -1 where its device lacks the operation; with CUDA also where no logit is a number."""
    engine = engine_of(model)
    expected = tokens_of(model, TOKENS[:20])
    engine.chooses = True
    monkeypatch.setattr(engine._choice, "token", lambda: -1)
    assert tokens_of(model, TOKENS[:20]) == expected
    assert not engine.chooses
    engine.chooses, engine._choice.doubted = True, 0
    monkeypatch.setattr(engine._choice, "begin", lambda sequence: False)
    assert tokens_of(model, TOKENS[:20]) == expected
    assert not engine.chooses


def test_bad_chunks_are_refused_as_ever_and_closing_frees_the_sampler(gguf: Path) -> None:
    engine = load_engine(gguf, EngineOptions(context=64, **ONE))
    engine.chooses = True
    with pytest.raises(EngineError, match="outside the vocabulary"):
        engine.likeliest(Chunk(0, [320]))
    assert engine.likeliest(Chunk(0, TOKENS[:5], "none")) is None
    assert engine.length() == 0
    assert engine.likeliest(Chunk(0, TOKENS[:5])) is not None
    engine.close()
    assert engine._choice.sequence is None
    with pytest.raises(EngineError, match="closed"):
        engine.likeliest(Chunk(0, [1]))
    gc.collect()


def spoilt(source: Path, target: Path, tensor: str, row: int) -> Path:
    """A copy of a GGUF file with NaN in place of a norm, or of the scale of a row's first block in Q8_0."""
    shutil.copyfile(source, target)
    data = next(item.data for item in GGUFReader(target, "r+").tensors if item.name == tensor)
    if data.dtype == np.float32:
        data[:] = np.nan  # one alone is lost where the CPU rounds what it multiplies to 8 bits
    else:
        data[row, :2] = np.array([np.nan], np.float16).view(np.uint8)
    data.flush()
    return target


@pytest.fixture
def open_spoilt(gguf: Path, tmp_path: Path) -> Iterator[Any]:
    opened: list[LoadedModel] = []

    def opening(tensor: str, row: int) -> LoadedModel:
        path = spoilt(gguf, tmp_path / "spoilt.gguf", tensor, row)
        opened.append(open_model(path, EngineOptions(context=256, batch=32, **ONE)))
        engine_of(opened[0]).chooses = True
        return opened[0]

    yield opening
    opened[0].close()


@pytest.mark.parametrize(("tensor", "row"), [("output_norm.weight", 0), ("token_embd.weight", 300)])
def test_logits_that_are_no_numbers_are_an_error_every_time(open_spoilt: Any, tensor: str, row: int) -> None:
    """All of them behind a norm without number, one of them behind a row of the head, which serves as table, too."""
    model = open_spoilt(tensor, row)
    prompt = [token for token in TOKENS if token != row]
    for _ in range(2):
        with pytest.raises(EngineError, match="no finite logits"):
            tokens_of(model, prompt[:20])


def test_a_text_whose_logits_are_no_numbers_is_an_error_after_others_that_were(gguf: Path, tmp_path: Path) -> None:
    """A first choice from logits alone would not tell: only a token that later texts hold has no numbers here."""
    path = untied(gguf, tmp_path / "untied.gguf")
    path = spoilt(path, tmp_path / "spoilt.gguf", "token_embd.weight", 300)
    model = open_model(path, EngineOptions(context=256, batch=32, **ONE))
    engine_of(model).chooses = True
    prompt = [token for token in TOKENS if token != 300][:20]
    assert len(tokens_of(model, prompt)) == 30
    assert engine_of(model)._choice.sequence == 0
    with pytest.raises(EngineError, match="no finite logits"):
        tokens_of(model, [*prompt, 300])
    model.close()


def untied(source: Path, target: Path) -> Path:
    """A copy of the tiny model with a head of its own."""
    reader, writer = GGUFReader(source), GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for item in reader.tensors:
        writer.add_tensor(item.name, item.data, raw_dtype=item.tensor_type)
        if item.name == "token_embd.weight":
            writer.add_tensor("output.weight", np.array(item.data), raw_dtype=item.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_model_may_mean_token_0(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked up in logits, as are some choices behind it, and then chosen in the graph again."""
    engine = engine_of(model)
    expected = tokens_of(model, TOKENS[:20])
    engine.chooses = True
    assert tokens_of(model, TOKENS[:20]) == expected
    assert engine._choice.doubted == 0
    meant = engine._choice.token
    monkeypatch.setattr(engine._choice, "token", lambda: 0)
    assert tokens_of(model, TOKENS[:20]) == expected
    assert engine._choice.sequence is None
    assert engine._choice.doubted == DOUBTED - 30
    monkeypatch.setattr(engine._choice, "token", meant)
    for _ in range(3):
        assert tokens_of(model, TOKENS[:20]) == expected
    assert engine.chooses
    assert (engine._choice.doubted, engine._choice.sequence) == (0, 0)


@pytest.mark.parametrize(("family", "chooses"), [("lfm2", False), ("llama", True)])
def test_only_models_that_take_tokens_back_choose(family: str, chooses: bool, tmp_path: Path) -> None:
    """A doubted choice is taken back, which a recurrent state is not."""
    row = next(row for row in ROWS if row.model_type == family)
    make_checkpoint(row, tmp_path / "source")
    write_f32(open_checkpoint(open_source(str(tmp_path / "source"))), tmp_path / "model.gguf")
    options = EngineOptions(context=64, **ONE)
    engine = load_engine(tmp_path / "model.gguf", options)
    loaded = engine._loaded
    assert loaded is not None
    card = Device("CUDA0", "", "CUDA", "gpu", 1, 1)
    info = replace(engine.info, offload=OffloadPlan(3, 3, card, VramParts(0, 0, 0), "", 0))
    assert LlamaCppEngine(loaded, info, options).chooses == chooses
    assert engine.info.truncates == chooses
    engine.close()


def choosing(model: LoadedModel, chunk: Chunk) -> LlamaCppEngine:
    """The engine with a sampler set for a chunk's sequence, which holds its tokens."""
    engine = engine_of(model)
    engine.chooses, engine._choice.doubted = True, 0
    assert engine.likeliest(chunk) is not None
    assert engine._choice.sequence == chunk.sequence
    return engine


@pytest.mark.parametrize("count", [1, 30])
def test_an_interrupted_choice_leaves_what_was_there(model: LoadedModel, count: int) -> None:
    engine = choosing(model, Chunk(0, TOKENS[:20]))
    expected = engine.likeliest(Chunk(0, TOKENS[20 : 20 + count]))
    engine.truncate(20)
    # The switch is set from within the computation: before one it is cleared, and a thread would have to hit it.
    compute = engine._decode

    def interrupted(context: Any, batch: Any) -> int:
        engine.interrupt()
        status: int = compute(context, batch)
        return status

    engine._decode = interrupted
    with pytest.raises(EngineInterruptedError):
        engine.likeliest(Chunk(0, TOKENS[20 : 20 + count]))
    engine._decode = compute
    assert (engine.length(), engine._choice.sequence) == (20, 0)
    assert engine.likeliest(Chunk(0, TOKENS[20 : 20 + count])) == expected


def test_a_full_context_goes_on_or_is_refused(model: LoadedModel) -> None:
    wanted = GenerationRequest(TOKENS[:50], 300, keep=10)
    found = []
    for chooses in (False, True):
        engine_of(model).chooses = chooses
        model.engine.truncate(0)
        found.append(list(generate(Session(model.engine), model.tokenizer, wanted)))
    assert [event.token for event in found[0]] == [event.token for event in found[1]]
    assert found[1][-1].shifted_tokens == found[0][-1].shifted_tokens > 0
    model.engine.truncate(0)
    engine = choosing(model, Chunk(0, TOKENS[:20]))
    for _ in range(236):
        engine.likeliest(Chunk(0, [5]))
    for tokens in ([5], [5, 6]):
        with pytest.raises(ContextOverflowError, match="the context is 256"):
            engine.likeliest(Chunk(0, tokens))
    assert engine.length() == 256


def test_copies_and_states_while_a_sampler_is_set(model: LoadedModel) -> None:
    engine = choosing(model, Chunk(0, TOKENS[:20]))
    expected = engine.likeliest(Chunk(0, TOKENS[20:22]))
    engine.truncate(20)
    engine.copy_prefix(0, 1, 20)
    assert engine.likeliest(Chunk(1, TOKENS[20:22])) == expected
    engine.truncate(20, 1)
    state = engine.state(1)
    engine.truncate(0, 0)
    engine.restore(state, 20, 0)
    assert engine._choice.sequence == 1
    assert engine.likeliest(Chunk(0, TOKENS[20:22])) == expected


def test_two_sequences_are_computed_beside_a_sampler_when_nobody_wants_logits(model: LoadedModel) -> None:
    engine = choosing(model, Chunk(0, TOKENS[:20]))
    engine.likeliest(Chunk(0, TOKENS[20:40]))
    expected = engine.likeliest(Chunk(0, TOKENS[40:42]))
    engine.truncate(20)
    assert engine.forward([Chunk(0, TOKENS[20:40], "none"), Chunk(1, TOKENS[:40], "none")]).shape == (0, 320)
    assert engine._choice.sequence == 0
    assert engine.likeliest(Chunk(0, TOKENS[40:42])) == expected
    assert engine.likeliest(Chunk(1, TOKENS[40:42])) == expected


def test_where_the_host_s_weights_lie_is_llamacpp_s_to_know(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    library = llamacpp.load_library()
    load = library.llama_model_load_from_file

    def loading(path: bytes, parameters: Any) -> Any:
        seen.append((parameters.no_host, parameters.use_extra_bufts))
        return load(path, parameters)

    monkeypatch.setattr(library, "llama_model_load_from_file", loading)
    monkeypatch.setattr(llamacpp, "place_layers", lambda *arguments: None)
    gpu = Device("CUDA0", "", "CUDA", "gpu", 1, 1)
    plan = OffloadPlan(2, 3, gpu, VramParts(0, 0, 0), "", 0)
    alone = OffloadPlan(0, 3, None, VramParts(0, 0, 0), "", 0)
    for wanted, offload, repack in (
        (True, plan, True),
        (False, plan, True),
        (True, plan, False),
        (True, alone, True),
        (True, None, True),
        (False, alone, True),  # the draft on the CPU of a model whose other weights stay as the file has them
        (False, None, False),
    ):
        options = EngineOptions(context=64, host_repack=wanted, **ONE)
        model = llamacpp.load_weights(library, gguf, options, repack=repack, offload=offload)
        library.llama_model_free(model)
    assert seen == [(True, True), (False, True), (False, False), *[(False, True)] * 3, (False, False)]
    assert not repacks_host(EngineOptions(host_repack=None), alone)
