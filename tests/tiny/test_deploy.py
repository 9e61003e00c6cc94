"""Deployment to a device made of a real sshd and the real engine: round trip, resumption, damage, going back."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from ssh_device import SSHD, Device, free_port, ssh_device
from tiny_models import make_tiny_llama

from edgelm.cli.app import run_cli
from edgelm.report import read_report

pytestmark = [
    pytest.mark.tiny,
    pytest.mark.skipif(SSHD is None, reason="no sshd here; on Debian: apt-get install openssh-server"),
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles of one random model."""
    directory = tmp_path_factory.mktemp("bundles")
    checkpoint = make_tiny_llama(directory / "checkpoint")
    made = []
    for quant in ("Q8_0", "F16"):
        bundle = directory / quant.lower()
        assert run_cli(["export", str(checkpoint), "--quant", quant, "--no-verify", "-o", str(bundle)]) == 0
        made.append(bundle)
    return made[0], made[1]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with ssh_device(tmp_path / "device") as made:
        yield made


def deploy(device: Device, *words: str, config: Path | None = None) -> int:
    ssh = str(config or device.config)
    return run_cli(["deploy", *words, device.destination, "--ssh-config", ssh, "--port", str(device.port)])


@contextmanager
def never_without_a_release(device: Device) -> Iterator[None]:
    """Reads what is current all the time; fails when it is ever missing or incomplete."""
    done, problems = threading.Event(), []

    def watch() -> None:
        while not done.wait(0.001):
            try:
                json.loads((device.root / "current/bundle/manifest.json").read_bytes())
            except (OSError, ValueError) as error:  # noqa: PERF203
                problems.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert not problems


def identity(bundle: Path) -> str:
    manifest = (bundle / "manifest.json").read_bytes()
    return f"{json.loads(manifest)['name']}-{hashlib.sha256(manifest).hexdigest()[:12]}"


