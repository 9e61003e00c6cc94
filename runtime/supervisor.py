"""Keeps one child process alive and carries messages to and from it.

The child is started, watched and started again with growing pauses when it dies; it is never given up. Messages are
byte strings with a length in front, over one socket pair; what they say is not known here, nor is anything of engines
or HTTP. A child whose parent dies in any way dies with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Protocol

FRAME_LIMIT_BYTES = 64 * 2**20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0
# A child that lived less than this without having said that it works counts as one that could not start.
STEADY_S = 5.0
KILL_GRACE_S = 5.0
_LENGTH = struct.Struct(">I")
_LINE_LIMIT = 4096
_PR_SET_PDEATHSIG = 1


class FrameError(Exception):
    """The other side sent something that is no frame."""


class Channel:
    """Frames over a connected socket: four bytes of length, most significant first, then the message."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("rb", buffering=2**16)
        self._sending = threading.Lock()

    def send(self, message: bytes) -> None:
        """Send one message; callable from any thread. Raises ``OSError`` when nobody is there."""
        with self._sending:
            self._connection.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self) -> bytes | None:
        """The next message, None at the end. Raises ``FrameError`` for lengths beyond the limit."""
        try:
            head = self._reader.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(head)
            if length > FRAME_LIMIT_BYTES:
                raise FrameError(f"a message of {length} bytes is longer than {FRAME_LIMIT_BYTES}")
            message = self._reader.read(length)
        except OSError:  # reset by a child that was killed
            return None
        return message if len(message) == length else None

    def close(self) -> None:
        """Close both directions; a blocked ``receive`` elsewhere ends."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._reader.close()
        self._connection.close()


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended. ``status`` is negative for a signal, as ``subprocess`` has it; ``pause_s`` comes next."""

    status: int
    lived_s: float
    last_line: str
    pause_s: float

    @property
    def reason(self) -> str:
        """One phrase for people."""
        if self.status >= 0:
            return f"it ended with status {self.status}"
        try:
            return f"it was ended by {signal.Signals(-self.status).name}"
        except ValueError:
            return f"it was ended by signal {-self.status}"


class Watcher(Protocol):
    """Who owns the child's messages. Everything is called in the supervisor's threads and must not block."""

    def child_started(self) -> None:
        """A child was started; the first messages to it may be sent."""
        ...

    def child_said(self, message: bytes) -> None:
        """One message. Raises ``FrameError`` when it makes no sense, which ends the child."""
        ...

    def child_wrote(self, line: str) -> None:
        """One line on the child's stderr or stdout."""
        ...

    def child_died(self, death: Death) -> None:
        """The child is gone and reaped. It is started again after ``death.pause_s``, unless ``stop`` was called."""
        ...


class Supervisor:
    """Runs ``command`` and the number of its end of the socket pair as last argument, again and again until stopped."""

    def __init__(self, command: list[str], watcher: Watcher) -> None:
        self._command = command
        self._watcher = watcher
        self._changed = threading.Condition()
        self._stopping = False
        self._failures = 0
        self._worked = False
        self._process: subprocess.Popen[bytes] | None = None
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._last_line = ""
        # The kernel ends the child when the thread that started it ends: it has to be one that outlives the child.
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        process = self._process
        return process.pid if process is not None else None

    def start(self) -> None:
        """Start the first child, in the background."""
        self._thread.start()

    def send(self, message: bytes) -> None:
        """Queue one message for the present child; lost when there is none or when it dies."""
        self._outgoing.put(message)

    def mark_working(self) -> None:
        """The present child does its work, so its death will be answered by a new one without a pause."""
        self._worked = True

    def kill(self) -> None:
        """End the present child at once, in whatever state it is; another is started when it is gone."""
        process = self._process
        if process is not None:
            process.kill()

    def forgo(self) -> None:
        """Do not start another child when the present one has ended; callable from any thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def stop(self, grace_s: float = KILL_GRACE_S) -> None:
        """Wait at most ``grace_s`` for the child to end by itself, kill it otherwise, start no other."""
        self.forgo()
        if self._thread.ident is None:
            return
        self._thread.join(grace_s)
        process = self._process
        if self._thread.is_alive() and process is not None:
            process.kill()
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            death = self._live()
            self._watcher.child_died(death)
            with self._changed:
                self._changed.wait_for(lambda: self._stopping, death.pause_s)

    def _live(self) -> Death:
        """One child from its start to its end."""
        self._worked, self._last_line = False, ""
        outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._outgoing = outgoing
        started = time.monotonic()
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the server, which then drains
            )
        self._process = process
        channel = Channel(ours)
        writer = threading.Thread(target=_write, args=(channel, outgoing), name="to engine", daemon=True)
        lines = threading.Thread(target=self._read_lines, args=(process,), name="engine stderr", daemon=True)
        writer.start()
        lines.start()
        self._watcher.child_started()
        try:
            while (message := channel.receive()) is not None:
                self._watcher.child_said(message)
        except FrameError as error:
            self._watcher.child_wrote(f"protocol error: {error}")
        finally:
            channel.close()
            outgoing.put(None)
            status = _reap(process)
            self._process = None
            writer.join()
            lines.join()
        lived_s = time.monotonic() - started
        return Death(status, lived_s, self._last_line, self._pause_s(lived_s))

    def _pause_s(self, lived_s: float) -> float:
        self._failures = 0 if self._worked or lived_s > 10 * STEADY_S else self._failures + 1
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures - 1, 16)) if self._failures else 0.0

    def _read_lines(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as stream:
            while line := stream.readline(_LINE_LIMIT):
                text = line.decode("utf-8", "replace").strip()
                if text:
                    self._last_line = text
                    self._watcher.child_wrote(text)


def _write(channel: Channel, outgoing: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError):  # the child died; whoever reads from it finds out
        while (message := outgoing.get()) is not None:
            channel.send(message)


def _reap(process: subprocess.Popen[bytes]) -> int:
    """The exit status; a child that closed its socket and lives on is killed."""
    try:
        return process.wait(KILL_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def tie_to_parent() -> None:
    """For the child: die when the parent dies, leave its signals to it, be the one that a lack of memory takes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "linux":
        return  # the end of the socket tells it there
    # A parent that died before this is told by the end of the socket, too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+", encoding="ascii") as score:
        wanted = min(1000, int(score.read()) + 200)
        score.seek(0)
        score.write(str(wanted))
