"""Generations that go on in a full context: what is kept, what is forgotten, and what nobody else may build upon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_engine import EOS, FakeEngine, FakeTokenizer, ShiftingEngine, next_letter

from edgelm.errors import UsageError
from runtime.constraint import regex_grammar
from runtime.generate import GenerationRequest, Session, TokenEvent, check_request, generate
from runtime.sampling import SamplingOptions
from runtime.server.metrics import Metrics
from runtime.server.scheduler import SHARED_PREFILL_TOKENS, Job, JobEvent, Scheduler
from runtime.speculative import Speculation

CONTEXT = 64
KINDS = [FakeEngine, ShiftingEngine]


def request(prompt: str, max_tokens: int, keep: int | None) -> GenerationRequest:
    return GenerationRequest(FakeTokenizer().encode(prompt), max_tokens, keep=keep)


def expected(wanted: GenerationRequest, context: int = CONTEXT) -> list[int]:
    """The rule, written down once more: in a full context the older half behind ``keep`` goes."""
    held, said = list(wanted.prompt), list[int]()
    assert wanted.keep is not None
    while len(said) < wanted.max_tokens:
        said.append(next_letter(held))
        if len(held) == context:
            del held[wanted.keep : wanted.keep + (context - wanted.keep) // 2]
        held.append(said[-1])
    return said


def tokens(events: Sequence[TokenEvent | JobEvent]) -> list[int | None]:
    assert all(isinstance(event, TokenEvent) for event in events)
    return [event.token for event in events if isinstance(event, TokenEvent)]


def scheduled(made: Scheduler, wanted: Sequence[GenerationRequest]) -> list[list[JobEvent]]:
    events: list[list[JobEvent]] = [[] for _ in wanted]
    for one, into in zip(wanted, events, strict=True):
        made.admit(Job(one, into.append))
    while made.running:
        made.step()
    return events


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 1, 20, CONTEXT - 2])
@pytest.mark.parametrize("prompt", ["short", "x" * (CONTEXT - 1), "y" * CONTEXT])
def test_a_stream_goes_on_in_a_full_context(kind: type[FakeEngine], keep: int, prompt: str) -> None:
    wanted = request(prompt, 300, keep)
    engine = kind(context=CONTEXT)
    events = list(generate(Session(engine), FakeTokenizer(), wanted))
    assert tokens(events) == expected(wanted)
    assert events[-1].finish_reason == "length"
    assert events[-1].shifted_tokens == len(prompt) + 299 - engine.length()


@pytest.mark.parametrize("kind", KINDS)
def test_without_being_asked_an_answer_ends_with_the_context(kind: type[FakeEngine]) -> None:
    events = list(generate(Session(kind(context=CONTEXT)), FakeTokenizer(), request("x" * 60, 300, None)))
    assert (len(events), events[-1].finish_reason, events[-1].shifted_tokens) == (5, "length", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [3, 512])
def test_the_scheduler_says_the_same_and_others_do_not_notice(kind: type[FakeEngine], batch_tokens: int) -> None:
    wanted = [request("one", 200, 1), request("another one", 40, None), request("a third", 90, 5)]
    made = Scheduler(kind(context=CONTEXT, sequences=3), FakeTokenizer(), Metrics(), batch_tokens=batch_tokens)
    for one, events in zip(wanted, scheduled(made, wanted), strict=True):
        alone = list(generate(Session(kind(context=CONTEXT)), FakeTokenizer(), one))
        assert tokens(events) == tokens(alone)
        assert isinstance(events[-1], TokenEvent)
        assert events[-1].shifted_tokens == alone[-1].shifted_tokens


def test_others_keep_their_pace_while_one_is_read_again() -> None:
    engine = FakeEngine(context=1024, sequences=2)
    made = Scheduler(engine, FakeTokenizer(), Metrics())
    first, second = list[JobEvent](), list[JobEvent]()
    made.admit(Job(request("x" * 1018, 20, 0), first.append))
    made.admit(Job(request("short", 200, None), second.append))
    while len(second) < 1:
        made.step()
    calls = engine.forward_calls
    while len(first) < 20:
        before = len(second)
        made.step()
        assert len(second) == before + 1
    sizes = [sum(len(chunk) for _, chunk, _ in call) for call in engine.calls[calls:]]
    assert max(sizes) == SHARED_PREFILL_TOKENS + 1


@pytest.mark.parametrize("kind", KINDS)
def test_speculation_changes_nothing(kind: type[FakeEngine]) -> None:
    class Repeating(kind):  # type: ignore[misc,valid-type]
        """Prefers what stood eleven places before, and now and then something else."""

        def _row(self, sequence: int) -> list[float]:
            row: list[float] = super()._row(sequence)
            held = self.held[sequence]
            if sum(held) % 13:
                row[held[-min(11, len(held))]] = 30.0
            return row

    wanted, speculation = request("abcdefghijk", 300, 3), Speculation(lookup=True)
    plain = list(generate(Session(Repeating(context=CONTEXT)), FakeTokenizer(), wanted))
    guessed = list(generate(Session(Repeating(context=CONTEXT)), FakeTokenizer(), wanted, speculation=speculation))
    assert tokens(guessed) == tokens(plain)
    assert guessed[-1].accepted_tokens > 30
    assert guessed[-1].shifted_tokens == plain[-1].shifted_tokens > 0
    made = Scheduler(Repeating(context=CONTEXT), FakeTokenizer(), Metrics(), speculation=speculation)
    assert tokens(scheduled(made, [wanted])[0]) == tokens(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_and_grammars_go_on(kind: type[FakeEngine]) -> None:
    wanted = replace(
        request("abc", 200, 1),
        sampling=SamplingOptions(repetition_penalty=1.2, frequency_penalty=0.5),
        grammar=regex_grammar("(x[0-9]){300}"),
        stop_tokens=frozenset({EOS}),
    )
    events = list(generate(Session(kind(context=CONTEXT)), FakeTokenizer(), wanted))
    text = "".join(event.text for event in events)
    assert len(text) == 200
    assert set(text[::2]) == {"x"}
    assert set(text[1::2]) <= set("0123456789")


def test_what_was_moved_is_no_prefix_for_others() -> None:
    engine = ShiftingEngine(context=CONTEXT, sequences=1)
    session = Session(engine)
    list(generate(session, FakeTokenizer(), request("0123456789" * 5, 40, 10)))
    moved = list(session.tokens)
    assert (len(moved), session.exact) == (len(engine.held[0]), 10)
    events = list(generate(session, FakeTokenizer(), GenerationRequest(moved, 3)))
    assert events[0].cached_tokens == 10
    assert session.exact is None
    events = list(generate(session, FakeTokenizer(), GenerationRequest(session.tokens[:30], 3)))
    assert events[0].cached_tokens == 29


def test_what_was_read_again_is_a_prefix_as_any_other() -> None:
    session = Session(FakeEngine(context=CONTEXT))
    list(generate(session, FakeTokenizer(), request("0123456789" * 5, 40, 10)))
    events = list(generate(session, FakeTokenizer(), GenerationRequest(list(session.tokens), 3)))
    assert events[0].cached_tokens == len(session.tokens) - 3


class CopyingEngine(ShiftingEngine):
    """Copies prefixes as well."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.held[target] = self.held[source][:length]


