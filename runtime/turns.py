"""Asks the kernel for short turns on the CPU, for a thread that does little and is waited for.

An engine computes on every core without a pause. Who wakes up to hand on a token gets a core when the turn of the one
that holds it is over, one to three milliseconds later; who has asked for a shorter turn gets it at once. Shares of the
CPU stay what they are. Linux from 6.12 on knows this, older kernels take no notice. Knows nothing of what threads do.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

SHORTEST_TURN_NS = 100_000  # the kernel's own least
# struct sched_attr, first version: size, policy, flags, nice, priority, runtime, deadline, period (sched_setattr(2)).
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_RESET_ON_FORK = 1  # threads and processes that are started from here get turns of the usual length
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}


def ask_for_short_turns() -> bool:
    """For the calling thread alone; whether the kernel took it. It refuses nobody, but a sandbox may."""
    number = _SCHED_SETATTR.get(platform.machine())
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice < 0:  # has precedence as it is, and what it starts would lose it
        return False
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, _RESET_ON_FORK, nice, 0, SHORTEST_TURN_NS, 0, 0)
    return int(ctypes.CDLL(None).syscall(number, 0, attributes, 0)) == 0
