"""How an engine's threads wait for one another: spinning, spinning briefly, or asleep. Chosen when a model is opened.

Threads meet at a barrier after every operation. While each has a core of its own, spinning there is fastest by far;
once another process wants a core, spinning threads burn the time that the late one needs, and decode collapses. So the
choice follows what wants to run at that moment, with its reason; ``OMP_WAIT_POLICY`` (and for llama.cpp
``GOMP_SPINCOUNT``) in the environment overrule it for both engines. Figures: ``docs/report.md``, "Waiting". Knows no
engine.
"""

from __future__ import annotations

import ctypes
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from targets.facts import ROOT, text_of
from targets.host import default_threads, read_limits

Kind = Literal["spin", "brief", "passive"]

BRIEF_SPINS = 1000  # turns of libgomp's loop before a thread sleeps, some microseconds
_LOOKS, _LOOK_EVERY_S = 8, 0.005
_LEEWAY = 0.5  # of a CPU: what is less than one thread more is none
_GIVES_WAY = 10  # steps of nice: what `nice` adds by itself, and a tenth of the time
_NICE, _POLICY_NUMBER, _IDLE_POLICY = 16, 38, "5"  # places behind the name in a thread's stat; SCHED_IDLE
_PAUSE_SOFT = 1  # omp_pause_soft of OpenMP 5.0
_POLICY, _SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"


@dataclass(frozen=True, slots=True)
class Waiting:
    """How threads wait, and why."""

    kind: Kind
    reason: str


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Threads of others that want to run, and how many more do that give way to this process's."""

    count: float
    giving_way: float = 0


def runnable_neighbours(root: Path = ROOT, *, lesser: bool = True) -> Neighbours | None:
    """Threads of others that want to run right now, in the median of some looks over 40 ms: what runs for a moment is
    no neighbour. None where the kernel does not tell.

    The process that started this one is none either: a server that starts its engine is busy starting itself. Without
    ``lesser`` neither are threads that give way to this process's, having a much lower priority; to find them once
    takes 20 us for each thread of the machine.
    """
    counts, ignored = [], []
    givers: list[Path] | None = None
    for look in range(_LOOKS):
        if look:
            time.sleep(_LOOK_EVERY_S)
        match = re.search(r"^procs_running (\d+)", text_of(root / "proc/stat"), re.MULTILINE)
        if match is None:
            return None
        found = int(match.group(1)) - 1 - _running_threads(root, os.getppid())  # 1: the reader itself
        giving_way = 0
        if found > 0 and not lesser:
            # Who they are is looked up once: what comes later counts as a neighbour, which is the safe side.
            givers = _givers(root) if givers is None else givers
            giving_way = sum(_fields(stat)[:1] == ["R"] for stat in givers)
        counts.append(max(found - giving_way, 0))
        ignored.append(giving_way)
    return Neighbours(statistics.median(counts), statistics.median(ignored))


def _running_threads(root: Path, process: int) -> int:
    """Threads of a process that are running or want to."""
    states = (text_of(task / "stat").rpartition(")")[2].split() for task in root.glob(f"proc/{process}/task/*"))
    return sum(state[:1] == ["R"] for state in states)


def _fields(stat: Path) -> list[str]:
    """What a thread's ``stat`` says behind its name, empty when it is gone."""
    return text_of(stat).rpartition(")")[2].split()


def _givers(root: Path) -> list[Path]:
    """``stat`` of threads that are pushed aside when this process wants to run: of a much lower priority, and in the
    same groups, since between groups (of sessions or containers) the priorities of threads count for nothing."""
    own = _fields(root / "proc/self/stat")
    if len(own) <= _POLICY_NUMBER or own[_POLICY_NUMBER] == _IDLE_POLICY:
        return []
    found, group, parent = [], _group(root, "self"), str(os.getppid())
    for task in root.glob("proc/[0-9]*/task/*"):
        fields, process = _fields(task / "stat"), task.parents[1].name
        if len(fields) <= _POLICY_NUMBER or process == parent:
            continue
        idle = fields[_POLICY_NUMBER] == _IDLE_POLICY
        if (idle or int(fields[_NICE]) >= int(own[_NICE]) + _GIVES_WAY) and _group(root, process) == group:
            found.append(task / "stat")
    return found


