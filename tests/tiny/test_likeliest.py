"""Tokens that llama.cpp chooses in its graph: the same as from logits, which are there again when somebody asks.

An engine has it done where the head is on a GPU; here the CPU stands in for one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.errors import EngineError
from runtime.engine import Chunk, EngineOptions
from runtime.engines import llamacpp
from runtime.engines.llamacpp import LlamaCppEngine, load_engine
from runtime.generate import GenerationRequest, Session, generate
from runtime.model import LoadedModel, open_model
from runtime.offload import repacks_host
from runtime.probe import write_tiny_gguf
from runtime.sampling import SamplingOptions
from targets.vram import Device, OffloadPlan, VramParts

pytestmark = pytest.mark.tiny

ONE = {"threads_decode": 1, "threads_prefill": 1}
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 320, 60)]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


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
    """llama.cpp tells -1 where its device lacks the operation, and where no logit is a number."""
    engine = engine_of(model)
    expected = tokens_of(model, TOKENS[:20])
    engine.chooses = True
    monkeypatch.setattr(engine._choice, "token", lambda: -1)
    assert tokens_of(model, TOKENS[:20]) == expected
    assert not engine.chooses
    engine.chooses = True
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
    ):
        options = EngineOptions(context=64, host_repack=wanted, **ONE)
        model = llamacpp.load_weights(library, gguf, options, repack=repack, offload=offload)
        library.llama_model_free(model)
    assert seen == [(True, True), (False, True), (False, False), (False, True), (False, True)]
    assert not repacks_host(EngineOptions(host_repack=None), alone)
