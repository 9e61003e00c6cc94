"""Guesses checked by real engines: the words are the model's, the calls fewer; from command line and server, too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeTokenizer, wait_until
from live_server import running_server

from edgelm.cli.app import run_cli
from edgelm.errors import EngineError
from edgelm.report import Report
from runtime.engine import Chunk, Engine, EngineOptions, FlashAttention
from runtime.engines.onnx import load_engine as load_onnx_engine
from runtime.generate import GenerationRequest, Session, TokenEvent, generate
from runtime.model import open_model
from runtime.points import GUESSED_DEPTH
from runtime.sampling import SamplingOptions
from runtime.server.metrics import Metrics
from runtime.server.serving import make_backend
from runtime.speculative import DRAFT_TOKENS, ModelDrafter, Speculation
from runtime.tokenizer import TextTokenizer
from tests.tiny.test_onnx_engine import build
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny

ROUNDING = 0.05
"""Largest difference of logits that batch shapes make: attention's probabilities pass through f16."""
ROWS = DRAFT_TOKENS + 1


def options(context: int = 256, sequences: int = 1) -> EngineOptions:
    return EngineOptions(context=context, sequences=sequences, threads_decode=1, threads_prefill=1, logits_rows=ROWS)


def check_greedy(engine: Engine, prompt: Sequence[int], events: Sequence[TokenEvent]) -> None:
    """Every token is the likeliest by the engine's own logits, computed token by token, but for their rounding."""
    chosen = [event.token for event in events if event.token is not None]
    engine.truncate(0)
    row = engine.forward([Chunk(0, prompt)])[-1]
    for token in chosen:
        assert row[token] >= row.max() - ROUNDING
        row = engine.forward([Chunk(0, [token])])[-1]


def spoken(engine: Engine, tokenizer: TextTokenizer, request: GenerationRequest, by: Speculation) -> list[TokenEvent]:
    session = Session(engine)
    engine.truncate(0)
    events = list(generate(session, tokenizer, request, speculation=by))
    assert engine.length(0) == len(session.tokens)
    return events


@pytest.mark.parametrize("kind", ["on", "off"])
def test_llama_cpp_says_what_it_says_token_by_token(gguf: Path, kind: FlashAttention) -> None:
    usual = replace(options(), flash_attention=kind)
    model, same = open_model(gguf, replace(usual, lookup=True, draft=str(gguf))), open_model(gguf, usual)
    try:
        assert model.speculation is not None
        request = GenerationRequest(model.tokenizer.encode("abc abd abc abd abc"), 100)
        unsure = Speculation(drafter=ModelDrafter(same.engine, 0.5, least_chance=0.0))
        for speculation in (model.speculation, unsure):
            events = spoken(model.engine, model.tokenizer, request, speculation)
            check_greedy(model.engine, request.prompt, events)
            assert events[-1].accepted_tokens > 30
        warm = replace(request, sampling=SamplingOptions(temperature=0.7, seed=1))
        assert len(spoken(model.engine, model.tokenizer, warm, model.speculation)) == 100
    finally:
        model.close()
        same.close()


def test_onnx_runtime_says_what_it_says_token_by_token(tmp_path: Path) -> None:
    path = build(make_tiny_llama(tmp_path / "source"), tmp_path / "out", lambda _: "int4-32-asym")
    engine, smaller = load_onnx_engine(path, options()), load_onnx_engine(path, options())
    try:
        request = GenerationRequest(list(range(97, 123)), 100)
        by = Speculation(lookup=True, drafter=ModelDrafter(smaller, 0.5, least_chance=0.0))
        events = spoken(engine, FakeTokenizer(), request, by)
        check_greedy(engine, request.prompt, events)
        assert events[-1].accepted_tokens > 30
    finally:
        engine.close()
        smaller.close()