def _group(root: Path, process: str) -> tuple[str, str]:
    """What the kernel shares time among before it looks at threads: control groups and the session's own group."""
    folder = root / "proc" / process
    return text_of(folder / "cgroup"), text_of(folder / "autogroup").partition(" ")[0]


def choose_waiting(threads: int, root: Path = ROOT, *, sleeps: bool = False) -> Waiting:
    """How ``threads`` threads should wait on this machine, as it is now.

    ``sleeps``: an engine that does not spin falls asleep at once, as ONNX Runtime does. Beside neighbours that give way
    spinning is then up to 1.3 times as fast with small weights, and level with large ones (0.89 to 1.10); libgomp's
    brief wait is faster than its spinning even there.
    """
    asked = _asked()
    if asked is not None:
        return asked
    if threads == 1:
        return Waiting("passive", "one thread has nobody to wait for")
    limits = read_limits(root)
    if limits.quota is not None and limits.quota < threads + _LEEWAY:
        return Waiting("brief", f"{limits.quota_source} grants {limits.quota:g} CPUs, and waiting counts too")
    if threads > len(limits.cpus):
        return Waiting("brief", f"{threads} threads share {len(limits.cpus)} CPUs")
    neighbours = runnable_neighbours(root, lesser=not sleeps)
    if neighbours is None:
        return Waiting("spin", "nobody tells what else wants to run")
    cpus = os.cpu_count() or 1
    if neighbours.count > cpus - threads + _LEEWAY:
        told = f"{neighbours.count:g} threads of others want to run on {cpus} CPUs beside {threads} threads"
        return Waiting("brief", told)
    if neighbours.giving_way > cpus - threads + _LEEWAY:
        return Waiting("spin", f"{neighbours.giving_way:g} threads of others that want to run give way")
    return Waiting("spin", "every thread has an idle core")


def _asked() -> Waiting | None:
    """What the environment asks for, None when it leaves the choice to us."""
    policy, spins = os.environ.get(_POLICY, "").lower(), os.environ.get(_SPINS, "")
    if spins and _ours != spins:
        return Waiting("brief", f"{_SPINS}={spins} is set")
    if policy in ("active", "passive"):
        return Waiting("spin" if policy == "active" else "passive", f"{_POLICY}={policy} is set")
    return None


_ours: str | None = None  # the value that we wrote ourselves, which is no wish of the user's
_decided: Waiting | None = None


def prepare_openmp(root: Path = ROOT) -> Waiting:
    """Decide for libgomp, which reads its environment once, when it is loaded. Call before the engine's library.

    Only the brief wait needs a word to it: spinning is what it does by itself.
    """
    global _decided, _ours
    if _decided is not None:
        return _decided
    if "/libgomp" in text_of(root / "proc/self/maps"):
        _decided = Waiting("spin", "libgomp was loaded before by another library, its own setting stays")
        return _decided
    decode, prefill = default_threads()
    waiting = choose_waiting(max(int(decode.value), int(prefill.value)), root)
    if waiting.kind == "brief" and _SPINS not in os.environ:
        os.environ[_SPINS] = _ours = str(BRIEF_SPINS)
    _decided = waiting
    return waiting


def users_environment() -> dict[str, str]:
    """The environment without what ``prepare_openmp`` wrote: a child process is to choose by itself."""
    return {name: value for name, value in os.environ.items() if name != _SPINS or value != _ours}


def let_helpers_go(root: Path = ROOT) -> bool:
    """Give back the threads that libgomp keeps for the calling thread; whether there is a libgomp that can.

    Whoever loads a model leaves helpers behind (weights are repacked by all threads). When another thread computes,
    it gets helpers of its own, libgomp counts more threads than CPUs, and none of them spins any more: decoding on two
    cores took five times as long. Other packages may bring a libgomp of their own, so all are asked.
    """
    done = False
    for path in set(re.findall(r"\s(/\S*/libgomp\S*)$", text_of(root / "proc/self/maps"), re.MULTILINE)):
        pause = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)  # from gcc 9 on
        done = (pause is not None and pause(_PAUSE_SOFT) == 0) or done
    return done


def decided() -> Waiting | None:
    """What ``prepare_openmp`` decided in this process, None before."""
    return _decided


def ask(kind: Literal["spin", "passive"]) -> None:
    """Let this process's engines wait like this, whatever else runs; before the first model is opened."""
    os.environ[_POLICY] = "active" if kind == "spin" else "passive"
