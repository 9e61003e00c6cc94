"""How threads wait: what is chosen on which machine, and that the environment has the last word."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import waiting
from runtime.shortfall import causes, speed_finding, storage_finding
from runtime.waiting import Neighbours, choose_waiting, prepare_openmp, runnable_neighbours
from targets.facts import ROOT
from tests.unit.test_sensors import pi, write


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A quiet machine of two CPUs and nothing asked for."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(waiting.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(waiting, "_decided", None)
    monkeypatch.setattr(waiting, "_ours", None)
    monkeypatch.setattr(waiting, "_LOOK_EVERY_S", 0.0)
    status = {"proc/self/status": "Cpus_allowed_list:\t0-1\n", "proc/stat": "procs_running 1\n"}
    return write(tmp_path, status)


def test_an_idle_core_for_every_thread_means_spinning(host: Path) -> None:
    assert choose_waiting(2, host).kind == "spin"
    assert choose_waiting(1, host).kind == "passive"


def test_a_neighbour_means_a_brief_wait(host: Path) -> None:
    write(host, {"proc/stat": "procs_running 2\n"})
    assert runnable_neighbours(host) == Neighbours(1)
    found = choose_waiting(2, host)
    assert found.kind == "brief"
    assert "1 threads of others" in found.reason


def test_what_runs_for_a_moment_is_no_neighbour(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.cycle([9, 9, 9, 1, 1, 1, 1])
    monkeypatch.setattr(waiting.time, "sleep", lambda _: write(host, {"proc/stat": f"procs_running {next(looks)}\n"}))
    assert choose_waiting(2, host).kind == "spin"


def test_a_server_that_starts_its_engine_is_no_neighbour_of_it(host: Path) -> None:
    task = f"proc/{os.getppid()}/task"
    write(host, {"proc/stat": "procs_running 3\n", f"{task}/7/stat": "7 (a) b) R 1", f"{task}/8/stat": "8 (c) S 1"})
    assert runnable_neighbours(host) == Neighbours(1)
    write(host, {f"{task}/8/stat": "8 (c) R 1"})
    assert choose_waiting(2, host).kind == "spin"


def stat(state: str, nice: int, policy: int = 0) -> str:
    """A thread's stat with the fields that are read."""
    fields = [state, *"0" * 40]
    fields[16], fields[38] = str(nice), str(policy)
    return f"9 (a) b) {' '.join(fields)}"


@pytest.mark.parametrize(
    ("nice", "policy", "group", "session", "gives_way"),
    [
        (10, 0, "0::/", "/autogroup-1 nice 0", True),
        (19, 0, "0::/", "/autogroup-1 nice 0", True),
        (0, 5, "0::/", "/autogroup-1 nice 0", True),  # SCHED_IDLE
        (9, 0, "0::/", "/autogroup-1 nice 0", False),
        (19, 0, "0::/", "/autogroup-2 nice 0", False),  # between sessions nice counts for nothing
        (19, 0, "0::/box", "/autogroup-1 nice 0", False),
    ],
)
def test_neighbours_that_give_way_are_none_for_threads_that_would_sleep(
    host: Path, nice: int, policy: int, group: str, session: str, gives_way: bool
) -> None:
    files = {"proc/stat": "procs_running 2\n", "proc/self/stat": stat("R", 0)}
    files |= {"proc/self/cgroup": "0::/", "proc/self/autogroup": "/autogroup-1 nice 0"}
    files |= {"proc/55/cgroup": group, "proc/55/autogroup": session, "proc/55/task/56/stat": stat("R", nice, policy)}
    write(host, files)
    assert choose_waiting(2, host).kind == "brief"
    found = choose_waiting(2, host, sleeps=True)
    assert found.kind == ("spin" if gives_way else "brief")
    assert ("1 threads of others that want to run give way" in found.reason) == gives_way
    write(host, {"proc/stat": "procs_running 3\n"})  # one more, which the kernel counts and does not show
    assert choose_waiting(2, host, sleeps=True).kind == "brief"


def test_who_is_of_low_priority_itself_pushes_nobody_aside(host: Path) -> None:
    files = {"proc/stat": "procs_running 2\n", "proc/self/stat": stat("R", 10), "proc/55/task/56/stat": stat("R", 19)}
    write(host, files)
    assert choose_waiting(2, host, sleeps=True).kind == "brief"
    write(host, {"proc/self/stat": stat("R", 0, 5)})
    assert choose_waiting(2, host, sleeps=True).kind == "brief"


