"""The image for ARM boards, run for real: on an ARM machine as it is, elsewhere in emulation.

Skipped with a sentence where the image or what runs it is missing; ``make arm64`` builds it and proves much more.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
from ssh_device import SSHD, Device, ssh_device
from tiny_models import make_tiny_llama

from edgelm.cli.app import run_cli
from edgelm.report import read_report

pytestmark = [pytest.mark.arm64, pytest.mark.timeout(3600)]

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def image_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``scripts/arm64_image.py``, once it is certain that its image can be run here."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("arm64_image")
    if not script.docker_runs() and shutil.which("podman") is None:
        pytest.skip("neither a Docker engine nor podman is here: apt-get install podman runc")
    if platform.machine() not in ("aarch64", "arm64") and not (script.BINFMT / "qemu-aarch64").exists():
        pytest.skip("ARM programs cannot be run here: apt-get install qemu-user-static, then make arm64-image")
    known = subprocess.run([*script.engine(), "image", "inspect", script.IMAGE], capture_output=True, check=False)
    if known.returncode != 0:
        pytest.skip(f"the image {script.IMAGE} is not built: make arm64-image")
    return script


def doctor(script: ModuleType, processor: str) -> dict[str, Any]:
    options = script.container_options(memory="1g", cpu=processor)
    command = [*script.engine(), "run", "--rm", *options, script.IMAGE, "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("{"), result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_the_locked_down_image_is_healthy_with_the_kernels_of_a_raspberry_pi_5(image_script: ModuleType) -> None:
    document = doctor(image_script, "cortex-a76")
    assert document["healthy"], document["findings"]
    if platform.machine() not in ("aarch64", "arm64"):
        assert document["engine"]["versions"]["kernels"] == "armv8.2_2"


@pytest.fixture
def board(image_script: ModuleType, tmp_path: Path) -> Iterator[Device]:
    """A device with a container engine of its own that has no image yet: podman with an empty store."""
    if SSHD is None or os.geteuid() != 0 or shutil.which("podman") is None or shutil.which("catatonit") is None:
        pytest.skip("root makes this device, with apt-get install openssh-server podman catatonit")
    # Podman wants a short path for what it keeps while it runs.
    with ssh_device(tmp_path / "device") as made, TemporaryDirectory(prefix="edgelm-podman-") as run_root:
        engine = ["podman", "--root", str(tmp_path / "images"), "--runroot", run_root]
        engine += image_script.podman_options()
        # Where ARM is emulated, the processor of a Raspberry Pi 5, and threads that do not spin while they wait.
        run = ["run", "--env", "QEMU_CPU=cortex-a76", "--env", "OMP_WAIT_POLICY=passive"]
        run += ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]
        lines = ["#!/bin/sh", f'[ "$1" != run ] || {{ shift; exec {shlex.join([*engine, *run])} "$@"; }}']
        made.add_program("docker", "\n".join([*lines, f'exec {shlex.join(engine)} "$@"', ""]))
        yield made
        subprocess.run([*engine, "system", "reset", "--force"], capture_output=True, check=False)


def test_a_bundle_is_deployed_into_the_image_and_goes_back(
    image_script: ModuleType, board: Device, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, bundle, report = make_tiny_llama(tmp_path / "checkpoint"), tmp_path / "bundle", tmp_path / "report.json"
    for quant in ("F16", "Q8_0"):
        assert run_cli(["export", str(checkpoint), "--quant", quant, "--no-verify", "-o", f"{bundle}-{quant}"]) == 0
    if platform.machine() not in ("aarch64", "arm64"):
        board.add_program("uname", "#!/bin/sh\necho aarch64\n")
    ways = ["--ssh-config", str(board.config), "--port", str(board.port), "--ready-timeout", "1200"]
    image = ["--image", image_script.IMAGE]
    assert run_cli(["deploy", f"{bundle}-F16", "board", *image, "--no-bench", *ways]) == 0
    assert "loading the image on the device" in capfd.readouterr().err
    first = board.current()
    assert run_cli(["deploy", f"{bundle}-Q8_0", "board", *image, "-o", str(report), *ways]) == 0
    measured = read_report(report)
    assert measured.decode_tps is not None
    assert measured.model.quant == "Q8_0"
    assert "aarch64" in measured.host.os
    assert board.current() != first
    assert run_cli(["compare", str(report), "--target", "raspberry-pi-5-4gb", "--json"]) == 0
    assert "loading the image" not in capfd.readouterr().err
    assert run_cli(["deploy", "--rollback", "board", *ways]) == 0
    assert board.current() == first
