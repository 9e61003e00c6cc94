"""Keeps one child process alive and carries messages to and from it.

The child is started, watched and started again with growing pauses when it dies; it is never given up. Messages are
byte strings with a length in front, over one socket pair; what they say is not known here, nor is anything of engines
or HTTP. A child whose parent dies in any way dies with it.

A thread reads what the child says. An event loop that would be woken by every message anyway can be lent the reading
while the child works: that saves a change of threads for each of them.
"""

from __future__ import annotations

import asyncio
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
_READ_BYTES = 2**13
_LOOK_S = 1.0
_PR_SET_PDEATHSIG = 1


class FrameError(Exception):
    """The other side sent something that is no frame."""


def framed(message: bytes) -> bytes:
    """A message with its length in front."""
    return _LENGTH.pack(len(message)) + message


class Channel:
    """Frames over a connected socket: four bytes of length, most significant first, then the message."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._held = bytearray()
        self._sending = threading.Lock()
        self.ended = False

    def fileno(self) -> int:
        """What tells that there is something to read."""
        return self._connection.fileno()

    def send(self, message: bytes) -> None:
        """Send one message; callable from any thread. Raises ``OSError`` when nobody is there."""
        with self._sending:
            self._connection.sendall(framed(message))

    def send_now(self, message: bytes) -> bytes:
        """Send what can be sent of one message without waiting, and return the rest, for ``send_rest``."""
        frame = framed(message)
        try:
            return frame[self._connection.send(frame, socket.MSG_DONTWAIT) :]
        except OSError:  # full, or nobody is there: whoever waits finds out which
            return frame

    def send_rest(self, rest: bytes) -> None:
        """Send bytes as they are. Raises ``OSError`` when nobody is there."""
        self._connection.sendall(rest)

    def receive(self) -> bytes | None:
        """Wait for the next message, None at the end. Raises ``FrameError`` for lengths beyond the limit."""
        while (message := self._next()) is None and not self.ended:
            self._fill(0)
        return message

    def arrived(self) -> list[bytes]:
        """The messages that are complete by what has arrived, without waiting; ``ended`` tells whether more can come.
        Raises ``FrameError`` for lengths beyond the limit."""
        self._fill(socket.MSG_DONTWAIT)
        return list(iter(self._next, None))

    def close(self) -> None:
        """Close both directions; a blocked ``receive`` elsewhere ends."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _fill(self, flags: int) -> None:
        try:
            data = self._connection.recv(_READ_BYTES, flags)
        except BlockingIOError:
            return
        except OSError:  # reset by a child that was killed
            data = b""
        self._held += data
        self.ended = not data

    def _next(self) -> bytes | None:
        if len(self._held) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._held)
        if length > FRAME_LIMIT_BYTES:
            raise FrameError(f"a message of {length} bytes is longer than {FRAME_LIMIT_BYTES}")
        end = _LENGTH.size + length
        if len(self._held) < end:
            return None
        message = bytes(self._held[_LENGTH.size : end])
        del self._held[:end]
        return message


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
    """Who owns the child's messages. Everything is called in the supervisor's threads and must not block, messages of a
    child that works in the event loop that was lent."""

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


class _Outbox:
    """Messages to one child, in order: sent at once where that needs no waiting, else by a thread that may wait."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._late: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._behind = 0
        self._thread = threading.Thread(target=self._run, name="to engine", daemon=True)
        self._thread.start()

    def put(self, message: bytes) -> None:
        """Send a message; never blocks."""
        with self._lock:
            rest = self._channel.send_now(message) if not self._behind else framed(message)
            if rest:
                self._behind += 1
                self._late.put(rest)

    def close(self) -> None:
        """End the thread; the channel has to be closed."""
        self._late.put(None)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # the child died; whoever reads from it finds out
            while (rest := self._late.get()) is not None:
                self._channel.send_rest(rest)
                with self._lock:
                    self._behind -= 1


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
        self._outbox: _Outbox | None = None
        self._last_line = ""
        self._loop: asyncio.AbstractEventLoop | None = None
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
        """Send one message to the present child; lost when there is none or when it dies. Never blocks."""
        outbox = self._outbox
        if outbox is not None:
            outbox.put(message)

    def mark_working(self) -> None:
        """The present child does its work, so its death will be answered by a new one without a pause."""
        self._worked = True

    def kill(self) -> None:
        """End the present child at once, in whatever state it is; another is started when it is gone."""
        process = self._process
        if process is not None:
            process.kill()

    def lend(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read in this event loop, as long as it runs, whatever a child says that has been marked as working."""
        self._loop = loop

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
        self._outbox = outbox = _Outbox(channel)
        lines = threading.Thread(target=self._read_lines, args=(process,), name="engine stderr", daemon=True)
        lines.start()
        self._watcher.child_started()
        try:
            self._converse(channel)
        finally:
            channel.close()
            outbox.close()
            status = _reap(process)
            self._process = None
            lines.join()
        lived_s = time.monotonic() - started
        return Death(status, lived_s, self._last_line, self._pause_s(lived_s))

    def _converse(self, channel: Channel) -> None:
        """Hand on what the child says until it ends or makes no sense: here, or in the event loop that was lent."""
        while not channel.ended:
            loop = self._loop
            if loop is not None and self._worked and loop.is_running():
                self._converse_in(loop, channel)
                continue
            try:
                message = channel.receive()
                if message is not None:
                    self._watcher.child_said(message)
            except FrameError as error:
                self._end_conversation(channel, error)

    def _converse_in(self, loop: asyncio.AbstractEventLoop, channel: Channel) -> None:
        """Wait while the event loop reads: until the child or the loop has ended."""
        with contextlib.suppress(RuntimeError):  # the loop has just ended
            loop.call_soon_threadsafe(self._begin_reading, loop, channel)
        with self._changed:
            while not channel.ended and loop.is_running():
                self._changed.wait(_LOOK_S)

    def _begin_reading(self, loop: asyncio.AbstractEventLoop, channel: Channel) -> None:
        """In the event loop."""
        loop.add_reader(channel.fileno(), self._read, loop, channel)
        self._read(loop, channel)  # what was read beyond the last message

    def _read(self, loop: asyncio.AbstractEventLoop, channel: Channel) -> None:
        """In the event loop, when there is something to read."""
        try:
            for message in channel.arrived():
                self._watcher.child_said(message)
        except FrameError as error:
            self._end_conversation(channel, error)
        if channel.ended:
            loop.remove_reader(channel.fileno())
            with self._changed:
                self._changed.notify_all()

    def _end_conversation(self, channel: Channel, error: FrameError) -> None:
        self._watcher.child_wrote(f"protocol error: {error}")
        channel.ended = True

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
