"""Real engines: states that outlive them, and generations that go on in a full context."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeTokenizer, wait_until
from live_server import LiveServer, running_server

from edgelm.errors import EngineError
from exporter.checkpoint import open_checkpoint, open_source
from runtime.engine import Chunk, Engine, EngineOptions, FlashAttention, Shifter, StateKeeper
from runtime.engines.llamacpp import LlamaCppEngine, load_engine
from runtime.engines.onnx import load_engine as load_onnx_engine
from runtime.generate import GenerationRequest, Session, TokenEvent, generate
from runtime.model import open_model
from runtime.server.metrics import Metrics
from runtime.server.prompt_files import PromptCacheOptions, PromptFiles
from runtime.server.scheduler import Job, JobEvent, Scheduler
from runtime.server.supervised import SupervisedWorker
from runtime.server.worker import keep_prompts
from runtime.speculative import DRAFT_TOKENS, Speculation
from tests.parity import ROWS, make_checkpoint, write_f32
from tests.tiny.test_onnx_engine import build
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny

ROUNDING = 0.05
"""Largest difference of logits that batch shapes make: attention's probabilities pass through f16."""
PROMPT = [int(token) for token in np.random.default_rng(5).integers(0, 256, 200)]
SHARED = 160
Open = Callable[[int, int], Any]


def options(context: int, sequences: int) -> EngineOptions:
    return EngineOptions(
        context=context, sequences=sequences, threads_decode=1, threads_prefill=1, logits_rows=DRAFT_TOKENS + 1
    )


