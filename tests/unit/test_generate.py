"""The generator on the scripted engine: stops, limits, cancellation, prefix reuse, timings."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter

from edgelm.errors import ContextOverflowError, EngineError, UsageError
from runtime.engine import EngineInfo
from runtime.generate import (
    PREFILL_STEP_TOKENS,
    Continuation,
    GenerationRequest,
    LikelyToken,
    Session,
    StopScanner,
    TokenEvent,
    TokenLogprobs,
    answer,
    generate,
)
from runtime.sampling import SamplingOptions
from tests.fake_engine import EOS, IM_END, IM_START, VOCABULARY, FakeEngine, FakeTokenizer, next_letter

TOKENIZER = FakeTokenizer()


def run(engine: FakeEngine, request: GenerationRequest, session: Session | None = None) -> list[TokenEvent]:
    return list(generate(session or Session(engine), TOKENIZER, request))


def text_of(events: list[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def prompt(text: str = "hi") -> list[int]:
    return TOKENIZER.encode(text)


def test_a_stop_token_ends_without_text() -> None:
    events = run(FakeEngine("Paris."), GenerationRequest(prompt(), 50, stop_tokens=frozenset({EOS})))
    assert text_of(events) == "Paris."
    assert [event.number for event in events] == list(range(7))
    assert events[-1].token is None
    assert events[-1].finish_reason == "stop"
    assert all(event.finish_reason is None for event in events[:-1])


def test_max_tokens_ends_with_the_last_token() -> None:
    engine = FakeEngine("Paris.")
    events = run(engine, GenerationRequest(prompt(), 3))
    assert [event.token for event in events] == [*b"Par"]
    assert events[-1].finish_reason == "length"
    assert engine.forward_calls == 3  # the prompt and two tokens: the third is not computed on


def test_a_full_context_ends_with_length() -> None:
    engine = FakeEngine(context=5)
    events = run(engine, GenerationRequest(prompt("abc"), 100))
    assert len(events) == 3  # two that fit and one that needs no room
    assert events[-1].finish_reason == "length"
    assert engine.length() == 5


@pytest.mark.parametrize(
    ("script", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("aab", ("ab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("no stop here", ("xyz", "heresy"), "no stop here"),
        ("größe", ("ö",), "gr"),
        ("ends with st", ("stop",), "ends with st"),
    ],
)
def test_stop_strings_are_never_emitted(script: str, stop: tuple[str, ...], expected: str) -> None:
    events = run(FakeEngine(script), GenerationRequest(prompt(), 50, stop=stop, stop_tokens=frozenset({EOS})))
    assert text_of(events) == expected
    assert events[-1].finish_reason == "stop"


def test_no_part_of_a_stop_string_is_shown_before_it_is_certain() -> None:
    events = run(FakeEngine("a<|e|>"), GenerationRequest(prompt(), 50, stop=("<|end|>",), stop_tokens=frozenset({EOS})))
    assert [event.text for event in events] == ["a", "", "", "", "<|e|", ">", ""]


def test_stop_string_reached_by_the_last_allowed_token_counts_as_stop() -> None:
    events = run(FakeEngine("abX"), GenerationRequest(prompt(), 3, stop=("X",)))
    assert text_of(events) == "ab"
    assert events[-1].finish_reason == "stop"


def test_half_characters_wait_for_their_rest() -> None:
    events = run(FakeEngine("é🎉"), GenerationRequest(prompt(), 50, stop_tokens=frozenset({EOS})))
    assert [event.text for event in events] == ["", "é", "", "", "", "🎉", ""]


def test_a_character_cut_off_by_the_limit_shows_as_replacement() -> None:
    assert text_of(run(FakeEngine("a🎉"), GenerationRequest(prompt(), 3))) == "a\ufffd"


def test_times_and_cache_stand_on_the_first_event_only() -> None:
    events = run(FakeEngine("abc", step_delay_s=0.002), GenerationRequest(prompt(), 3))
    assert events[0].prefill_s is not None
    assert 0.002 <= events[0].prefill_s <= events[0].elapsed_s
    assert [event.prefill_s for event in events[1:]] == [None, None]
    assert [event.elapsed_s for event in events] == sorted(event.elapsed_s for event in events)


def test_cancellation_is_asked_before_every_engine_call() -> None:
    engine = FakeEngine()
    stopping = threading.Event()
    events = []
    for event in generate(Session(engine), TOKENIZER, GenerationRequest(prompt(), 100), cancelled=stopping.is_set):
        events.append(event)
        if len(events) == 4:
            stopping.set()
    assert len(events) == 5
    assert events[-1].finish_reason == "cancelled"
    assert events[-1].token is None
    assert engine.forward_calls == 4


def test_a_long_prompt_is_cancelled_between_batches() -> None:
    engine = FakeEngine(context=10 * PREFILL_STEP_TOKENS)
    request = GenerationRequest([65] * (5 * PREFILL_STEP_TOKENS), 10)
    events = list(generate(Session(engine), TOKENIZER, request, cancelled=lambda: engine.forward_calls == 2))
    assert [event.finish_reason for event in events] == ["cancelled"]
    assert engine.forward_calls == 2


def test_an_interrupted_engine_counts_as_cancelled_and_keeps_the_session() -> None:
    engine = FakeEngine(step_delay_s=30)
    session = Session(engine)
    threading.Timer(0.05, engine.interrupt).start()
    events = run(engine, GenerationRequest(prompt(), 10), session)
    assert [event.finish_reason for event in events] == ["cancelled"]
    assert session.tokens == engine.held[0] == []


def test_the_second_turn_computes_only_what_is_new() -> None:
    engine = FakeEngine()
    session = Session(engine)
    first = run(engine, GenerationRequest(prompt("hello"), 4), session)
    follow_up = [*prompt("hello"), *(event.token for event in first if event.token is not None), *prompt(" again")]
    before = engine.computed_tokens
    second = run(engine, GenerationRequest(follow_up, 1), session)
    assert second[0].cached_tokens == len("hello") + 3  # the fourth token was emitted, not yet computed
    assert engine.computed_tokens - before == len(follow_up) - second[0].cached_tokens
    fresh = FakeEngine()
    assert second[0].token == run(fresh, GenerationRequest(follow_up, 1))[0].token == next_letter(follow_up)


def test_a_diverging_prompt_forgets_the_rest() -> None:
    engine = FakeEngine()
    session = Session(engine)
    run(engine, GenerationRequest(prompt("abcdef"), 3), session)
    events = run(engine, GenerationRequest(prompt("abcXYZ"), 1), session)
    assert events[0].cached_tokens == 3
    assert engine.held[0] == session.tokens == prompt("abcXYZ")
    assert events[0].token == next_letter(prompt("abcXYZ"))


class ForgetsNothing(FakeEngine):
    """As models with recurrent layers: a sequence goes on or starts anew."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, truncates=False)

    def truncate(self, length: int, sequence: int = 0) -> None:
        if 0 < length < self.length(sequence):
            raise EngineError("cannot be truncated")
        super().truncate(length, sequence)


