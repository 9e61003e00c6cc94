"""Ctrl-C that stops a computation inside the engine, not only between two of its calls.

Python runs signal handlers between bytecodes, so a handler alone would wait for a long prefill to end. The C-level
handler writes to a wake-up socket at once; a thread that listens there interrupts the engine.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from runtime.engine import Engine


@contextmanager
def stopped_by_ctrl_c(engine: Engine) -> Iterator[Callable[[], bool]]:
    """Inside the block Ctrl-C raises nothing: it interrupts the engine and makes the yielded function return True.

    Only for the main thread, as signal handlers are. The former handlers come back at the end.
    """
    pressed = threading.Event()
    listening, waking = socket.socketpair()
    waking.setblocking(False)

    def listen() -> None:
        while numbers := listening.recv(64):
            if signal.SIGINT in numbers:
                pressed.set()
                engine.interrupt()

    def handle(_number: int, _frame: FrameType | None) -> None:
        pressed.set()

    thread = threading.Thread(target=listen, name="ctrl-c", daemon=True)
    thread.start()
    former_handler = signal.signal(signal.SIGINT, handle)
    former_socket = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    try:
        yield pressed.is_set
    finally:
        signal.set_wakeup_fd(former_socket)
        signal.signal(signal.SIGINT, former_handler)
        waking.close()
        thread.join()
        listening.close()
