"""Guesses change how often the engine is called, and nothing else: the same events, the same session, on every path."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from fake_engine import EOS, VOCABULARY, FakeEngine, FakeTokenizer, next_letter

from edgelm.errors import EngineError, UsageError
from runtime.constraint import json_schema_grammar
from runtime.engine import Chunk, EngineInfo, EngineInterruptedError, EngineOptions, Logits, common_prefix
from runtime.generate import GenerationRequest, Session, TokenEvent, TokenLogprobs, answer, generate
from runtime.model import LoadedModel, check_speculation
from runtime.sampling import SamplingOptions
from runtime.server.metrics import Metrics
from runtime.server.scheduler import Job, JobEvent, Scheduler
from runtime.server.serving import make_backend
from runtime.server.worker import Worker
from runtime.speculative import DRAFT_TOKENS, Draft, Drafter, Drafts, ModelDrafter, PromptLookup, Speculation

Said = list[tuple[int | None, str, int, str | None, TokenLogprobs | None]]
PROMPT = FakeTokenizer().encode("abcabcabc say abc and xyz, say abc")


@functools.cache
def varied_row(seed: int, spread: float) -> list[float]:
    row: list[float] = np.random.default_rng(seed).normal(0.0, spread, VOCABULARY).tolist()
    return row


@dataclass
class VariedEngine(FakeEngine):
    """Logits that depend on every token, on nothing else, and leave real choices to a sampler."""

    spread: float = 2.0

    def _row(self, sequence: int) -> list[float]:
        return varied_row(zlib.crc32(np.asarray(self.held[sequence], np.int64).tobytes()), self.spread)


@dataclass
class RepeatingEngine(FakeEngine):
    """Prefers the token that stood ``period`` places before."""

    period: int = 5

    def _row(self, sequence: int) -> list[float]:
        row = [0.0] * VOCABULARY
        held = self.held[sequence]
        row[held[-min(self.period, len(held))]] = 20.0
        return row


@dataclass
class Foreseeing:
    """Guesses what a greedy ``VariedEngine`` says; every ``wrong_every``-th guess is wrong, 0 for none."""

    wrong_every: int = 0
    engine: VariedEngine = field(default_factory=lambda: VariedEngine(context=2048))
    guesses: int = 0

    def draft(self, tokens: Sequence[int], most: int) -> Draft:
        self.engine.held[0] = list(tokens)
        found: list[int] = []
        for _ in range(most):
            row = self.engine._row(0)
            self.guesses += 1
            wrong = self.wrong_every and self.guesses % self.wrong_every == 0
            found.append(int(np.argmin(row) if wrong else np.argmax(row)))
            self.engine.held[0].append(found[-1])
        return Draft(found)


def said(events: Sequence[JobEvent] | Iterator[TokenEvent]) -> Said:
    tokens = list(events)
    assert all(isinstance(event, TokenEvent) for event in tokens)
    return [(e.token, e.text, e.number, e.finish_reason, e.logprobs) for e in tokens if isinstance(e, TokenEvent)]


SCHEMA = json_schema_grammar({"type": "object", "properties": {"a": {"type": "string", "maxLength": 12}}})
GREEDY = SamplingOptions()
WARM = SamplingOptions(temperature=0.3, top_k=40, top_p=0.95, seed=7)
REQUESTS = {
    "greedy": GenerationRequest(PROMPT, 60),
    "one token": GenerationRequest(PROMPT, 1),
    "two tokens": GenerationRequest(PROMPT, 2),
    "until the context is full": GenerationRequest(PROMPT, 1000),
    "stop tokens": GenerationRequest(PROMPT, 200, stop_tokens=frozenset(range(100, 130))),
    "stop string": GenerationRequest(PROMPT, 200, stop=("\x0e",)),
    "warm": GenerationRequest(PROMPT, 60, WARM),
    "hot": GenerationRequest(PROMPT, 60, SamplingOptions(temperature=1.5, min_p=0.01, seed=3)),
    "penalties": GenerationRequest(
        PROMPT, 60, replace(WARM, repetition_penalty=1.3, presence_penalty=1.0, frequency_penalty=0.5)
    ),
    "bias": GenerationRequest(PROMPT, 60, replace(GREEDY, logit_bias=((97, 5.0), (98, 4.5)))),
    "logprobs": GenerationRequest(PROMPT, 40, logprobs=3),
    "grammar": GenerationRequest(PROMPT, 60, stop_tokens=frozenset({EOS}), grammar=SCHEMA),
}
DRAFTERS: dict[str, Drafter | None] = {
    "lookup alone": None,
    "always right": Foreseeing(),
    "often wrong": Foreseeing(3),
    "always wrong": Foreseeing(1),
    "a model": ModelDrafter(VariedEngine(context=2048), 0.5),
}


@pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)
@pytest.mark.parametrize("kind", [VariedEngine, RepeatingEngine])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_the_events_are_those_of_plain_decoding(
    request_: GenerationRequest, kind: type[FakeEngine], drafter: Drafter | None
) -> None:
    plain = said(generate(Session(kind(context=128)), FakeTokenizer(), request_))
    session = Session(kind(context=128))
    events = list(
        generate(session, FakeTokenizer(), request_, speculation=Speculation(lookup=drafter is None, drafter=drafter))
    )
    assert said(iter(events)) == plain
    engine = session.engine
    assert isinstance(engine, FakeEngine)
    assert session.tokens == engine.held[0]
    assert 0 <= events[-1].accepted_tokens <= events[-1].drafted_tokens


def test_right_guesses_save_most_calls_and_wrong_ones_cost_little() -> None:
    def calls(speculation: Speculation | None) -> tuple[int, int, TokenEvent]:
        engine = VariedEngine(context=512)
        events = list(
            generate(Session(engine), FakeTokenizer(), GenerationRequest(PROMPT, 300), speculation=speculation)
        )
        return engine.forward_calls, engine.computed_tokens, events[-1]

    plain, computed, last = calls(None)
    assert (plain, last.drafted_tokens, last.accepted_tokens) == (300, 0, 0)
    right, _, last = calls(Speculation(drafter=Foreseeing()))
    assert right < 300 / 12
    assert last.accepted_tokens == last.drafted_tokens > 250
    wrong, computed_wrong, last = calls(Speculation(drafter=Foreseeing(1)))
    assert wrong == plain
    assert last.accepted_tokens == 0
    # Four calls' worth may be lost before the first pause, one before each of the later ones, which grow.
    assert computed_wrong - computed == last.drafted_tokens < 60


def test_a_copied_text_is_looked_up() -> None:
    engine = RepeatingEngine(context=512, period=7)
    prompt = FakeTokenizer().encode("0123456")
    events = generate(
        Session(engine), FakeTokenizer(), GenerationRequest(prompt, 200), speculation=Speculation(lookup=True)
    )
    result = answer(events, len(prompt))
    assert result.text == ("0123456" * 30)[:200]
    assert engine.forward_calls < 40
    assert result.accepted_tokens == result.drafted_tokens > 160


def test_what_is_sampled_behind_guesses_has_the_models_distribution() -> None:
    """The second token is chosen from a row of the same call that checks it as a guess: its frequencies over many seeds
    are those of softmax over the engine's logits (chi-squared, five likeliest tokens and the rest)."""
    engine = VariedEngine(spread=3.0)
    first, guesser = 65, Foreseeing(engine=VariedEngine(spread=3.0))
    engine.held[0] = [*PROMPT, first]
    logits = np.array(engine._row(0), np.float64)
    engine.held[0] = []
    logits[first] -= 100.0  # the bias that lets it come first, and twice as much in penalties once it came
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    likeliest = np.argsort(-chances)[:5]
    counts = np.zeros(6)
    rounds, checked = 400, 0
    session = Session(engine)
    for seed in range(rounds):
        sampling = SamplingOptions(
            temperature=1.0, seed=seed, logit_bias=((first, 100.0),), presence_penalty=100.0, frequency_penalty=100.0
        )
        request = GenerationRequest(PROMPT, 3, sampling)
        events = list(generate(session, FakeTokenizer(), request, speculation=Speculation(drafter=guesser)))
        assert events[0].token == first
        checked += events[-1].drafted_tokens
        place = np.flatnonzero(likeliest == events[1].token)
        counts[place[0] if len(place) else 5] += 1
    assert checked >= rounds
    expected = rounds * np.append(chances[likeliest], 1 - chances[likeliest].sum())
    assert expected.min() > 10
    # 5 degrees of freedom: chi-squared is above 20.5 once in a thousand; the seeds are fixed, so this cannot flake.
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5