def test_a_bundle_goes_out_and_its_report_comes_home(
    device: Device, bundles: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = bundles
    report = tmp_path / "report.json"
    assert deploy(device, str(first), "-o", str(report), "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["bundle"] == identity(first) == device.current()
    assert document["previous"] is None
    assert document["sent_bytes"] == sum(path.stat().st_size for path in first.iterdir())
    for path in first.iterdir():
        assert (device.root / "current/bundle" / path.name).read_bytes() == path.read_bytes()
    measured = read_report(report)
    assert measured.decode_tps is not None
    assert measured.settings.prompt_tokens == 128
    assert run_cli(["compare", str(report), "--json"]) == 0
    capfd.readouterr()

    with never_without_a_release(device):
        assert deploy(device, str(second), "--no-bench", "--json") == 0
    assert json.loads(capfd.readouterr().out)["previous"] == identity(first)
    assert device.current() == identity(second)
    with never_without_a_release(device):
        assert deploy(device, "--rollback", "--json") == 0
    back = json.loads(capfd.readouterr().out)
    assert (back["bundle"], back["previous"]) == (identity(first), identity(second))
    assert device.current() == identity(first)


def test_what_is_there_already_is_not_sent_again(
    device: Device, bundles: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles[0]
    incoming = device.root / "incoming" / identity(bundle)
    incoming.mkdir(parents=True)
    model = (bundle / "model.gguf").read_bytes()
    (incoming / "model.gguf").write_bytes(model[: len(model) // 2])
    assert deploy(device, str(bundle), "--no-bench", "--json") == 0
    total = sum(path.stat().st_size for path in bundle.iterdir())
    assert json.loads(capfd.readouterr().out)["sent_bytes"] == total - len(model) // 2
    assert (device.root / "current/bundle/model.gguf").read_bytes() == model
    assert deploy(device, str(bundle), "--no-bench", "--json") == 0
    assert json.loads(capfd.readouterr().out)["sent_bytes"] == 0


def test_a_transfer_that_was_cut_off_goes_on(
    device: Device, bundles: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles[1]
    total = sum(path.stat().st_size for path in bundle.iterdir())
    assert deploy(device, str(bundle), "--no-bench", config=device.cut_after(total // 2)) == 1
    errors = capfd.readouterr().err
    assert "error: the connection to board was lost while model.gguf was sent" in errors
    assert "hint: do the same again" in errors
    assert not (device.root / "current").exists()
    arrived = (device.root / "incoming" / identity(bundle) / "model.gguf").stat().st_size
    assert arrived > 0
    assert deploy(device, str(bundle), "--no-bench", "--json") == 0
    assert json.loads(capfd.readouterr().out)["sent_bytes"] <= total - arrived
    assert (device.root / "current/bundle/model.gguf").read_bytes() == (bundle / "model.gguf").read_bytes()


def write_wheel(directory: Path, *, version: str) -> None:
    """EdgeLM as a wheel whose dependencies are those of this environment, found by a path file."""
    repository, information = Path(__file__).resolve().parents[2], f"edgelm-{version}.dist-info"
    directory.mkdir()
    files: dict[str, bytes] = {}
    for package in ("edgelm", "runtime", "targets"):
        for path in (repository / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files[path.relative_to(repository).as_posix()] = path.read_bytes()
    files["dependencies.pth"] = f"{Path(click.__file__).parents[1]}\n".encode()
    files[f"{information}/METADATA"] = f"Metadata-Version: 2.1\nName: edgelm\nVersion: {version}\n".encode()
    files[f"{information}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{information}/entry_points.txt"] = b"[console_scripts]\nedgelm = edgelm.cli.app:main\n"
    files[f"{information}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{information}/RECORD")).encode()
    with zipfile.ZipFile(directory / f"edgelm-{version}-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


def test_going_back_takes_the_software_along(
    device: Device, bundles: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bundle with wheels, the next one in a container, and back to the first with the software that served it."""
    write_wheel(tmp_path / "wheels", version="0.0.1")
    assert deploy(device, str(bundles[0]), "--wheels", str(tmp_path / "wheels"), "--no-bench") == 0
    software = (device.root / "current/software").resolve()
    assert software.parent == (device.root / "software").resolve()
    start = device.root / "current/start"
    assert f"{software}/bin/edgelm serve" in start.read_text()
    assert "--target auto" in start.read_text()

    assert deploy(device, str(bundles[1]), "--image", "edgelm:test") == 1
    assert "has neither docker nor podman" in capfd.readouterr().err or shutil.which("docker") or shutil.which("podman")
    device.with_engine()
    assert deploy(device, str(bundles[1]), "--image", "other:test") == 1
    assert "neither board nor this machine has an image other:test" in capfd.readouterr().err
    report = tmp_path / "report.json"
    assert deploy(device, str(bundles[1]), "--image", "edgelm:test", "-o", str(report)) == 0
    assert read_report(report).decode_tps is not None
    run = [line for line in (device.home / "docker.log").read_text().splitlines() if line.startswith("run ")]
    assert [line.split(" sha256:0123abcd ")[1].split()[0] for line in run] == ["bench", "serve"]
    for wanted in ("--read-only", "--cap-drop ALL", "--security-opt no-new-privileges", "--user"):
        assert all(wanted in line for line in run)
    assert not (device.root / "current/software").exists()

    assert deploy(device, "--rollback") == 0
    assert device.current() == identity(bundles[0])
    assert (device.root / "current/software").resolve() == software
    assert (software / "bin/edgelm").exists()
    unit = (device.home / ".config/systemd/user/edgelm.service").read_text()
    assert f"ExecStart={device.root}/current/start\n" in unit
    assert "Type=exec\n" in unit  # what serves there may be too old to tell that it is ready
    assert deploy(device, str(bundles[0]), "--image", "edgelm:test", "--wheels", str(tmp_path)) == 2


def test_an_image_that_the_device_lacks_is_sent(
    device: Device,
    bundles: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Sent once, not again, and anew when this machine's image of that name has become another one."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]

    def image_here(identity: str, architecture: str) -> None:
        lines = ["#!/bin/sh", 'case "$1" in', f"image) echo {architecture} {identity} ;;"]
        lines += [f"save) echo built:here {identity} ;;", "esac", ""]
        (tmp_path / "docker").write_text("\n".join(lines), encoding="ascii")
        (tmp_path / "docker").chmod(0o755)

    def commands() -> list[str]:
        lines = (device.home / "docker.log").read_text().splitlines()
        (device.home / "docker.log").write_text("")
        return [line.split()[0] for line in lines if line != "--version"]

    device.with_engine()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    image_here("sha256:aaaa", "s390x")
    assert deploy(device, str(bundles[0]), "--image", "built:asked", "--no-bench") == 1
    assert f"has an image built:asked for {platform.machine()}" in capfd.readouterr().err
    commands()
    image_here("sha256:aaaa", machine)
    assert deploy(device, str(bundles[0]), "--image", "built:asked", "--no-bench") == 0
    assert commands() == ["image", "load", "tag", "image", "run"]
    assert "sha256:aaaa serve" in (device.root / "current/start").read_text()
    assert not list((device.root / "incoming").glob("image-*"))
    assert deploy(device, str(bundles[0]), "--image", "built:asked", "--no-bench") == 0
    assert commands() == ["image", "run"]
    image_here("sha256:bbbb", machine)
    assert deploy(device, str(bundles[0]), "--image", "built:asked", "--no-bench") == 0
    assert "load" in commands()
    assert "sha256:bbbb serve" in (device.root / "current/start").read_text()
    assert deploy(device, "--rollback") == 0
    assert "sha256:aaaa serve" in (device.root / "current/start").read_text()


def test_podman_without_root_gives_the_user_its_own_files(device: Device, bundles: tuple[Path, Path]) -> None:
    device.with_engine("podman version 4.3.1")  # Debian's podman-docker calls it docker
    device.add_program("id", "#!/bin/sh\ncase $1 in -[ug]) echo 1000 ;; *) exec /usr/bin/id ;; esac\n")
    assert deploy(device, str(bundles[0]), "--image", "edgelm:test", "--no-bench") == 0
    assert "--user 1000:1000 --userns keep-id " in (device.root / "current/start").read_text()


def test_a_damaged_file_is_named_and_never_becomes_current(
    device: Device, bundles: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles[0]
    incoming = device.root / "incoming" / identity(bundle)
    incoming.mkdir(parents=True)
    size = (bundle / "model.gguf").stat().st_size
    (incoming / "model.gguf").write_bytes(bytes(size // 2))
    assert deploy(device, str(bundle), "--no-bench") == 1
    errors = capfd.readouterr().err
    assert "error: model.gguf arrived damaged on board" in errors
    assert not (device.root / "current").exists()
    assert deploy(device, str(bundle), "--no-bench") == 0
    assert device.current() == identity(bundle)

    served = device.root / "current/bundle/model.gguf"  # a worn SD card: what is served went bad after it arrived
    served.unlink()
    served.write_bytes(bytes(size))
    assert deploy(device, str(bundle), "--no-bench") == 1
    assert "arrived damaged" in capfd.readouterr().err
    assert deploy(device, str(bundle), "--no-bench") == 0
    assert served.read_bytes() == (bundle / "model.gguf").read_bytes()


def test_a_bundle_that_does_not_serve_gives_way_to_the_one_before(
    device: Device, bundles: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = bundles[0]
    assert deploy(device, str(good), "--no-bench") == 0
    broken = tmp_path / "broken"
    shutil.copytree(good, broken)
    model = broken / "model.gguf"
    model.write_bytes(b"GGUF" + bytes(model.stat().st_size - 4))
    manifest = json.loads((broken / "manifest.json").read_text(encoding="utf-8"))
    record = next(record for record in manifest["files"] if record["name"] == "model.gguf")
    record["sha256"] = hashlib.sha256(model.read_bytes()).hexdigest()
    (broken / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    capfd.readouterr()

    assert deploy(device, str(broken), "--no-bench", "--ready-timeout", "8") == 1
    errors = capfd.readouterr().err
    assert "was not ready within 8 s" in errors
    assert f"{identity(good)} serves again" in errors
    assert device.current() == identity(good)

    assert deploy(device, str(broken)) == 1  # with a measurement it does not even get that far
    assert "board: error:" in capfd.readouterr().err
    assert device.current() == identity(good)


def test_wrong_ways_are_named(device: Device, bundles: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    bundle = str(bundles[0])
    (device.root / "venv/bin/edgelm").unlink()
    assert deploy(device, bundle) == 1
    assert "EdgeLM is not installed" in capfd.readouterr().err
    assert deploy(device, "--rollback") == 1
    assert "there is no earlier release" in capfd.readouterr().err
    device.config.write_text(f"Host board\n  HostName 127.0.0.1\n  Port {free_port()}\n  BatchMode yes\n")
    assert deploy(device, bundle) == 1
    assert "board cannot be reached" in capfd.readouterr().err
    assert run_cli(["deploy", bundle, "-oProxyCommand=false"]) == 2
    assert run_cli(["deploy", bundle, "host;true"]) == 2
    assert "is not [USER@]HOST" in capfd.readouterr().err
