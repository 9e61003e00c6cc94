"""Short turns on the CPU are asked for the calling thread, and for nobody that it starts."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading

import pytest

from runtime import turns

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def turn_ns() -> int:
    """What the kernel tells of the calling thread: 0 where it knows no turns of one's own."""
    attributes = ctypes.create_string_buffer(56)
    number = _SCHED_GETATTR[turns.platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, attributes, len(attributes), 0) == 0
    return int(struct.unpack_from("=IIQiIQ", attributes.raw)[5])


def in_a_thread(told: list[int], *, ask: bool) -> None:
    def run() -> None:
        if ask:
            assert turns.ask_for_short_turns()
            told.append(turn_ns())
            in_a_thread(told, ask=False)
        else:
            told.append(turn_ns())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@pytest.mark.skipif(
    sys.platform != "linux" or turns.platform.machine() not in _SCHED_GETATTR, reason="a system call of Linux"
)
def test_one_thread_gets_short_turns() -> None:
    usual, before = turn_ns(), os.getpriority(os.PRIO_PROCESS, 0)
    told: list[int] = []
    in_a_thread(told, ask=True)
    assert told == ([turns.SHORTEST_TURN_NS, usual] if usual else [0, 0])
    assert turn_ns() == usual
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_an_unknown_machine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns.platform, "machine", lambda: "abacus")
    assert not turns.ask_for_short_turns()
