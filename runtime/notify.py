"""Tells systemd how a service is: ready, stopping, alive. The protocol of sd_notify(3), without its library.

Does nothing outside of systemd. Knows nothing of what is served.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends datagrams to the socket that systemd names in the environment. One thread at a time."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self.watchdog_s = _watchdog_s(environment)
        """Half of the time after which systemd ends a service that says nothing; None when it does not watch."""

    def send(self, *assignments: str) -> None:
        """Send ``NAME=value`` lines, as ``READY=1``. A manager that does not listen costs nothing but the message."""
        if not self._address.startswith(("/", "@")):
            return
        # A leading @ stands for the zero byte of Linux's abstract names.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            try:
                sender.sendto("\n".join(assignments).encode(), address)
            except OSError:
                return  # the watchdog says it again, and nobody else could be told of it


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    microseconds, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or int(microseconds) == 0:
        return None
    if process and process != str(os.getpid()):
        return None
    return int(microseconds) / 2e6
