"""SmolLM2 in the engine: it knows a capital, sequences are independent, sessions reuse what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import ContextOverflowError
from runtime.engine import Chunk, EngineOptions
from runtime.generate import GenerationRequest, Session, answer, generate
from runtime.model import LoadedModel, open_model
from runtime.sampling import SamplingOptions

pytestmark = pytest.mark.real

PARIS = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model(smollm2_gguf: Path) -> Iterator[LoadedModel]:
    options = EngineOptions(context=256, sequences=2, threads_decode=1, threads_prefill=1)
    loaded = open_model(smollm2_gguf, options)
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def _empty(model: LoadedModel) -> None:
    for sequence in range(2):
        model.engine.truncate(0, sequence)


def ask(model: LoadedModel, session: Session, text: str, max_tokens: int = 16) -> str:
    ids = model.tokenizer.encode(text)
    request = GenerationRequest(ids, max_tokens, stop_tokens=model.stop_tokens)
    return answer(generate(session, model.tokenizer, request), len(ids)).text


def test_the_capital_of_france(model: LoadedModel) -> None:
    ids = model.tokenizer.encode(PARIS)
    request = GenerationRequest(ids, 30, stop_tokens=model.stop_tokens)
    result = answer(generate(Session(model.engine), model.tokenizer, request), len(ids))
    assert "Paris" in result.text
    assert result.finish_reason == "stop"
    assert "<|im_end|>" not in result.text


def test_what_the_file_says_of_itself(model: LoadedModel) -> None:
    info = model.engine.info
    assert (info.vocabulary, info.context_trained, info.context) == (49152, 8192, 256)
    # 30 layers x 2 x 192 (3 heads of 64) x f16, two sequences of 256 tokens
    assert info.kv_bytes == 30 * 2 * 192 * 2 * 512
    assert model.stop_tokens >= {0, 2}
    assert model.bos is None
    prompt = model.chat_prompt([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(prompt, special=True) == text
    assert model.tokenizer.decode(model.text_prompt("<|im_end|>")) == "<|im_end|>"


def test_a_second_turn_reuses_the_first(model: LoadedModel) -> None:
    session = Session(model.engine)
    first = ask(model, session, PARIS)
    follow_up = PARIS + first + "<|im_end|>\n<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n"
    ids = model.tokenizer.encode(follow_up)
    events = list(generate(session, model.tokenizer, GenerationRequest(ids, 12, stop_tokens=model.stop_tokens)))
    assert events[0].cached_tokens > len(model.tokenizer.encode(PARIS))
    fresh = ask(model, Session(model.engine, sequence=1), follow_up, 12)
    assert "".join(event.text for event in events) == fresh


def test_two_sequences_decode_as_one_by_one(model: LoadedModel) -> None:
    prompts = [model.tokenizer.encode(PARIS), model.tokenizer.encode("The quick brown fox jumps over")]
    alone = []
    for prompt in prompts:
        model.engine.truncate(0)
        model.engine.forward([Chunk(0, prompt[:-1], "none")])
        alone.append(model.engine.forward([Chunk(0, prompt[-1:])])[0].copy())
    model.engine.truncate(0)
    model.engine.forward([Chunk(sequence, prompt[:-1], "none") for sequence, prompt in enumerate(prompts)])
    together = model.engine.forward([Chunk(sequence, prompt[-1:]) for sequence, prompt in enumerate(prompts)])
    # Other batch shapes take other kernels and another order of sums: equal but for rounding.
    np.testing.assert_allclose(together, np.stack(alone), rtol=0, atol=0.15)
    assert together.argmax(axis=1).tolist() == [int(row.argmax()) for row in alone]


def test_context_overflow_is_said_before_computing(model: LoadedModel) -> None:
    with pytest.raises(ContextOverflowError, match=r"257 tokens.*holds 256"):
        generate(Session(model.engine), model.tokenizer, GenerationRequest([5] * 257, 1))
    events = list(generate(Session(model.engine), model.tokenizer, GenerationRequest([5] * 255, 10)))
    assert [event.finish_reason for event in events] == [None, "length"]


def test_a_seed_repeats_an_answer(model: LoadedModel) -> None:
    def sampled(seed: int) -> str:
        sampling = SamplingOptions(temperature=1.5, top_p=0.95, seed=seed)
        request = GenerationRequest(model.tokenizer.encode("Once upon a time"), 12, sampling=sampling)
        return answer(generate(Session(model.engine), model.tokenizer, request), 4).text

    first = sampled(1)
    model.engine.truncate(0)
    assert sampled(1) == first
    model.engine.truncate(0)
    assert sampled(2) != first