def test_a_lookup_copies_what_stood_behind_the_longest_match() -> None:
    lookup = PromptLookup()
    assert lookup.draft([1, 2, 3], 4).tokens == []
    tokens = [1, 2, 3, 4, 50, 51, 9, 2, 3, 4, 60, 61, 1, 2, 3, 4]
    # (2, 3, 4) stood twice, the last time before 60; (1, 2, 3, 4) stood before 50
    assert lookup.draft(tokens, 3).tokens == [50, 51, 9]
    # of equally long matches the latest counts
    assert lookup.draft([*tokens, 7, 3, 4, 60, 8, 3, 4, 60], 2).tokens == [8, 3]
    # what repeats itself is thought to go on
    assert PromptLookup().draft([5, 6, 5, 6, 5, 6], 5).tokens == [5, 6, 5, 6, 5]
    assert PromptLookup().draft([], 5).tokens == []


def test_nothing_is_guessed_behind_an_end() -> None:
    class Fixed:
        def draft(self, tokens: Sequence[int], most: int) -> Draft:
            return Draft([1, 2, EOS, 3][:most])

    drafts = Drafts([Fixed()], frozenset({EOS}))
    assert drafts.propose([9], 10) == [1, 2]
    assert drafts.propose([9], 0) == []


def test_a_model_guesses_for_several_texts_without_reading_them_again() -> None:
    engine = FakeEngine(context=512, sequences=2)
    drafter = ModelDrafter(engine, 0.5)
    texts = [[*range(97, 117)] * 3, [*range(97, 107), *range(65, 85)]]  # ten tokens are the same
    for _ in range(10):
        for text in texts:
            draft = drafter.draft(text, 4)
            assert len(draft.tokens) == 4
            assert draft.cost == 2.0
            text.append(draft.tokens[0])
            assert draft.tokens[0] == next_letter(text[:-1])
    # The texts once, and four tokens for each of the twenty drafts but the last, which need not be computed.
    assert engine.computed_tokens < 60 + 30 + 20 * 5