def test_a_parent_of_low_priority_is_not_left_out_twice(host: Path) -> None:
    files = {"proc/stat": "procs_running 3\n", "proc/self/stat": stat("R", 0)}
    files |= {f"proc/{os.getppid()}/task/7/stat": stat("R", 19)}
    assert choose_waiting(2, write(host, files), sleeps=True).kind == "brief"


def test_threads_asleep_give_way_to_nobody(host: Path) -> None:
    files = {"proc/stat": "procs_running 2\n", "proc/self/stat": stat("R", 0), "proc/55/task/56/stat": stat("S", 19)}
    assert choose_waiting(2, write(host, files), sleeps=True).kind == "brief"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_real_neighbour_that_gives_way_is_seen() -> None:
    if os.sched_getscheduler(0) == os.SCHED_IDLE:
        pytest.skip("tests of the idle class push nobody aside")
    busy = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); print(flush=True)\nwhile 1: pass"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            assert ROOT / f"proc/{child.pid}/task/{child.pid}/stat" in waiting._givers(ROOT)
        finally:
            child.kill()


def test_too_many_threads_and_quotas_mean_a_brief_wait(host: Path) -> None:
    assert choose_waiting(3, host).kind == "brief"
    group = {"proc/self/cgroup": "0::/box\n", "sys/fs/cgroup/box/cpu.max": "100000 100000\n"}
    found = choose_waiting(2, write(host, group))
    assert found.kind == "brief"
    assert "cpu.max grants 1 CPUs" in found.reason


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("OMP_WAIT_POLICY", "PASSIVE", "passive"),
        ("OMP_WAIT_POLICY", "active", "spin"),
        ("GOMP_SPINCOUNT", "123", "brief"),
    ],
)
def test_the_environment_has_the_last_word(
    host: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, kind: str
) -> None:
    write(host, {"proc/stat": "procs_running 9\n"})
    monkeypatch.setenv(name, value)
    found = choose_waiting(2, host)
    assert found.kind == kind
    assert f"{name}=" in found.reason


def test_libgomp_is_told_before_it_is_loaded_and_only_once(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(host, {"proc/stat": "procs_running 9\n"})
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that the fixture puts it back
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(waiting, "default_threads", lambda: (_Two(), _Two()))
    assert prepare_openmp(host).kind == "brief"
    assert waiting.os.environ["GOMP_SPINCOUNT"] == str(waiting.BRIEF_SPINS)
    assert "GOMP_SPINCOUNT" not in waiting.users_environment()
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert waiting.users_environment()["GOMP_SPINCOUNT"] == "77"
    monkeypatch.setenv("GOMP_SPINCOUNT", str(waiting.BRIEF_SPINS))
    write(host, {"proc/stat": "procs_running 1\n"})
    assert prepare_openmp(host).kind == "brief"
    assert choose_waiting(2, host).kind == "spin"  # our own value is no wish of the user's


class _Two:
    value = 2


def test_a_loaded_libgomp_keeps_its_own_mind(host: Path) -> None:
    write(
        host,
        {"proc/self/maps": "7f00-7f01 r-xp 0 08:02 1 /usr/lib/libgomp.so.1.0.0\n", "proc/stat": "procs_running 9\n"},
    )
    assert "loaded before" in prepare_openmp(host).reason


def test_without_libgomp_there_are_no_helpers_to_let_go(host: Path) -> None:
    assert not waiting.let_helpers_go(host)


def test_doctor_sees_why_a_board_is_slow(tmp_path: Path) -> None:
    root = pi(tmp_path, "50005")
    tree = {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
        "sys/class/thermal/thermal_zone0/temp": "84000\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
        "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "0-1\n",
        "sys/devices/system/cpu/cpu1/topology/thread_siblings_list": "0-1\n",
        "proc/self/cgroup": "0::/box\n",
        "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
    }
    found = {finding.name: finding for finding in causes(root=write(root, tree))}
    assert {name: finding.status for name, finding in found.items()} == {
        "governor": "warning",
        "throttling": "warning",
        "temperature": "warning",
        "clock": "ok",
        "cpu quota": "warning",
        "smt": "note",
        "huge pages": "note",
    }
    assert all(finding.hint for finding in found.values() if finding.status != "ok")
    assert "power supply" in (found["throttling"].hint or "")


def test_speed_and_storage_are_judged() -> None:
    assert speed_finding("decode", 80, 100, "x", []).status == "ok"
    slow = speed_finding("decode", 20, 100, "x", ["governor"])
    assert (slow.status, slow.hint) == ("warning", "possible causes found: governor")
    assert "thread counts" in (speed_finding("decode", 20, 100, "x", []).hint or "")
    assert storage_finding(40e6, 10**9).status == "warning"
    assert storage_finding(500e6, 10**9).status == "ok"
