"""A device that is reached over the system's ssh: run a script there, send files, ask a port.

Needs nothing on the device but sshd, sh and coreutils. Keys, ports and jump hosts are ssh's own business (its
configuration files, its agent, its prompts). It does not know what is deployed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle import FileRecord
from edgelm.errors import DeployError, UsageError
from edgelm.progress import Stage
from edgelm.units import format_bytes

_DESTINATION = re.compile(r"(?:[A-Za-z0-9._-]+@)?[A-Za-z0-9_][A-Za-z0-9._:-]*")
_CHUNK_BYTES = 2**20
_SSH_FAILED = 255
_PORT_TIMEOUT_S = 15.0
SPARE_BYTES = 64 * 2**20

Say = Callable[[str], None]
"""Tells the caller's user what happens next."""


@dataclass(frozen=True, slots=True)
class Remote:
    """An open way to one device. ``command`` is ssh with every option, without the destination."""

    destination: str
    command: tuple[str, ...]

    def run(self, script: str, *arguments: str, timeout_s: float = 120.0) -> str:
        """Standard output of an sh ``script`` on the device; ``arguments`` are its ``$1``, ``$2``, ...

        Raises ``DeployError`` when the device cannot be reached or the script fails.
        """
        line = " ".join(
            ["sh", "-c", shlex.quote("set -eu\n" + script), "sh", *(shlex.quote(word) for word in arguments)]
        )
        try:
            result = subprocess.run(
                [*self.command, "--", self.destination, line],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise DeployError(f"{self.destination} did not answer within {timeout_s:g} s") from error
        if result.returncode != 0:
            raise self._failure(result.returncode, result.stderr)
        return result.stdout.decode("utf-8", "replace")

    def append(self, source: Path, target: str, offset: int, stage: Stage) -> None:
        """Append the bytes of ``source`` from ``offset`` on to the file ``target`` on the device.

        Raises ``DeployError``; what arrived until then stays there.
        """
        line = f"cat >> {shlex.quote(target)}"
        child = subprocess.Popen(
            [*self.command, "--", self.destination, line], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert child.stdin is not None
        with child, source.open("rb") as stream:
            stream.seek(offset)
            try:
                while chunk := stream.read(_CHUNK_BYTES):
                    child.stdin.write(chunk)
                    stage.advance(len(chunk))
                child.stdin.close()
            except BrokenPipeError:
                pass  # the exit status below says why
            errors = child.stderr.read() if child.stderr else b""
            code = child.wait()
        if code == _SSH_FAILED:
            raise DeployError(
                f"the connection to {self.destination} was lost while {source.name} was sent",
                hint="do the same again: it goes on where it stopped",
            )
        if code != 0:
            raise self._failure(code, errors)

    def check_files(self, directory: str, records: Sequence[FileRecord]) -> None:
        """Compare the hashes of what was sent into ``directory``.

        What is wrong is removed there, so that the next try sends it anew, and named by a ``DeployError``.
        """
        script = """
cd "$1"
printf '%s' "$2" | sha256sum --check --strict 2> /dev/null | sed -n 's/: FAILED.*$//p' | while read -r name; do
  rm -f "$name"
  echo "$name"
done
sync
"""
        lines = "".join(f"{record.sha256}  {record.name}\n" for record in records)
        wrong = self.run(script, directory, lines, timeout_s=1800.0).split()
        if wrong:
            raise DeployError(
                f"{', '.join(wrong)} arrived damaged on {self.destination} and was removed there",
                hint="deploy again: only what is missing is sent",
            )

    def http_get(self, host: str, port: int, path: str, key: str | None = None) -> int:
        """Status of an HTTP request to a port of the device, through ssh; 0 when nobody answers."""
        request = [f"GET {path} HTTP/1.1", f"Host: {host}:{port}", "Connection: close"]
        if key is not None:
            request.append(f"Authorization: Bearer {key}")
        child = subprocess.Popen(
            [*self.command, "-W", f"{host}:{port}", "--", self.destination],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        # Standard input stays open until the answer is there: a server may drop a client that has hung up its side.
        deadline = threading.Timer(_PORT_TIMEOUT_S, child.kill)
        deadline.start()
        try:
            child.stdin.write("\r\n".join([*request, "", ""]).encode())
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            deadline.cancel()
            child.kill()
            child.wait()
            child.stdout.close()
            with suppress(BrokenPipeError):
                child.stdin.close()
        match = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
        return int(match[1]) if match else 0

    def _failure(self, code: int, errors: bytes) -> DeployError:
        lines = [line.strip() for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
        reason = "; ".join(lines[-3:]) or f"exit status {code}"
        if code == _SSH_FAILED:
            return DeployError(
                f"{self.destination} cannot be reached: {reason}", hint=f"does this work: ssh {self.destination} true"
            )
        return DeployError(f"{self.destination}: {reason}")


def check_room(remote: Remote, free_bytes: int, wanted_bytes: int) -> None:
    """Raises ``DeployError`` when a device has no room for what is to be sent."""
    if wanted_bytes + SPARE_BYTES > free_bytes:
        raise DeployError(
            f"{remote.destination} has {format_bytes(free_bytes)} free, {format_bytes(wanted_bytes)} are to be sent",
            hint=f"make room there, {format_bytes(SPARE_BYTES)} beyond that",
        )


@contextmanager
def connect(destination: str, ssh_options: Sequence[str] = ()) -> Iterator[Remote]:
    """A ``Remote`` whose commands share one ssh connection, so that a password or touch is asked for once.

    ``ssh_options`` are given to ssh as they are. Raises ``UsageError`` for a malformed destination and
    ``DeployError`` without an ssh client or when the device cannot be reached.
    """
    if not _DESTINATION.fullmatch(destination):
        raise UsageError(f"'{destination}' is not [USER@]HOST")
    ssh = shutil.which("ssh")
    if ssh is None:
        raise DeployError("there is no ssh client on this machine", hint="on Debian: apt-get install openssh-client")
    with tempfile.TemporaryDirectory(prefix="edgelm-ssh-") as directory:
        shared = ["-o", "ControlMaster=auto", "-o", f"ControlPath={directory}/%C", "-o", "ControlPersist=60"]
        remote = Remote(destination, (ssh, *shared, *ssh_options))
        remote.run("true")
        try:
            yield remote
        finally:
            subprocess.run([*remote.command, "-O", "exit", "--", destination], capture_output=True, check=False)