def test_a_model_reads_a_long_text_in_pieces_and_stays_within_its_context() -> None:
    engine = FakeEngine(context=320)
    drafter = ModelDrafter(engine, 0.5)
    text = [97 + index % 26 for index in range(300)]
    drafts = [drafter.draft(text, 4).tokens for _ in range(3)]
    assert [len(tokens) for tokens in drafts] == [0, 0, 4]
    assert max(sum(len(tokens) for _, tokens, _ in call) for call in engine.calls) == 128
    assert len(drafter.draft([*text, *[97] * 18], 10).tokens) == 2
    assert drafter.draft([97] * 320, 10).tokens == []


def test_a_model_that_is_not_sure_guesses_nothing() -> None:
    assert ModelDrafter(VariedEngine(spread=0.1), 0.5).draft(PROMPT, 4) == Draft([], 0.5)


def test_a_model_that_failed_starts_afresh() -> None:
    engine = FakeEngine(fail_at=1)
    drafter = ModelDrafter(engine, 0.5)
    with pytest.raises(EngineError):
        drafter.draft(PROMPT, 4)
    draft = drafter.draft(PROMPT, 2)
    assert draft.tokens[0] == next_letter(PROMPT)


# --- the server's scheduler


def run(made: Scheduler, wanted: Sequence[GenerationRequest]) -> list[Said]:
    """Run all requests, admitting them as sequences become free."""
    events: list[list[JobEvent]] = [[] for _ in wanted]
    waiting = [Job(one, into.append) for one, into in zip(wanted, events, strict=True)]
    while waiting or made.running:
        while waiting and made.has_room:
            made.admit(waiting.pop(0))
        try:
            made.step()
        except EngineInterruptedError:
            continue
    return [said(one) for one in events]


@pytest.mark.parametrize("sequences", [1, 2, 4])
@pytest.mark.parametrize("kind", [VariedEngine, RepeatingEngine])
def test_the_scheduler_says_what_plain_decoding_says(kind: type[FakeEngine], sequences: int) -> None:
    requests = list(REQUESTS.values())
    plain = [said(generate(Session(kind(context=128)), FakeTokenizer(), request)) for request in requests]
    engine, metrics = kind(context=128, sequences=sequences), Metrics()
    drafter = ModelDrafter(VariedEngine(context=128, sequences=2), 0.5)
    made = Scheduler(engine, FakeTokenizer(), metrics, speculation=Speculation(lookup=True, drafter=drafter))
    assert run(made, requests) == plain
    assert 0 < metrics.total(metrics.accepted_tokens) <= metrics.total(metrics.drafted_tokens)