def test_a_state_that_forgets_nothing_goes_on_or_starts_anew() -> None:
    engine = ForgetsNothing()
    session = Session(engine)
    first = run(engine, GenerationRequest(prompt("hello"), 4), session)
    follow_up = [*prompt("hello"), *(event.token for event in first if event.token is not None), *prompt(" again")]
    second = run(engine, GenerationRequest(follow_up, 1), session)
    assert second[0].cached_tokens == len("hello") + 3
    assert second[0].token == next_letter(follow_up)
    third = run(engine, GenerationRequest(prompt("help"), 1), session)
    assert third[0].cached_tokens == 0
    assert engine.held[0] == session.tokens == prompt("help")
    assert third[0].token == next_letter(prompt("help"))


def test_the_same_prompt_again_computes_its_last_token() -> None:
    engine = FakeEngine()
    session = Session(engine)
    first = run(engine, GenerationRequest(prompt("abc"), 1), session)
    second = run(engine, GenerationRequest(prompt("abc"), 1), session)
    assert second[0].cached_tokens == 2
    assert first[0].token == second[0].token


def test_leaving_mid_way_keeps_session_and_engine_alike() -> None:
    engine = FakeEngine()
    session = Session(engine)
    events = generate(session, TOKENIZER, GenerationRequest(prompt(), 100))
    for _ in range(5):
        next(events)
    events.close()  # type: ignore[attr-defined]
    assert session.tokens == engine.held[0]
    assert run(engine, GenerationRequest(prompt(), 2), session)


def test_a_failing_engine_leaves_an_empty_session() -> None:
    engine = FakeEngine(fail_at=2)
    session = Session(engine)
    with pytest.raises(EngineError, match="told to fail"):
        run(engine, GenerationRequest(prompt(), 10), session)
    assert session.tokens == engine.held[0] == []
    assert text_of(run(engine, GenerationRequest(prompt(), 3), session))


class TwoLetters(FakeEngine):
    """Prefers "a" to "b" a little, always."""

    def _row(self, sequence: int) -> list[float]:
        row = [0.0] * VOCABULARY
        row[ord("a")], row[ord("b")] = 20.0, 19.0
        return row