def test_what_was_moved_is_not_copied() -> None:
    engine = CopyingEngine(context=256, sequences=2)
    made = Scheduler(engine, FakeTokenizer(), Metrics())
    first: list[JobEvent] = []
    made.admit(Job(request("s" * 60 + "x" * 190, 200, 60), first.append))
    while engine.length(0) > 200 or len(first) < 10:
        made.step()
    second: list[JobEvent] = []
    made.admit(Job(GenerationRequest(list(engine.held[0]), 2), second.append))
    while len(second) < 2:
        made.step()
    assert isinstance(second[0], TokenEvent)
    assert second[0].cached_tokens == 60


def test_a_state_that_cannot_be_cut_is_read_from_the_start() -> None:
    class Recurrent(FakeEngine):
        @property
        def info(self):  # type: ignore[no-untyped-def]
            return replace(super().info, truncates=False)

        def truncate(self, length: int, sequence: int = 0) -> None:
            assert length in (0, self.length(sequence))
            super().truncate(length, sequence)

    wanted = request("state", 200, 4)
    assert tokens(list(generate(Session(Recurrent(context=CONTEXT)), FakeTokenizer(), wanted))) == expected(wanted)


def test_a_client_that_leaves_while_it_is_read_again_is_noticed() -> None:
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return len(engine.calls) > 2 and len(engine.calls[-1][0][1]) > 100

    engine = FakeEngine(context=2048)
    events = list(generate(Session(engine), FakeTokenizer(), request("x" * 2047, 300, 0), cancelled=cancelled))
    assert events[-1].finish_reason == "cancelled"
    assert len(events) < 10


def test_what_cannot_be_kept_is_refused() -> None:
    check_request(request("x", 5, CONTEXT - 2), CONTEXT)
    for keep in (-1, CONTEXT - 1):
        with pytest.raises(UsageError, match="keep"):
            check_request(request("x", 5, keep), CONTEXT)
    with pytest.raises(UsageError, match="shared"):
        check_request(replace(request("x", 5, 0), shared=2), CONTEXT)
