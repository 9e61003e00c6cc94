"""The systemd unit that keeps a server alive: one text for the machine here and for a device that is deployed to.

Knows systemd's words and quoting; not what the command serves, nor how the unit gets to its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgelm.bundle import Choice
from edgelm.errors import UsageError

STOP_S = 45
"""The server drains for 30 s and gives its engine 10 s more."""
WATCHDOG_S = 60
# What needs no privilege of the manager that applies it, so that it holds in a user's unit as well. There is no
# MemoryDenyWriteExecute: Python's ctypes may make callbacks in memory that is written and executed.
_HARDENING = """\
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
SystemCallArchitectures=native
SystemCallFilter=@system-service
UMask=0077
"""
# What only the system's manager can do everywhere: views of the file system, devices and the kernel. The sensors are
# read from /sys and /proc, which stay readable.
_SYSTEM_HARDENING = """\
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
CapabilityBoundingSet=
StateDirectory=edgelm
StateDirectoryMode=0700
"""


@dataclass(frozen=True, slots=True)
class Unit:
    """What a unit is to do. ``command`` is a program with its arguments, unquoted.

    ``notify``: the program tells systemd when it is ready; without it the unit counts as started at once, as it must
    where the program is a container or software of any age. ``hardened``: give it no more rights than a server needs,
    which a container's runner does not survive. Relative paths of the command start in ``directory``. ``user`` makes a
    unit of the system that runs as this user, None one of the user's own. ``memory_max`` is a limit in bytes with its
    reason. ``writable`` are directories that a system unit may write to.
    """

    command: Sequence[str]
    description: str = "EdgeLM"
    notify: bool = True
    hardened: bool = True
    directory: str | None = None
    user: str | None = None
    memory_max: Choice | None = None
    writable: Sequence[str] = ()


def unit_text(unit: Unit) -> str:
    """The unit file. Raises ``UsageError`` for words that cannot stand in one.

    A crash is answered by a new start, always: ``StartLimitIntervalSec=0`` lifts systemd's default of giving up after
    five, pauses grow up to a minute where systemd knows how (254 and newer) and stay at five seconds elsewhere. Only
    wrong usage (status 2) is not tried again; a model that does not fit now (4) may fit later. When memory runs out,
    the service is what the kernel ends first, its engine before its server (``OOMPolicy=continue`` lets the server
    start another), and it never swaps.
    """
    lines = ["[Unit]", f"Description={_plain(unit.description)}", "After=network-online.target"]
    if unit.user is not None:
        lines.append("Wants=network-online.target")
    lines += ["StartLimitIntervalSec=0", "", "[Service]"]
    if unit.notify:
        # Loading from a slow card takes as long as it takes; the watchdog counts from readiness on.
        lines += ["Type=notify", "TimeoutStartSec=infinity", f"WatchdogSec={WATCHDOG_S}"]
    else:
        lines.append("Type=exec")
    lines.append("ExecStart=" + " ".join(_quoted(word) for word in unit.command))
    if unit.directory is not None:
        lines.append(f"WorkingDirectory={_plain(unit.directory)}")
    if unit.user is not None:
        lines.append(f"User={_plain(unit.user)}")
    lines += ["Restart=on-failure", "RestartSec=5", "RestartSteps=5", "RestartMaxDelaySec=60"]
    lines += ["RestartPreventExitStatus=2", f"TimeoutStopSec={STOP_S}"]
    lines += ["OOMScoreAdjust=500", "OOMPolicy=continue", "MemorySwapMax=0"]
    if unit.memory_max is not None:
        lines += [f"# {_plain(unit.memory_max.reason)}", f"MemoryMax={unit.memory_max.value}"]
    text = "\n".join(lines) + "\n"
    if unit.hardened:
        text += _HARDENING
    if unit.hardened and unit.user is not None:
        text += _SYSTEM_HARDENING
        text += "".join(f"ReadWritePaths={_quoted(path)}\n" for path in unit.writable)
    wanted_by = "multi-user.target" if unit.user is not None else "default.target"
    return f"{text}\n[Install]\nWantedBy={wanted_by}\n"


def _plain(text: str) -> str:
    """A value without quotes, with systemd's percent signs doubled."""
    _check(text)
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """One word of a command line by the rules of systemd.service(5): percent and dollar signs doubled, quoted."""
    _check(word)
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    plain = all(letter.isalnum() or letter in "%/._-:=@+,[]" for letter in escaped)
    return escaped if plain and escaped else f'"{escaped}"'


def _check(text: str) -> None:
    if any(ord(letter) < 0x20 or ord(letter) == 0x7F for letter in text):
        raise UsageError(f"{text!r} holds a control character and cannot stand in a unit file")