def test_repetition_penalty_sees_prompt_and_answer() -> None:
    request = GenerationRequest(prompt("zz"), 3, sampling=SamplingOptions(repetition_penalty=2.0))
    assert text_of(run(TwoLetters(), request)) == "aba"
    request = GenerationRequest(prompt("a"), 3, sampling=SamplingOptions(repetition_penalty=2.0))
    assert text_of(run(TwoLetters(), request)) == "baa"


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (GenerationRequest([], 5), "prompt is empty"),
        (GenerationRequest([65], 0), "max_tokens"),
        (GenerationRequest([65], 5, stop=("ok", "")), "stop string is empty"),
        (GenerationRequest([65], 5, sampling=SamplingOptions(temperature=-1)), "temperature"),
    ],
)
def test_senseless_requests_fail_at_once(request_: GenerationRequest, match: str) -> None:
    engine = FakeEngine()
    with pytest.raises(UsageError, match=match):
        generate(Session(engine), TOKENIZER, request_)
    assert engine.forward_calls == 0


def test_a_prompt_that_does_not_fit_fails_at_once() -> None:
    engine = FakeEngine(context=4)
    with pytest.raises(ContextOverflowError, match=r"5 tokens.*holds 4"):
        generate(Session(engine), TOKENIZER, GenerationRequest([65] * 5, 5))
    assert run(engine, GenerationRequest([65] * 4, 5))[-1].finish_reason == "length"


def test_an_answer_sums_up_its_events() -> None:
    shown: list[str] = []
    engine = FakeEngine("abc", step_delay_s=0.002)
    request = GenerationRequest(prompt("hello"), 50, stop_tokens=frozenset({EOS}))
    result = answer(generate(Session(engine), TOKENIZER, request), 5, shown.append)
    assert (result.text, "".join(shown)) == ("abc", "abc")
    assert (result.prompt_tokens, result.completion_tokens, result.finish_reason) == (5, 3, "stop")
    assert result.decode_steps == 3
    assert result.decode_tps is not None
    assert 0 < result.decode_tps < 500
    assert result.prefill_tps is not None
    assert 0 < result.prefill_tps < 2500


def test_a_scanner_without_stop_strings_holds_nothing_back() -> None:
    scanner = StopScanner(())
    assert scanner.push("abc") == ("abc", False)
    assert scanner.flush() == ""


def test_what_crosses_a_process_border_survives_json() -> None:
    request = GenerationRequest(
        prompt=[1, 2],
        max_tokens=5,
        sampling=SamplingOptions(
            temperature=0.5, presence_penalty=0.5, logit_bias=((3, -100.0), (4, 1.5)), seed=2**63 - 1
        ),
        stop=("a", "\u2028"),
        stop_tokens=frozenset({7, 8}),
        logprobs=3,
        grammar='start: "ü"',
        spelled=((9, "[TOOL_CALLS]"),),
    )
    likely = LikelyToken(5, -0.1, (0xC3,))
    event = TokenEvent(5, "é", 0, 0.5, logprobs=TokenLogprobs(likely, (likely, likely)), finish_reason="stop")
    for value in (request, event):
        adapter = TypeAdapter(type(value))
        assert adapter.validate_json(adapter.dump_json(value)) == value


def test_special_tokens_that_mark_calls_are_spelled() -> None:
    request = GenerationRequest([1, 2], 10, stop_tokens=frozenset({EOS}), spelled=((IM_START, "[TOOL_CALLS]"),))
    engine = FakeEngine(script=[IM_START, ord("["), IM_END, ord("]"), EOS])
    text = answer(generate(Session(engine), FakeTokenizer(), request), 2).text
    assert text == "[TOOL_CALLS][]"


def test_a_bias_outside_the_vocabulary_is_refused_before_anything_is_computed() -> None:
    engine = FakeEngine()
    request = GenerationRequest([1], 1, SamplingOptions(logit_bias=((VOCABULARY, 1.0),)))
    with pytest.raises(UsageError, match="logit_bias"):
        generate(Session(engine), FakeTokenizer(), request)
    assert engine.forward_calls == 0


def test_a_row_is_taken_again_only_from_the_same_array() -> None:
    continuation = Continuation(GenerationRequest(prompt(), 5), TOKENIZER, FakeEngine("Paris.").info)
    first, second = (np.full((1, VOCABULARY), value, np.float32) for value in (1, 2))
    row = continuation.only_row(first)
    assert continuation.only_row(first) is row
    assert continuation.only_row(second)[0] == 2
    assert continuation.only_row(first)[0] == 1
    first[0, 0] = 3  # the engine writes the next step's logits to the same place
    assert continuation.only_row(first)[0] == 3
