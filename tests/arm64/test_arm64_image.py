"""The image for ARM boards, run for real: on an ARM machine as it is, elsewhere in emulation.

Skipped with a sentence where the image or what runs it is missing; ``make arm64`` builds it and proves much more.
"""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.arm64, pytest.mark.timeout(900)]

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
