"""Messages between the server and its engine process: nothing is lost, and what is no message is refused."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace

import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from live_server import fake_model

import runtime.server.engine_process
from runtime.generate import FinishReason, GenerationRequest, TokenEvent
from runtime.server import wire
from runtime.server.engine_process import EngineProcess
from runtime.server.metrics import Metrics, Observation
from runtime.server.pace import Pace
from runtime.server.worker import Worker
from runtime.supervisor import Channel, FrameError

TOKEN = TokenEvent(17, " h\u00e4", 3, 0.125, cached_tokens=5, drafted_tokens=8, accepted_tokens=6, shifted_tokens=9)
STEP = wire.Progress(2, [wire.Delivery(1, 0.5, TOKEN), wire.Delivery(2**40, 0.0, TOKEN)], [], 312, Pace(200, 0.5, 0.01))
texts = st.text(st.characters(exclude_categories=["Cs"]))
counts = st.integers(0, 2**32 - 1)
events = st.builds(
    TokenEvent,
    st.integers(-(2**63), 2**63 - 1) | st.none(),
    texts,
    counts,
    st.floats(allow_nan=False),
    st.none() | st.floats(allow_nan=False),
    counts,
    st.sampled_from((None, "stop", "length", "cancelled")),
    st.none(),
    counts,
    counts,
    counts,
)
deliveries = st.builds(wire.Delivery, st.integers(0, 2**63 - 1), st.floats(allow_nan=False), events)


@given(st.lists(deliveries), st.booleans())
def test_a_step_arrives_as_it_was(told: list[wire.Delivery], observed: bool) -> None:
    observations = [Observation("edgelm_decode_tokens", (), 1.0)] if observed else []
    step = replace(STEP, deliveries=told, observations=observations)
    assert wire.unpack_from_engine(wire.pack_from_engine(step)) == step


def test_only_tokens_in_the_middle_of_answers_travel_in_fixed_fields() -> None:
    ends: list[FinishReason] = ["stop", "length", "cancelled"]
    others = [TOKEN._replace(finish_reason=end) for end in ends] + [TOKEN._replace(prefill_s=0.1)]
    assert wire.pack_from_engine(STEP)[:1] == b"\0"
    for event in others:
        step = replace(STEP, deliveries=[wire.Delivery(1, 0.0, TOKEN), wire.Delivery(2, 0.0, event)])
        assert wire.pack_from_engine(step)[:1] == b"{"


def test_a_step_that_is_cut_short_or_too_long_is_no_message() -> None:
    frame = wire.pack_from_engine(STEP)
    for wrong in [frame[:length] for length in range(1, len(frame))] + [frame + b"\0"]:
        with pytest.raises(FrameError):
            wire.unpack_from_engine(wrong)


def test_text_that_is_no_utf8_is_no_message() -> None:
    frame = wire.pack_from_engine(replace(STEP, deliveries=[wire.Delivery(1, 0.0, TOKEN._replace(text="ab"))]))
    with pytest.raises(FrameError):
        wire.unpack_from_engine(frame[:-2] + b"\xff\xfe")


def test_a_channel_joins_what_arrives_in_pieces() -> None:
    ours, theirs = socket.socketpair()
    channel, other = Channel(ours), Channel(theirs)
    messages = [b"", b"x" * 100_000, b"last"]
    sending = threading.Thread(target=lambda: [other.send(message) for message in messages])
    sending.start()
    assert [channel.receive() for _ in messages] == messages
    sending.join()
    assert channel.arrived() == []
    assert not channel.ended
    other.send(b"more")
    other.close()
    assert channel.arrived() == [b"more"]
    assert channel.receive() is None
    assert channel.ended
    channel.close()


def test_a_length_beyond_the_limit_is_no_frame() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    theirs.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(FrameError):
        channel.receive()
    theirs.close()
    channel.close()


def told_by(tokens: int, monkeypatch: pytest.MonkeyPatch, *, every_s: float) -> list[wire.FromEngine]:
    """What an engine process says while it computes one answer on its own, step by step."""
    monkeypatch.setattr(runtime.server.engine_process, "TOKENS_EVERY_S", every_s)
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    process = EngineProcess(Channel(ours))
    model = fake_model(FakeEngine(context=4096))
    worker = Worker(model, Metrics(forward=process._observations.append), after_step=process._after_step)
    process._worker = worker
    said: list[wire.FromEngine] = []

    def listen() -> None:
        while (message := channel.receive()) is not None:
            said.append(wire.unpack_from_engine(message))

    listening = threading.Thread(target=listen)
    listening.start()
    process._submit(wire.Submit(1, GenerationRequest([1, 2, 3], tokens)), model)
    worker.start()
    worker.stop()
    ours.shutdown(socket.SHUT_RDWR)
    listening.join()
    ours.close()
    theirs.close()
    return said


@pytest.mark.parametrize("every_s", [0.0, 3600.0])
def test_tokens_that_come_fast_are_sent_together(every_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    said = told_by(50, monkeypatch, every_s=every_s)
    steps = [message for message in said if isinstance(message, wire.Progress) and message.deliveries]
    indexes = [delivery.token.number for step in steps for delivery in step.deliveries if delivery.token is not None]
    assert indexes == list(range(50))
    # The first token never waits, and the last takes along what does.
    assert [len(step.deliveries) for step in steps] == ([1] * 50 if every_s == 0 else [1, 49])
    counted = [item for message in said if isinstance(message, wire.Progress) for item in message.observations]
    assert sum(item.value for item in counted if item.name == "edgelm_decode_tokens") == 50


@pytest.mark.parametrize("waiting", [False, True])
def test_no_token_waits_while_a_prompt_is_read(waiting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.server.engine_process, "TOKENS_EVERY_S", 3600.0)
    ours, theirs = socket.socketpair()
    channel, process = Channel(theirs), EngineProcess(Channel(ours))
    model = fake_model(FakeEngine(context=4096, sequences=2))
    worker = process._worker = Worker(model, Metrics(forward=process._observations.append))
    process._submit(wire.Submit(1, GenerationRequest([1, 2, 3], 50)), model)
    assert worker._wait_for_work()  # admits it
    worker._step()
    process._flush()
    assert len(channel.arrived()) == 1
    worker._step()
    if waiting:
        process._submit(wire.Submit(2, GenerationRequest([4, 5], 50)), model)
    process._flush()
    assert len(channel.arrived()) == waiting
    for side in (ours, theirs):
        side.close()
