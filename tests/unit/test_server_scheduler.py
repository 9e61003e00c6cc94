"""The scheduler says word for word what ``generate`` says, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_engine import EOS, VOCABULARY, FakeEngine, FakeTokenizer, next_letter

from edgelm.errors import EngineError
from runtime.constraint import choice_grammar
from runtime.engine import Chunk, EngineInterruptedError, Logits
from runtime.generate import GenerationRequest, Session, TokenEvent, TokenLogprobs, generate
from runtime.sampling import SamplingOptions
from runtime.server.metrics import Metrics
from runtime.server.scheduler import SHARED_PREFILL_TOKENS, Failure, Job, JobEvent, Scheduler

TEXT = "Zürich ist größer als Genf. 🎉 Ende"


def request(
    prompt: str, max_tokens: int = 30, *stop: str, sampling: SamplingOptions | None = None
) -> GenerationRequest:
    ids = FakeTokenizer().encode(prompt)
    return GenerationRequest(ids, max_tokens, sampling or SamplingOptions(), stop, frozenset({EOS}))


def scheduler(engine: FakeEngine, batch_tokens: int = 512) -> Scheduler:
    return Scheduler(engine, FakeTokenizer(), Metrics(), batch_tokens=batch_tokens)


def job(wanted: GenerationRequest) -> tuple[Job, list[JobEvent]]:
    events: list[JobEvent] = []
    return Job(wanted, events.append), events


def run(made: Scheduler, wanted: list[GenerationRequest]) -> list[list[JobEvent]]:
    """Run all requests, admitting them as sequences become free."""
    jobs = [job(one) for one in wanted]
    waiting = [one for one, _ in jobs]
    while waiting or made.running:
        while waiting and made.has_room:
            made.admit(waiting.pop(0))
        made.step()
    return [events for _, events in jobs]


def said(events: list[JobEvent]) -> list[tuple[int | None, str, int, str | None, TokenLogprobs | None]]:
    assert all(isinstance(event, TokenEvent) for event in events)
    return [(e.token, e.text, e.number, e.finish_reason, e.logprobs) for e in events if isinstance(e, TokenEvent)]


REQUESTS = [
    request("a", 1),
    request("plain"),
    request("stopped", 60, "als"),
    request("stopped inside a character", 60, "ö"),
    request("stop that never comes", 60, "größte", "Gen."),
    request("cut inside a character", 2),
    request("cut inside the emoji", len("Zürich ist größer als Genf. ".encode()) + 2),
    request("drawn", 20, sampling=SamplingOptions(temperature=5.0, top_k=50, seed=3)),
    request("penalised", 20, sampling=SamplingOptions(repetition_penalty=8.0)),
    request("repelled", 20, sampling=SamplingOptions(presence_penalty=9.0, frequency_penalty=3.0)),
    request("pulled", 20, sampling=SamplingOptions(logit_bias=((ord("x"), 20.5),))),
    replace(request("held", 60), grammar=choice_grammar(["Zürich", "Genf", "abcdef", "größer"]), logprobs=2),
    request("long " * 40, 60),
]


@pytest.mark.parametrize("script", [TEXT, None])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("batch_tokens", [3, 512])
def test_the_events_of_generate(script: str | None, sequences: int, batch_tokens: int) -> None:
    together = run(scheduler(FakeEngine(script=script, sequences=sequences), batch_tokens), REQUESTS)
    for wanted, events in zip(REQUESTS, together, strict=True):
        alone = list(generate(Session(FakeEngine(script=script)), FakeTokenizer(), wanted))
        assert said(events) == said(list(alone))


def test_a_full_context_ends_a_generation_as_generate_ends_it() -> None:
    wanted = request("x" * 250, 100)
    (events,) = run(scheduler(FakeEngine()), [wanted])
    assert said(events) == said(list(generate(Session(FakeEngine()), FakeTokenizer(), wanted)))
    assert len(events) == 7


def test_running_streams_keep_their_pace_beside_a_long_prompt() -> None:
    engine = FakeEngine(context=2048, sequences=2)
    made = scheduler(engine)
    first, events = job(request("short", 100))
    made.admit(first)
    made.step()
    made.admit(job(request("x" * 1000, 5))[0])
    for step in range(1, 9):
        made.step()
        assert len(events) == 1 + step  # a token in every step
    sizes = [sum(len(tokens) for _, tokens, _ in call) for call in engine.calls[1:9]]
    assert max(sizes) == SHARED_PREFILL_TOKENS + 1


def test_logits_are_asked_for_only_where_a_token_is_chosen() -> None:
    engine = FakeEngine(context=2048)
    run(scheduler(engine), [request("x" * 1000, 3)])
    assert [wanted for call in engine.calls for _, _, wanted in call] == ["none", "last", "last", "last"]


def test_a_cancelled_job_ends_before_the_next_token_and_says_what_it_held_back() -> None:
    engine = FakeEngine(script="abc")
    made = scheduler(engine)
    cancelled, events = job(request("p", 30, "bX"))
    made.admit(cancelled)
    made.step()
    made.step()  # "b" may become "bX" and is held back
    calls = engine.forward_calls
    cancelled.cancelled = True
    made.step()
    assert engine.forward_calls == calls
    assert made.running == 0
    assert said(events) == [
        (97, "a", 0, None, None),
        (98, "", 1, None, None),
        (None, "b", 2, "cancelled", None),
    ]


def test_a_prompt_goes_where_least_is_lost() -> None:
    engine = FakeEngine(context=256, sequences=2)
    made = scheduler(engine)
    run(made, [request("a long conversation with a system prompt", 4)])
    run(made, [request("a short one", 4)])  # shares "a " only: the empty sequence is better
    assert engine.calls[-1][0][0] == 1
    (events,) = run(made, [request("a long conversation with a system prompt", 4)])
    assert engine.calls[-1][0][0] == 0
    assert isinstance(events[0], TokenEvent)
    assert events[0].cached_tokens == len("a long conversation with a system prompt") - 1


def test_the_lowest_free_sequence_is_taken_whatever_the_order_of_release() -> None:
    engine = FakeEngine(sequences=3)
    made = scheduler(engine)
    run(made, [request("a", 1), request("b", 2), request("c", 3)])
    for session in (0, 1, 2):
        engine.truncate(0, session)
    made.fail(Failure("all sequences are empty now"))
    made._free.reverse()
    run(made, [request("d", 2)])
    assert engine.calls[-1][0][0] == 0


def test_sequences_are_named_in_order_whoever_came_first() -> None:
    engine = FakeEngine(context=256, sequences=3)
    made = scheduler(engine)
    run(made, [request("a" * 3, 1), request("b" * 20, 8), request("c" * 40, 8), request("d" * 3, 8)])
    together = [[sequence for sequence, _, _ in call] for call in engine.calls if len(call) == 3]
    assert len(together) > 5
    assert all(sequences == [0, 1, 2] for sequences in together)


class _Copying(FakeEngine):
    copies: list[tuple[int, int, int]]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        self.copies.append((source, target, length))
        self.truncate(0, target)
        self.held[target] = self.held[source][:length]


def test_a_prefix_that_another_sequence_holds_is_copied_even_while_it_runs() -> None:
    engine = _Copying(sequences=2)
    engine.copies = []
    made = scheduler(engine)
    system = "a system prompt that is longer than forty tokens: "
    wanted = [request(system + "one", 9), request(system + "two", 9)]
    first, first_events = job(wanted[0])
    second, second_events = job(wanted[1])
    made.admit(first)
    made.step()
    made.admit(second)
    while made.running:
        made.step()
    assert engine.copies == [(0, 1, len(system))]
    for events, one in ((first_events, wanted[0]), (second_events, wanted[1])):
        assert said(events) == said(list(generate(Session(FakeEngine()), FakeTokenizer(), one)))
    assert isinstance(second_events[0], TokenEvent)
    assert second_events[0].cached_tokens == len(system)


def test_a_short_prefix_is_computed_and_not_copied() -> None:
    engine = _Copying(sequences=2)
    engine.copies = []
    made = scheduler(engine)
    first, _ = job(request("short: one", 9))
    second, events = job(request("short: two", 9))
    made.admit(first)
    made.step()
    made.admit(second)
    while made.running:
        made.step()
    assert engine.copies == []
    assert said(events) == said(list(generate(Session(FakeEngine()), FakeTokenizer(), request("short: two", 9))))


def test_one_engine_failure_fails_all_and_leaves_clean_sequences() -> None:
    engine = FakeEngine(sequences=2, fail_at=2)
    made = scheduler(engine)
    jobs = [job(request(prompt)) for prompt in ("one", "two")]
    for one, _ in jobs:
        made.admit(one)
    made.step()
    made.step()
    with pytest.raises(EngineError):
        made.step()
    made.fail(Failure("broken"))
    assert [events[-1] for _, events in jobs] == [Failure("broken")] * 2
    assert [engine.length(sequence) for sequence in (0, 1)] == [0, 0]
    (events,) = run(made, [request("one", 5)])
    assert said(events) == said(list(generate(Session(FakeEngine()), FakeTokenizer(), request("one", 5))))


class _Wrapped(FakeEngine):
    change: Callable[[Logits], Logits] = staticmethod(lambda logits: logits)

    def forward(self, chunks: list[Chunk]) -> Logits:  # type: ignore[override]
        return self.change(super().forward(chunks))


def test_values_that_are_no_numbers_fail_only_the_job_that_got_them() -> None:
    engine = _Wrapped(sequences=2)
    made = scheduler(engine)
    good, good_events = job(request("good", 5))
    bad, bad_events = job(request("bad", 5))
    made.admit(good)
    made.admit(bad)

    def spoil(logits: Logits) -> Logits:
        logits[1] = np.nan
        return logits

    engine.change = spoil
    made.step()
    assert isinstance(bad_events[0], Failure)
    engine.change = lambda logits: logits
    while made.running:
        made.step()
    assert said(good_events) == said(list(generate(Session(FakeEngine()), FakeTokenizer(), request("good", 5))))


def test_an_interrupted_step_is_simply_repeated() -> None:
    engine = _Wrapped()
    made = scheduler(engine)
    wanted = request("prompt", 5)
    admitted, events = job(wanted)
    made.admit(admitted)
    made.step()

    original = engine.forward

    def interrupted(_: object) -> Logits:
        raise EngineInterruptedError("interrupted")

    engine.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(EngineInterruptedError):
        made.step()
    engine.forward = original  # type: ignore[method-assign]
    while made.running:
        made.step()
    assert said(events) == said(list(generate(Session(FakeEngine()), FakeTokenizer(), wanted)))


def test_an_engine_that_cannot_go_back_starts_the_sequence_afresh() -> None:
    class Recurrent(FakeEngine):
        def truncate(self, length: int, sequence: int = 0) -> None:
            back = 0 < length < self.length(sequence)
            super().truncate(0 if back else length, sequence)
            if back:
                raise EngineError("the sequence was cleared")

    made = scheduler(Recurrent())
    run(made, [request("the same beginning", 5)])
    wanted = request("the same end", 5)
    (events,) = run(made, [wanted])
    assert said(events) == said(list(generate(Session(FakeEngine()), FakeTokenizer(), wanted)))


def test_the_fake_depends_on_every_token() -> None:
    # Otherwise the comparisons above would not notice a wrongly reused prefix.
    assert next_letter([1, 2, 3]) != next_letter([1, 3, 3])
    assert VOCABULARY > 256


@pytest.mark.parametrize(
    "bad", [{"grammar": "banana"}, {"sampling": SamplingOptions(temperature=-1)}, {"grammar": 'start: "a"'}]
)
def test_options_that_make_no_sense_fail_their_job_and_take_no_sequence(bad: dict[str, Any]) -> None:
    """A grammar may pass on bytes and fail on a vocabulary: here the model has no token that ends an answer."""
    made = scheduler(FakeEngine(script="ok", sequences=1))
    wanted = replace(request("ab"), stop_tokens=frozenset(), **bad)
    wrong, wrong_events = job(wanted)
    made.admit(wrong)
    (failure,) = wrong_events
    assert isinstance(failure, Failure)
    assert failure.by_request
    assert made.has_room
    assert run(made, [request("ab")])[0][-1].finish_reason == "stop"  # type: ignore[union-attr]
