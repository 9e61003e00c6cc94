"""Beginnings of prompts that many requests share, with the engine's state behind them, in files that outlive a server.

A file is worth something to the same model, engine and settings only, and is read by C code that trusts it. So it has
to belong to this user and nobody else, as its directory, no link is followed, and nothing of a state is used before the
SHA-256 of the whole file was found right. The hash finds damage; against somebody who can write there, only owner and
permissions help. What is wrong with a file is logged in a line, the file is deleted and the prompt computed: no file
is ever the reason of a failure. Knows files and token ids; no engines, no models, no words.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelm.errors import UsageError
from runtime.engine import State, common_prefix
from runtime.server.logs import log_event
from runtime.server.metrics import Instrument

FORMAT = 1
LEAST_TOKENS = 128
"""Shorter beginnings are computed in about the time that a file takes, and are not worth wearing out a card."""
MAX_BYTES = 512 * 2**20
WAITING_WRITES = 2
_MARK = b"EDGELMKV"
_HEAD = struct.Struct("<8sI32s")  # mark, bytes of the description, SHA-256 of description and state
_DESCRIPTION_LIMIT = 8 * 2**20
_SUFFIX = ".prompt"
_NAME = 16  # hexadecimal digits of each half of a name
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class PromptCacheOptions:
    """Where the files lie, and how many bytes all of them may take."""

    directory: str
    max_bytes: int = MAX_BYTES


class _BadFileError(Exception):
    """Why a file is not used, in a few words."""


def open_directory(path: Path) -> int:
    """A descriptor of the directory, made with mode 0700 when it is not there.

    Raises ``UsageError`` when it is no directory of this user's alone.
    """
    hint = f"give a directory that belongs to you, with: chmod 700 {path}"
    try:
        # Whoever may read the files may read the words: parents that are made on the way are not opened up either.
        for missing in reversed([parent for parent in (path, *path.parents) if not os.path.lexists(parent)]):
            missing.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a link or no directory" if error.errno in (errno.ELOOP, errno.ENOTDIR) else error.strerror
        raise UsageError(f"prompts cannot be kept in {path}: {reason}", hint=hint) from error
    wrong = _not_private(os.fstat(descriptor))
    if wrong:
        os.close(descriptor)
        raise UsageError(f"prompts cannot be kept in {path}: {wrong}", hint=hint)
    return descriptor


def check_directory(path: Path) -> None:
    """Raise ``UsageError`` as ``open_directory`` does."""
    os.close(open_directory(path))


def _not_private(facts: os.stat_result) -> str:
    """What is wrong with owner and permissions, "" for nothing."""
    if facts.st_uid != os.geteuid():
        return "it belongs to another user"
    return f"others have access (mode {stat.S_IMODE(facts.st_mode):o})" if facts.st_mode & 0o077 else ""


class PromptFiles:
    """The files of one model in a directory that several models may share. One thread calls; another one writes.

    ``identity`` is all that a state depends on. ``whole`` is for states that cannot be cut: a file is used where the
    prompt begins with all of its tokens. ``counter`` counts files by what became of them. ``after_write`` is called in
    the writing thread when a file was written, or was not. Raises ``UsageError`` as ``open_directory`` does.
    """

    def __init__(
        self, options: PromptCacheOptions, identity: Mapping[str, str], counter: Instrument, *, whole: bool = False
    ) -> None:
        self._directory = open_directory(Path(options.directory))
        self._max_bytes = options.max_bytes
        self._identity = dict(identity)
        self._counter = counter
        self._whole = whole
        self._prefix = _digest(json.dumps(self._identity, sort_keys=True).encode())
        self._known: dict[str, list[int]] = {}
        self._pending: set[str] = set()
        self._too_large: set[str] = set()
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "prompts")
        self.after_write: Callable[[], None] = lambda: None
        self._scan()

    def wants(self, tokens: Sequence[int]) -> bool:
        """Whether this beginning is long enough to be kept, and is neither kept yet nor part of what is."""
        if len(tokens) < LEAST_TOKENS:
            return False
        name = self._name(tokens)
        with self._lock:
            if name in self._known or name in self._pending or name in self._too_large:
                return False
            known = list(self._known.values())
        return self._whole or all(common_prefix(held, tokens) < len(tokens) for held in known)

    def load(self, prompt: Sequence[int], least: int) -> tuple[list[int], State] | None:
        """The tokens and the state of the file that most of ``prompt`` begins with, ``least`` tokens or more."""
        with self._lock:
            known = list(self._known.items())
        best, shared = "", least - 1
        for name, tokens in known:
            common = common_prefix(tokens, prompt)
            if common > shared and (common == len(tokens) or not self._whole):
                best, shared = name, common
        if not best:
            return None
        try:
            tokens, state = self._read(best)
        except FileNotFoundError:  # another server needed the room
            self._forget(best)
            return None
        except (OSError, MemoryError, _BadFileError) as error:
            self._refuse(best, error)
            return None
        self._counter.labels("loaded").inc()
        return tokens, state

    def save(self, tokens: Sequence[int], state: State) -> None:
        """Write a file, in another thread; when several wait to be written, not at all."""
        name = self._name(tokens)
        with self._lock:
            busy = len(self._pending) > WAITING_WRITES
            if not busy:
                self._pending.add(name)
        if busy:
            self.complain("not saved", "others are still being written")
            return
        self._writer.submit(self._save, name, list(tokens), state)

    def complain(self, what: str, reason: str) -> None:
        """Count and log what went wrong with no file to blame."""
        self._counter.labels("failed").inc()
        log_event(f"prompt cache: {what}", {"reason": reason}, level=logging.WARNING)

    def close(self) -> None:
        """Wait for what is being written. Calling it twice is allowed."""
        self._writer.shutdown()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def _name(self, tokens: Sequence[int]) -> str:
        return f"{self._prefix}-{_digest(np.asarray(tokens, '<i8').tobytes())}{_SUFFIX}"

    def _scan(self) -> None:
        """Note what earlier servers left for this model; half-written files of dead ones are deleted."""
        for name in sorted(os.listdir(self._directory)):
            if name.startswith(".") and name.endswith(_SUFFIX) and not _lives(name):
                self._delete(name)
            if not (name.startswith(f"{self._prefix}-") and name.endswith(_SUFFIX)):
                continue
            try:
                with self._opened(name) as (file, size_bytes):
                    tokens, _, _ = self._description(name, file, size_bytes)
            except (OSError, _BadFileError) as error:
                self._refuse(name, error)
            else:
                self._known[name] = tokens

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, int]]:
        """A descriptor of a file that is this user's alone, and its size. Raises ``OSError`` and ``_BadFileError``."""
        file = os.open(name, _READ, dir_fd=self._directory)
        try:
            facts = os.fstat(file)
            wrong = "it is no file" if not stat.S_ISREG(facts.st_mode) else _not_private(facts)
            if wrong:
                raise _BadFileError(wrong)
            if facts.st_size > self._max_bytes:
                raise _BadFileError("it is larger than all files may be together")
            yield file, facts.st_size
        finally:
            os.close(file)

    def _description(self, name: str, file: int, size_bytes: int) -> tuple[list[int], bytes, bytes]:
        """Tokens, the description itself, and the hash. Nothing of it is proven yet. Raises ``_BadFileError``."""
        head = os.read(file, _HEAD.size)
        if len(head) < _HEAD.size:
            raise _BadFileError("it is cut off")
        mark, length, digest = _HEAD.unpack(head)
        if mark != _MARK or length > _DESCRIPTION_LIMIT:
            raise _BadFileError("it is no file of prompts")
        text = os.read(file, length)
        if len(text) < length:
            raise _BadFileError("it is cut off")
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise _BadFileError("its description is no JSON") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise _BadFileError("it has another format")
        if document.get("identity") != self._identity:
            raise _BadFileError("it is of another model, version or setting")
        tokens, state_bytes = document.get("tokens"), document.get("state_bytes")
        if not isinstance(tokens, list) or not all(isinstance(token, int) and 0 <= token < 2**31 for token in tokens):
            raise _BadFileError("its tokens are no tokens")
        if name != self._name(tokens):
            raise _BadFileError("its name does not tell what it holds")
        if state_bytes != size_bytes - _HEAD.size - length:
            raise _BadFileError("it is cut off or has grown")
        return tokens, text, digest

    def _read(self, name: str) -> tuple[list[int], State]:
        """Raises ``OSError``, ``MemoryError`` and ``_BadFileError``."""
        with self._opened(name) as (file, size_bytes):
            tokens, text, digest = self._description(name, file, size_bytes)
            state = np.empty(size_bytes - _HEAD.size - len(text), np.uint8)
            view, done = state.data, 0
            while done < len(state):
                count = os.readv(file, [view[done:]])
                if count == 0:
                    raise _BadFileError("it is cut off")
                done += count
            if _hash(text, state) != digest:
                raise _BadFileError("it is damaged")
            with contextlib.suppress(OSError):  # a disk that has become read-only
                os.utime(file)
        return tokens, state

    def _save(self, name: str, tokens: list[int], state: State) -> None:
        try:
            self._write(name, tokens, state)
        except OSError as error:
            self.complain("not saved", os.strerror(error.errno or 0))
        except _BadFileError as error:
            self._too_large.add(name)
            self.complain("not saved", str(error))
        else:
            with self._lock:
                self._known[name] = tokens
            self._counter.labels("saved").inc()
        finally:
            with self._lock:
                self._pending.discard(name)
            self.after_write()

    def _write(self, name: str, tokens: list[int], state: State) -> None:
        """Write beside and rename: a half file is never seen. Not synchronised: what a power cut damages, the hash
        finds. Raises ``OSError`` and ``_BadFileError``."""
        description = {"format": FORMAT, "identity": self._identity, "tokens": tokens, "state_bytes": len(state)}
        text = json.dumps(description).encode()
        parts = [memoryview(_HEAD.pack(_MARK, len(text), _hash(text, state)) + text), state.data]
        self._make_room(sum(len(part) for part in parts))
        half = f".{os.getpid()}-{name}"
        file = os.open(half, _WRITE, 0o600, dir_fd=self._directory)
        try:
            try:
                for part in parts:
                    while len(part):
                        part = part[os.write(file, part) :]
            finally:
                os.close(file)
            os.rename(half, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            self._delete(half)
            raise

    def _make_room(self, size_bytes: int) -> None:
        """Delete what was not used for longest, of whichever model. Raises ``OSError`` and ``_BadFileError``."""
        if size_bytes > self._max_bytes:
            raise _BadFileError(f"it takes {size_bytes} bytes, all files may take {self._max_bytes}")
        files: list[tuple[int, int, str]] = []
        for name in os.listdir(self._directory):
            if name.endswith(_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    facts = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
                    files.append((facts.st_mtime_ns, facts.st_size, name))
        total = sum(size for _, size, _ in files)
        for _, size, name in sorted(files):
            if total + size_bytes <= self._max_bytes:
                return
            self._forget(name)
            self._delete(name)
            total -= size

    def _refuse(self, name: str, error: Exception) -> None:
        """A file that is not as it should be is told of, deleted and forgotten."""
        reason = str(error) or "not enough memory"
        if isinstance(error, OSError):
            reason = "it is a link" if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
        self._counter.labels("refused").inc()
        log_event("prompt cache: file not used", {"file": name, "reason": reason}, level=logging.WARNING)
        self._forget(name)
        if isinstance(error, _BadFileError) or (isinstance(error, OSError) and error.errno == errno.ELOOP):
            self._delete(name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._known.pop(name, None)

    def _delete(self, name: str) -> None:
        with contextlib.suppress(OSError):  # a directory of that name, a read-only disk
            os.unlink(name, dir_fd=self._directory)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[: 2 * _NAME]


def _hash(text: bytes, state: State) -> bytes:
    digest = hashlib.sha256(text)
    digest.update(state.data)
    return digest.digest()


def _lives(name: str) -> bool:
    """Whether the process that writes this half file is there."""
    pid = name[1:].partition("-")[0]
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
