"""A device to deploy to: a real sshd with a network and a home of its own, and a stand-in for systemd's tools.

The network is a namespace with nothing but loopback where this user may make one (root), else this machine's. So what
asks a port of this machine instead of the device's finds nobody, and what wants the internet there fails. The stand-in
for systemctl reads the unit file that was written and starts its ExecStart line, no more.
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
# Stands in for the container engine: a file per image, and commands that run on the device itself. What it loads is a
# line with a name and an id.
DOCKER = """#!/bin/sh
echo "$*" >> "$HOME/docker.log"
cd "$HOME/images"
for last; do :; done
case "$1 $2" in
"--version ") cat "$HOME/version" ;;
"image inspect") cat "$last" ;;
"load ") read -r name id && echo "$id" > "$name" && echo "Loaded image: $name" ;;
"tag "*) cp "$2" "$3" ;;
"run "*)
  while :; do case "$1" in sha256:*) break ;; esac; shift || exit 125; done
  shift
  exec "$HOME/edgelm/venv/bin/edgelm" "$@" ;;
*) exit 2 ;;
esac
"""
# Relays a connection, and drops it after a number of bytes sent (or "inf"): a cable that is pulled. Before it does, it
# waits until some of a model lies below a directory of the device.
RELAY = f"""#!{sys.executable}
import os, pathlib, socket, sys, threading, time
line = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
def up(left, places):
    while left > 0 and (data := os.read(0, 65536)):
        line.sendall(data[: int(min(left, len(data)))])
        left -= len(data)
    for place in places:
        while not any(path.is_file() and path.stat().st_size for path in pathlib.Path(place).rglob("*.gguf")):
            time.sleep(0.05)
    line.shutdown(socket.SHUT_WR)
threading.Thread(target=up, args=[float(sys.argv[2]), sys.argv[3:]], daemon=True).start()
while data := line.recv(65536):
    os.write(1, data)
os._exit(1)
"""
# A new network namespace's loopback is down; SIOCSIFFLAGS with IFF_UP changes that.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH22x", b"lo", 1))
os.execv(sys.argv[1], sys.argv[1:])
"""
EDGELM = f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m edgelm "$@"\n'


@dataclass(frozen=True)
class Device:
    """``destination`` and ``config`` (for ssh -F) reach it; ``home`` is its home directory, ``port`` free on it.

    ``relay`` is the command that reaches its sshd, up to the number of bytes that may be sent.
    """

    destination: str
    config: Path
    home: Path
    port: int
    relay: str

    @property
    def root(self) -> Path:
        return self.home / "edgelm"

    def add_program(self, name: str, text: str) -> None:
        """A program on the device, before others of that name."""
        _program(self.home / "bin" / name, text)

    def with_engine(self, version: str = "Docker version 28.2.2, build e6534b4") -> None:
        """Give the device a container engine that knows the image ``edgelm:test``."""
        self.add_program("docker", DOCKER)
        (self.home / "version").write_text(f"{version}\n", encoding="ascii")
        (self.home / "images").mkdir()
        (self.home / "images/edgelm:test").write_text("sha256:0123abcd\n", encoding="ascii")

    def cut_after(self, sent_bytes: int) -> Path:
        """An ssh configuration whose connections break after so many bytes towards the device."""
        lines = self.config.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if "ProxyCommand" not in line]
        cut = self.config.with_name("ssh_config_cut")
        cut.write_text(
            "\n".join([*kept, f"  ProxyCommand {self.relay} {sent_bytes} {self.root}/incoming", ""]), encoding="utf-8"
        )
        return cut

    def current(self) -> str:
        return (self.root / "current/bundle").readlink().name


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
    environment += " PIP_NO_INDEX=1 PIP_NO_DEPS=1 PIP_DISABLE_PIP_VERSION_CHECK=1"  # the device has no network
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


def _write_client(directory: Path, ssh_port: int, relay: str) -> None:
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
          ProxyCommand {relay} inf
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
    _program(directory / "relay", RELAY)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it when root starts it
    own_network = _may_make_networks()
    command = [SSHD, "-D", "-e", "-f", str(directory / "sshd_config")]
    if own_network:
        command = ["unshare", "--net", "--", sys.executable, "-c", LOOPBACK_UP, *command]
    with (directory / "sshd.log").open("wb") as log:
        sshd = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    relay = f"{directory}/relay {ssh_port}"
    if own_network:
        relay = f"nsenter --net=/proc/{sshd.pid}/ns/net -- {relay}"
    try:
        _wait_for(relay, sshd, directory / "sshd.log")
        _write_client(directory, ssh_port, relay)
        yield Device("board", directory / "ssh_config", home, free_port(), relay)
    finally:
        sshd.terminate()
        sshd.wait()
        with suppress(OSError, ValueError):
            os.kill(int((home / "service.pid").read_text(encoding="ascii")), signal.SIGTERM)


def _may_make_networks() -> bool:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    return subprocess.run(["unshare", "--net", "--", "true"], capture_output=True, check=False).returncode == 0


def _wait_for(relay: str, sshd: subprocess.Popen[bytes], log: Path) -> None:
    """Until something that speaks ssh answers through the relay: no port of this machine's own does by chance."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and sshd.poll() is None:
        command = [*relay.split(), "inf"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as probe:
            assert probe.stdout is not None
            greeting = probe.stdout.readline()
            probe.kill()
        if greeting.startswith(b"SSH-2.0"):
            return
        time.sleep(0.05)
    raise RuntimeError(f"sshd does not listen: {log.read_text(encoding='utf-8', errors='replace')}")