@pytest.fixture(scope="module", params=["llama.cpp", "llama.cpp q8_0", "llama.cpp plain", "onnxruntime"])
def opened(request: pytest.FixtureRequest, gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Loads a fresh engine with a context and so many sequences."""
    if request.param == "onnxruntime":
        place = tmp_path_factory.mktemp("onnx")
        path = build(make_tiny_llama(place / "source"), place / "out", lambda _: "int4-32-asym")
        return lambda context, sequences: load_onnx_engine(path, options(context, sequences))
    kv_type: Any = "q8_0" if "q8_0" in request.param else "f16"
    kind: FlashAttention = "off" if "plain" in request.param else "on"
    wanted: dict[str, Any] = {"kv_type": kv_type, "flash_attention": kind}
    return lambda context, sequences: load_engine(gguf, replace(options(context, sequences), **wanted))


@contextmanager
def engines(*made: Engine) -> Iterator[None]:
    try:
        yield
    finally:
        for engine in made:
            engine.close()


def tokens(events: Sequence[JobEvent | TokenEvent]) -> list[int | None]:
    assert all(isinstance(event, TokenEvent) for event in events)
    return [event.token for event in events if isinstance(event, TokenEvent)]


def scheduled(made: Scheduler, *wanted: GenerationRequest) -> list[list[TokenEvent]]:
    events: list[list[JobEvent]] = [[] for _ in wanted]
    for one, into in zip(wanted, events, strict=True):
        made.admit(Job(one, into.append))
    while made.running:
        made.step()
    return [[event for event in one if isinstance(event, TokenEvent)] for one in events]


def test_a_state_computes_on_in_another_engine(opened: Open) -> None:
    first, second = opened(256, 2), opened(256, 2)
    with engines(first, second):
        first.forward([Chunk(1, PROMPT[:SHARED], "none")])
        state = first.state(1)
        expected = first.forward([Chunk(1, PROMPT[SHARED:], "last")]).copy()
        first.truncate(100, 1)
        from_before = first.forward([Chunk(1, PROMPT[100:], "last")]).copy()
        second.forward([Chunk(0, PROMPT[5:50], "none"), Chunk(1, PROMPT[7:30], "none")])
        beside = second.forward([Chunk(1, [9], "last")]).copy()
        second.truncate(23, 1)
        second.restore(state, SHARED, 0)
        assert second.length(0) == SHARED
        assert np.array_equal(second.forward([Chunk(0, PROMPT[SHARED:], "last")]), expected)
        assert np.array_equal(second.forward([Chunk(1, [9], "last")]), beside)
        second.restore(state, SHARED, 1)
        second.truncate(100, 1)
        assert np.array_equal(second.forward([Chunk(1, PROMPT[100:], "last")]), from_before)


def test_bytes_that_are_no_state_leave_an_empty_sequence(opened: Open) -> None:
    engine = opened(256, 2)
    with engines(engine):
        engine.forward([Chunk(0, PROMPT[:SHARED], "none")])
        state = engine.state(0)
        for wrong, length in ((state[:-4], SHARED), (state[:0], SHARED), (state, SHARED - 1), (state, 0), (state, 999)):
            with pytest.raises(EngineError):
                engine.restore(wrong, length, 1)
            assert engine.length(1) == 0
        assert engine.length(0) == SHARED
        engine.restore(state, SHARED, 1)


def test_a_state_of_the_other_kind_of_attention_is_refused(gguf: Path) -> None:
    with_it, without = (load_engine(gguf, replace(options(256, 1), flash_attention=kind)) for kind in ("on", "off"))
    with engines(with_it, without):
        for one, other in ((with_it, without), (without, with_it)):
            one.truncate(0)
            one.forward([Chunk(0, PROMPT[:SHARED], "none")])
            state = one.state(0)
            with pytest.raises(EngineError, match="no state"):
                other.restore(state, SHARED, 0)
            assert other.length(0) == 0


def test_a_state_is_not_taken_before_a_copy_or_move_was_made(gguf: Path) -> None:
    engine = load_engine(gguf, options(256, 2))
    with engines(engine):
        engine.forward([Chunk(0, PROMPT[:SHARED], "none")])
        state = engine.state(0)
        engine.copy_prefix(0, 1, 100)
        assert engine.discard(10, 50, 0)
        for sequence in (0, 1):
            with pytest.raises(EngineError, match="next computation"):
                engine.state(sequence)
            with pytest.raises(EngineError, match="next computation"):
                engine.restore(state, SHARED, sequence)
        engine.forward([Chunk(0, [1], "none")])
        assert len(engine.state(1)) < len(state)


def test_the_first_answer_of_another_engine_computes_only_the_rest(opened: Open, tmp_path: Path) -> None:
    wanted = GenerationRequest(PROMPT, 40, shared=SHARED)
    cache = PromptCacheOptions(str(tmp_path / "prompts"))
    told: list[list[int | None]] = []
    cached: list[int] = []
    for _ in range(3):
        engine, metrics = opened(256, 2), Metrics()
        prompts = PromptFiles(cache, {"engine": engine.info.engine}, metrics.prompt_files)
        with engines(engine):
            (events,) = scheduled(Scheduler(engine, FakeTokenizer(), metrics, prompts=prompts), wanted)
            prompts.close()
        told.append(tokens(events))
        cached.append(events[0].cached_tokens)
    plain = opened(256, 2)
    with engines(plain):
        told.append(tokens(list(generate(Session(plain), FakeTokenizer(), wanted))))
    assert told == [told[0]] * 4
    assert cached == [0, SHARED, SHARED]


def test_what_a_state_depends_on_is_in_the_name_of_its_file(gguf: Path, tmp_path: Path) -> None:
    cache = PromptCacheOptions(str(tmp_path / "prompts"))
    other = tmp_path / "other.gguf"
    data = bytearray(gguf.read_bytes())
    data[-1] ^= 1  # one weight
    other.write_bytes(data)
    usual = options(256, 2)
    seen = set()
    for path, wanted in (
        (gguf, usual),
        (other, usual),
        (gguf, replace(usual, kv_type="q8_0")),
        (gguf, replace(usual, context=512)),
        (gguf, replace(usual, sequences=3)),
        (gguf, replace(usual, flash_attention="off")),
    ):
        model = open_model(path, wanted)
        prompts = keep_prompts(model, wanted, cache, Metrics())
        assert prompts is not None
        seen.add(prompts._name(PROMPT))
        prompts.close()
        model.close()
    assert len(seen) == 6


def check_exact(fresh: Engine, wanted: GenerationRequest, chosen: Sequence[int | None]) -> None:
    """Every token is the likeliest after those that are still held, all computed anew, but for rounding."""
    keep, held, full = wanted.keep or 0, list(wanted.prompt), fresh.info.context
    fresh.truncate(0)
    row = fresh.forward([Chunk(0, held)])[-1]
    for token in chosen:
        assert token is not None
        assert row[token] >= row.max() - ROUNDING
        if len(held) == full:
            del held[keep : keep + (full - keep) // 2]
            fresh.truncate(0)
            row = fresh.forward([Chunk(0, [*held, token])])[-1]
        else:
            row = fresh.forward([Chunk(0, [token])])[-1]
        held.append(token)


def test_a_stream_goes_on_in_a_full_context(opened: Open) -> None:
    wanted = GenerationRequest(PROMPT[:100], 400, keep=40)
    engine, fresh = opened(128, 1), opened(128, 1)
    with engines(engine, fresh):
        session = Session(engine)
        events = list(generate(session, FakeTokenizer(), wanted))
        assert (len(events), events[-1].finish_reason) == (400, "length")
        assert events[-1].shifted_tokens == 100 + 399 - engine.length()
        assert engine.length() == len(session.tokens) <= 128
        if isinstance(engine, Shifter):
            assert session.exact == 40
            check_exact(fresh, wanted, tokens(events)[:29])  # until the first tokens were forgotten
        else:
            check_exact(fresh, wanted, tokens(events))
        # The kept beginning is a good prefix for others, and nothing behind it where tokens were moved.
        fresh.truncate(0)
        again = GenerationRequest(list(session.tokens), 20)
        following = list(generate(session, FakeTokenizer(), again))
        plain = list(generate(Session(fresh), FakeTokenizer(), again))
        assert following[0].cached_tokens == (40 if isinstance(engine, Shifter) else len(again.prompt) - 1)
        check_exact(fresh, again, tokens(following)[:1])
        assert len(plain) == len(following)
        ended = list(generate(session, FakeTokenizer(), replace(wanted, keep=None)))
        assert (len(ended), ended[-1].finish_reason) == (29, "length")


def test_streams_beside_it_do_not_notice(opened: Open) -> None:
    long = GenerationRequest(PROMPT[:100], 300, keep=40)
    short = [GenerationRequest(PROMPT[20:60], 80), GenerationRequest(PROMPT[60:120], 60)]
    engine, fresh = opened(128, 3), opened(128, 1)
    with engines(engine, fresh):
        made = Scheduler(engine, FakeTokenizer(), Metrics())
        events = scheduled(made, long, *short)
        assert len(events[0]) == 300
        assert events[0][-1].shifted_tokens > 200
        for wanted, told in zip(short, events[1:], strict=True):
            assert len(told) == wanted.max_tokens
            check_exact(fresh, wanted, tokens(told))
        (later,) = scheduled(made, GenerationRequest(PROMPT[:100], 20))
        assert later[0].cached_tokens == 40
        check_exact(fresh, GenerationRequest(PROMPT[:100], 20), tokens(later))


def test_guesses_go_on_behind_the_gap(opened: Open) -> None:
    wanted = GenerationRequest(PROMPT[:30] * 3, 300, keep=10)
    engine, fresh = opened(128, 1), opened(128, 1)
    with engines(engine, fresh):
        session = Session(engine)
        events = list(generate(session, FakeTokenizer(), wanted, speculation=Speculation(lookup=True)))
        assert len(events) == 300
        assert events[-1].accepted_tokens > 0
        assert engine.length() == len(session.tokens)
        if not isinstance(engine, Shifter):
            check_exact(fresh, wanted, tokens(events))


def first_keys(engine: LlamaCppEngine, sequence: int) -> Any:
    """Keys of the first layer, which depend on nothing but their token and its place: (tokens, 128) of f16.

    A state ends with keys and values of the two layers, each a type, a length of a row (12 bytes) and the rows, and a
    count of no cells for every later sequence.
    """
    length = engine.length(sequence)
    state = engine.state(sequence)
    rows = 256 * length
    start = len(state) - 4 * (engine.info.sequences - 1 - sequence) - 4 * (12 + rows) + 12
    return np.frombuffer(state[start : start + rows].tobytes(), np.float16).reshape(length, 128).astype(np.float32)


def test_keys_are_turned_to_their_new_places(gguf: Path) -> None:
    engine = load_engine(gguf, options(128, 2))
    with engines(engine):
        engine.forward([Chunk(0, PROMPT[:100], "none")])
        assert engine.discard(20, 60, 0)
        engine.forward([Chunk(0, [7], "none"), Chunk(1, [*PROMPT[:20], *PROMPT[60:100], 7], "none")])
        moved, fresh = first_keys(engine, 0), first_keys(engine, 1)
        moved = np.concatenate((moved[:20], moved[21:], moved[20:21]))  # the newest token got the first free cell
        assert np.abs(fresh).max() > 0.5
        assert np.allclose(moved, fresh, rtol=0.01, atol=0.01)
        for start, end in ((5, 5), (-1, 3), (3, 62)):
            with pytest.raises(EngineError, match="cannot forget"):
                engine.discard(start, end, 0)


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "phi3"])
def test_windows_recurrent_layers_and_long_rotations_do_it_too(family: str, tmp_path: Path) -> None:
    row = next(row for row in ROWS if row.model_type == family)
    make_checkpoint(row, tmp_path / "source")
    write_f32(open_checkpoint(open_source(str(tmp_path / "source"))), tmp_path / "model.gguf")
    first, second = (load_engine(tmp_path / "model.gguf", options(128, 2)) for _ in "ab")
    with engines(first, second):
        ids = [token + 3 for token in PROMPT[:120]]
        first.forward([Chunk(0, ids[:100], "none")])
        state = first.state(0)
        expected = first.forward([Chunk(0, ids[100:], "last")]).copy()
        second.restore(state, 100, 1)
        assert np.array_equal(second.forward([Chunk(1, ids[100:], "last")]), expected)
        wanted = GenerationRequest(ids[:90], 150, keep=20)
        events = list(generate(Session(first, 1), FakeTokenizer(), wanted))
        assert (len(events), events[-1].finish_reason) == (150, "length")
        assert events[-1].shifted_tokens == 90 + 149 - first.length(1)
        if not first.info.truncates:
            check_exact(second, wanted, tokens(events))


def test_both_engines_keep_states(opened: Open) -> None:
    engine = opened(128, 1)
    with engines(engine):
        assert isinstance(engine, StateKeeper)
    with pytest.raises(EngineError, match="closed"):
        engine.state()


# A server whose engine, in its own process, is a fake that keeps states.
ENGINE = """
import sys
sys.path[:] = {path!r}
from dataclasses import replace
from pathlib import Path
from fake_engine import KeepingEngine
from live_server import fake_model
from runtime.server.engine_process import main

main(lambda path, options: replace(fake_model(KeepingEngine(context=2048, sequences=2)), artifact=Path({model!r})))
"""


@contextmanager
def supervised(prompts: Path) -> Iterator[LiveServer]:
    path = [str(Path(__file__).resolve().parents[1]), *sys.path]
    metrics = Metrics()
    command = [sys.executable, "-c", ENGINE.format(path=path, model=__file__)]
    worker = SupervisedWorker(
        Path("fake"), EngineOptions(), metrics, prompts=PromptCacheOptions(str(prompts)), command=command
    )
    with running_server(worker, metrics) as running:
        assert wait_until(lambda: worker.state == "ready", 60)
        yield running


def ask(server: LiveServer, question: str) -> tuple[str, int]:
    messages = [{"role": "system", "content": "Careful. " * 60}, {"role": "user", "content": question}]
    status, document = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 9, "temperature": 0})
    assert status == 200
    cached = document["usage"]["prompt_tokens_details"]["cached_tokens"]
    return document["choices"][0]["message"]["content"], cached


def test_an_engine_that_was_killed_finds_its_prompts_again(tmp_path: Path) -> None:
    with supervised(tmp_path / "prompts") as server:
        plain, cached = ask(server, "Who?")
        assert cached == 0
        saved = b'edgelm_prompt_files_total{event="saved"} 1.0'
        assert wait_until(lambda: saved in server.request("GET", "/metrics")[2])
        worker = server.worker
        assert isinstance(worker, SupervisedWorker)
        dead = worker.pid
        assert dead is not None
        os.kill(dead, signal.SIGKILL)
        assert wait_until(lambda: worker.state == "ready" and worker.pid not in (None, dead), 60)
        assert ask(server, "Who?") == (plain, 556)
        assert wait_until(lambda: b'{event="loaded"} 1.0' in server.request("GET", "/metrics")[2])
    with supervised(tmp_path / "prompts") as server:
        assert ask(server, "Who?") == (plain, 556)