def test_many_streams_are_not_drafted_for() -> None:
    engine, metrics = RepeatingEngine(context=512, sequences=3), Metrics()
    made = Scheduler(engine, FakeTokenizer(), metrics, speculation=Speculation(lookup=True))
    requests = [GenerationRequest([*PROMPT, 97 + number], 40) for number in range(3)]
    run(made, requests)
    assert metrics.total(metrics.drafted_tokens) == 0
    run(made, requests[:2])
    assert metrics.total(metrics.accepted_tokens) > 40


def test_an_interrupted_check_is_repeated() -> None:
    interrupted = 0

    @dataclass
    class Interrupted(RepeatingEngine):
        def forward(self, chunks: Sequence[Chunk]) -> Logits:
            nonlocal interrupted
            if interrupted < 3 and any(chunk.logits == "all" for chunk in chunks):
                interrupted += 1
                raise EngineInterruptedError("the computation was interrupted")
            return super().forward(chunks)

    request = GenerationRequest(PROMPT, 60)
    plain = said(generate(Session(RepeatingEngine()), FakeTokenizer(), request))
    made = Scheduler(Interrupted(), FakeTokenizer(), Metrics(), speculation=Speculation(lookup=True))
    assert run(made, [request]) == [plain]
    assert interrupted == 3


# --- models


def loaded(engine: FakeEngine, tokenizer: FakeTokenizer) -> LoadedModel:
    return LoadedModel("fake", tokenizer, None, frozenset(), None, None, Path("fake.gguf"), engine)


def test_a_model_that_forgets_nothing_is_not_drafted_for() -> None:
    class Recurrent(FakeEngine):
        @property
        def info(self) -> EngineInfo:
            return replace(super().info, truncates=False, architecture="mamba")

    with pytest.raises(UsageError, match="architecture mamba keep a state"):
        check_speculation(loaded(Recurrent(), FakeTokenizer()), None)


def test_another_vocabulary_is_refused() -> None:
    class Larger(FakeEngine):
        @property
        def info(self) -> EngineInfo:
            return replace(super().info, vocabulary=300)

    class Other(FakeTokenizer):
        def token_bytes(self, token: int) -> bytes:
            return b"?" if token == 120 else super().token_bytes(token)

    model = loaded(FakeEngine(), FakeTokenizer())
    check_speculation(model, loaded(FakeEngine(), FakeTokenizer()))
    with pytest.raises(UsageError, match=r"another vocabulary \(300 tokens against 260\)"):
        check_speculation(model, loaded(Larger(), FakeTokenizer()))
    with pytest.raises(UsageError, match=r"token 120 is b'\?' against b'x'"):
        check_speculation(model, loaded(FakeEngine(), Other()))


def test_a_draft_that_cannot_compute_is_found_before_readiness() -> None:
    broken = Speculation(drafter=ModelDrafter(FakeEngine(fail_at=0), 0.5))
    worker = Worker(replace(loaded(FakeEngine(), FakeTokenizer()), speculation=broken), Metrics())
    worker.start()
    worker.wait()
    assert worker.state == "failed"
    assert worker.failure is not None
    assert "told to fail" in worker.failure.message


def test_closing_a_model_closes_its_draft() -> None:
    engine, draft = FakeEngine(), FakeEngine()
    speculation = Speculation(drafter=ModelDrafter(draft, 0.5), close=draft.close)
    replace(loaded(engine, FakeTokenizer()), speculation=speculation).close()
    assert engine.closed
    assert draft.closed


def test_encoders_take_no_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.serving.holds_task", lambda _: None)
    monkeypatch.setattr("runtime.server.serving.holds_encoder", lambda _: True)
    with pytest.raises(UsageError, match="for models that generate"):
        make_backend(Path("encoder"), EngineOptions(lookup=True), Metrics(), in_process=False)


def test_options_cross_the_border_to_the_engine_process() -> None:
    from runtime.server import wire

    options = EngineOptions(lookup=True, draft="some/bundle", logits_rows=DRAFT_TOKENS + 1)
    message = wire.unpack_to_engine(wire.pack_to_engine(wire.Load("x", options)))
    assert isinstance(message, wire.Load)
    assert message.options == options


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], (1, 2), 2), ([1, 5, 3], [1, 2, 3], 1), ([4], [1], 0)],
)
def test_common_prefix(left: Sequence[int], right: Sequence[int], expected: int) -> None:
    assert common_prefix(left, right) == expected
