"""A device to deploy to: a real sshd on loopback, a home directory of its own, and a stand-in for systemd's tools.

The stand-in reads the unit file that was written and starts its ExecStart line, no more. Everything is below one
temporary directory, processes included.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
REPOSITORY = Path(__file__).resolve().parent.parent

SYSTEMCTL = f"""#!{sys.executable}
import os, pathlib, shlex, signal, subprocess, sys, time
words = [word for word in sys.argv[1:] if not word.startswith("--")]
home = pathlib.Path(os.environ["HOME"])
pid_file, log = home / "service.pid", home / "service.log"

def running():
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    state = pathlib.Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0]
    return pid if state != "Z" else None

def stop():
    pid = running()
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        while running() is not None:
            time.sleep(0.05)

verb = words[0]
if verb == "is-active":
    sys.exit(0 if running() else 3)
if verb in ("stop", "restart"):
    stop()
if verb in ("start", "restart"):
    unit = pathlib.Path(os.environ["XDG_CONFIG_HOME"]) / "systemd/user" / words[1]
    line = next(line for line in unit.read_text().splitlines() if line.startswith("ExecStart="))
    with log.open("ab") as sink:
        child = subprocess.Popen(shlex.split(line.removeprefix("ExecStart=")), stdin=subprocess.DEVNULL, stdout=sink,
                                 stderr=sink, start_new_session=True)
    pid_file.write_text(str(child.pid))
"""
JOURNALCTL = '#!/bin/sh\ntail -n 5 "$HOME/service.log"\n'
EDGELM = f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m edgelm "$@"\n'


@dataclass(frozen=True)
class Device:
    """``destination`` and ``config`` (for ssh -F) reach it; ``home`` is its home directory, ``port`` free on it."""

    destination: str
    config: Path
    home: Path
    port: int

    @property
    def root(self) -> Path:
        return self.home / "edgelm"

    def current(self) -> str:
        return (self.root / "current").readlink().name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def _furnish(home: Path) -> None:
    for name, text in (("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL), ("loginctl", "#!/bin/sh\n")):
        _program(home / "bin" / name, text)
    _program(home / "edgelm/venv/bin/edgelm", EDGELM)


def _write_configuration(directory: Path, home: Path, ssh_port: int) -> None:
    for name in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(command, check=True)
    environment = f"HOME={home} XDG_CONFIG_HOME={home}/.config PATH={home}/bin:{os.environ['PATH']}"
    server = f"""\
        ListenAddress 127.0.0.1
        Port {ssh_port}
        HostKey {directory}/host_key
        AuthorizedKeysFile {directory}/user_key.pub
        PidFile none
        StrictModes no
        UsePAM no
        PasswordAuthentication no
        KbdInteractiveAuthentication no
        PermitRootLogin prohibit-password
        MaxSessions 20
        SetEnv {environment}
        """
    (directory / "sshd_config").write_text(textwrap.dedent(server), encoding="utf-8")
    host_key = (directory / "host_key.pub").read_text(encoding="ascii").strip()
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{ssh_port} {host_key}\n", encoding="ascii")
    client = f"""\
        Host board
          HostName 127.0.0.1
          Port {ssh_port}
          User {getuser()}
          IdentityFile {directory}/user_key
          IdentitiesOnly yes
          UserKnownHostsFile {directory}/known_hosts
          StrictHostKeyChecking yes
          BatchMode yes
        """
    (directory / "ssh_config").write_text(textwrap.dedent(client), encoding="utf-8")


@contextmanager
def ssh_device(directory: Path) -> Iterator[Device]:
    """A running device; its sshd and its service are ended with the block."""
    assert SSHD is not None
    directory.mkdir(parents=True)
    home = directory / "home"
    _furnish(home)
    ssh_port = free_port()
    _write_configuration(directory, home, ssh_port)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it when root starts it
    with (directory / "sshd.log").open("wb") as log:
        command = [SSHD, "-D", "-e", "-f", str(directory / "sshd_config")]
        sshd = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait_for(ssh_port, sshd, directory / "sshd.log")
        yield Device("board", directory / "ssh_config", home, free_port())
    finally:
        sshd.terminate()
        sshd.wait()
        with suppress(OSError, ValueError):
            os.kill(int((home / "service.pid").read_text(encoding="ascii")), signal.SIGTERM)


def _wait_for(port: int, sshd: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and sshd.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"sshd does not listen: {log.read_text(encoding='utf-8', errors='replace')}")