def test_rows_of_a_check_are_those_of_single_tokens_beside_another_sequence(gguf: Path) -> None:
    model = open_model(gguf, options(sequences=2))
    try:
        engine, tokens = model.engine, [int(token) for token in np.random.default_rng(3).integers(0, 256, ROWS)]
        engine.forward([Chunk(0, [65] * 20, "none"), Chunk(1, [66] * 9, "none")])
        together = engine.forward([Chunk(0, tokens, "all"), Chunk(1, tokens[:5], "all")]).copy()
        assert together.shape[0] == ROWS + 5
        engine.truncate(20, 0)
        engine.truncate(9, 1)
        single = [engine.forward([Chunk(0, [token])])[0].copy() for token in tokens]
        single += [engine.forward([Chunk(1, [token])])[0].copy() for token in tokens[:5]]
        assert np.allclose(together, np.array(single), rtol=0, atol=ROUNDING)
        with pytest.raises(EngineError, match=f"room for {ROWS}"):
            engine.forward([Chunk(0, [*tokens, 1], "all")])
    finally:
        model.close()


def test_run_tells_guesses(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", str(gguf), "abcabcabcabc", "--raw", "-n", "40", "--context", "128", "--threads", "1"]
    assert run_cli([*arguments, "--json", "--lookup", "--draft", str(gguf)]) == 0
    document = json.loads(capfd.readouterr().out)
    assert 0 < document["accepted_tokens"] <= document["drafted_tokens"]
    assert run_cli([*arguments, "--lookup"]) == 0
    assert "guessed, " in capfd.readouterr().err
    assert run_cli([*arguments, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["drafted_tokens"] == 0


def test_bench_counts_guesses(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(gguf), "-p", "16", "-n", "32", "-r", "2", "--threads", "1", "--no-history", "--json"]
    assert run_cli([*arguments, "--lookup", "--draft", str(gguf)]) == 0
    report = Report.model_validate_json(capfd.readouterr().out)
    decode = next(item for item in report.measurements if item.kind == "decode")
    assert (report.settings.lookup, report.settings.draft, decode.depth) == (True, "tiny.gguf", GUESSED_DEPTH)
    assert decode.drafted_tokens is not None
    assert 0 < (decode.accepted_tokens or 0) <= decode.drafted_tokens
    assert any("guesses were right" in note for note in report.notes)
    assert run_cli(arguments) == 0
    plain = Report.model_validate_json(capfd.readouterr().out)
    assert [item.drafted_tokens for item in plain.measurements] == [None, None]
    assert run_cli([*arguments, "--lookup", "--sequences", "2"]) == 2
    assert "with one sequence" in capfd.readouterr().err


def test_a_missing_draft_ends_the_command(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["run", str(gguf), "a", "--raw", "--draft", str(gguf.with_name("none.gguf"))]) != 0
    assert "none.gguf does not exist" in capfd.readouterr().err
    assert run_cli(["serve", str(gguf), str(gguf), "--port", "0", "--draft", str(gguf)]) == 2
    assert "--draft is for one BUNDLE" in capfd.readouterr().err


def test_the_server_tells_guesses_and_counts_them(gguf: Path) -> None:
    metrics = Metrics()
    asked = replace(options(sequences=2), draft=str(gguf), lookup=True)
    with running_server(make_backend(gguf, asked, metrics, in_process=False), metrics) as server:
        assert wait_until(lambda: server.request("GET", "/health/ready")[0] == 200, 60)
        wanted = json.dumps({"prompt": "abcabcabcabc", "max_tokens": 60, "temperature": 0})
        status, _, body = server.request("POST", "/v1/completions", wanted, {"Content-Type": "application/json"})
        timings = json.loads(body)["timings"]
        assert status == 200
        assert 0 < timings["accepted_tokens"] <= timings["drafted_tokens"]
        exposed = server.request("GET", "/metrics")[2].decode()
        assert f"edgelm_drafted_tokens_total {timings['drafted_tokens']:.1f}" in exposed
        assert f"edgelm_accepted_tokens_total {timings['accepted_tokens']:.1f}" in exposed
