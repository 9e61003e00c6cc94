"""Build the images for 64-bit ARM boards and run containers from them, with Docker where its engine runs, else Podman.

Without Docker nothing is pulled: the base image that ``Dockerfile.arm64`` names is made by debootstrap from Debian's
signed packages and stored under that name. Standard library only. It does not know what is done in the containers.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache" / "arm64"
IMAGE = "edgelm:arm64"
EXPORTER_IMAGE = "edgelm-exporter:arm64"
IMAGES = {"runtime": IMAGE, "exporter": EXPORTER_IMAGE}  # by stage of Dockerfile.arm64
BASE = "docker.io/library/debian:bookworm-slim"
SUITE = "bookworm"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host")


def is_arm() -> bool:
    return platform.machine() in ("aarch64", "arm64")


def need(program: str, package: str) -> str:
    """Path of a program; exits with the Debian package to install when it is missing."""
    found = shutil.which(program)
    if found is None:
        sys.exit(f"error: {program} is missing\nhint: on Debian and Ubuntu: apt-get install {package}")
    return found


def run(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command, output captured; exits with the end of its output when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if result.returncode != 0:
        tail = (result.stdout + result.stderr).splitlines()[-25:]
        sys.exit("\n".join([*tail, f"error: exit {result.returncode}: {' '.join(command[:12])}"]))
    return result  # type: ignore[no-any-return]


def docker_runs() -> bool:
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=30).returncode == 0


def docker_builder(*, load: bool) -> list[str]:
    """Docker's words for building. Without the buildx plug-in its engine's own BuildKit does it, which always loads."""
    if subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode == 0:
        return ["docker", "buildx", "build", *(["--load"] if load else [])]
    return ["docker", "build"]


def engine() -> list[str]:
    """The container engine's command with its global options."""
    return ["docker"] if docker_runs() else [need("podman", "podman"), *podman_options()]


def podman_options() -> list[str]:
    """What Podman has to be told about this machine."""
    # runc knows every layout of control groups, crun refuses mixed ones; without systemd nobody else manages them.
    options = ["--runtime", "runc"] if shutil.which("runc") else []
    return options if Path("/run/systemd/system").is_dir() else [*options, "--cgroup-manager", "cgroupfs"]


def enable_emulation() -> None:
    """Let the kernel start ARM programs through qemu, unless this is an ARM machine or it is so already."""
    if is_arm():
        return
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], capture_output=True, check=False)
    if (BINFMT / "qemu-aarch64").exists():
        return
    need("qemu-aarch64-static", "qemu-user-static")
    rule = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
    try:
        (BINFMT / "register").write_text(rule.read_text(encoding="ascii"), encoding="ascii")
    except OSError as error:
        sys.exit(f"error: cannot register qemu for ARM programs: {error}\nhint: run this as root, once")


def check_tools() -> None:
    """Exit with everything that building and running the images lacks here, before the first of it is needed."""
    wanted = {} if docker_runs() else {"podman": "podman runc", "debootstrap": "debootstrap"}
    if not is_arm() and not (BINFMT / "qemu-aarch64").exists():
        wanted["qemu-aarch64-static"] = "qemu-user-static"
    missing = [program for program in wanted if shutil.which(program) is None]
    if missing:
        packages = " ".join(wanted[program] for program in missing)
        sys.exit(f"error: missing: {', '.join(missing)}\nhint: on Debian and Ubuntu: apt-get install {packages}")


def ensure_base(command: list[str]) -> None:
    """The base image of the building stages for this machine, made from Debian's packages when it is not stored."""
    if subprocess.run([*command, "image", "exists", BASE], check=False).returncode == 0:
        return
    root = CACHE / f"base-{SUITE}"
    if not (root / "etc/debian_version").exists() or (root / "debootstrap").exists():
        print(f"making {BASE} from Debian's packages, once", file=sys.stderr)
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        run([need("debootstrap", "debootstrap"), "--variant=minbase", SUITE, str(root)])
    sources = root / "etc/apt/sources.list"
    mirror = sources.read_text(encoding="ascii").split()[1]  # debootstrap's own choice; security fixes lie beside it
    lines = f"deb {mirror} {SUITE} main\ndeb {mirror}-security {SUITE}-security main\n"
    sources.write_text(lines, encoding="ascii")
    archive = CACHE / "base.tar"
    run(["tar", "-C", str(root), "--one-file-system", "-cf", str(archive), "."])
    run([*command, "import", str(archive), BASE])
    archive.unlink()


def secrets(directory: Path) -> list[str]:
    """Build options that hand the machine's pip settings and certificates to the building steps; never stored."""
    listed = run([sys.executable, "-m", "pip", "config", "list"]).stdout
    settings = dict(re.findall(r"^\S*?\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    lines = ["[global]"]
    for name in PIP_SETTINGS:
        kept = [word for word in settings.get(name, "").replace("\\n", " ").split() if not word.startswith("file:")]
        if kept:
            lines.append(f"{name} = {' '.join(kept)}")
    options: list[str] = []
    certificates = Path(settings.get("cert", "/nonexistent"))
    if certificates.is_file():
        lines.append("cert = /run/ca_bundle.pem")
        options += ["--secret", f"id=ca_bundle,src={certificates}"]
    configuration = directory / "pip.conf"
    configuration.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return [*options, "--secret", f"id=pip_conf,src={configuration}"]


def build(target: str, *, output: Path | None = None) -> float:
    """Build the image of a stage (or, with ``output``, write its files there) and return the seconds it took."""
    command = engine()
    started = time.perf_counter()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        arguments = ["--file", "Dockerfile.arm64", "--target", target, *secrets(Path(directory))]
        environment = dict(os.environ)
        if command[0] == "docker":
            built = docker_builder(load=output is None)
            environment["DOCKER_BUILDKIT"] = "1"
        else:
            ensure_base(command)
            started = time.perf_counter()
            # chroot isolation needs no more rights than debootstrap; docker format because OCI's has no health check.
            built = [*command, "build", "--isolation", "chroot", "--pull=never", "--format", "docker", "--layers"]
            here = "arm64" if is_arm() else "amd64"  # old versions do not know what they run on
            built += ["--build-arg", f"BUILDPLATFORM=linux/{here}", "--build-arg", f"BUILDARCH={here}"]
        built += ["--platform", "linux/arm64", *arguments]
        built += ["--tag", IMAGES[target]] if output is None else ["--output", str(output)]
        done = subprocess.run([*built, "."], cwd=REPOSITORY, stdout=sys.stderr, check=False, env=environment)
    if done.returncode != 0:
        sys.exit("error: the image was not built")
    return time.perf_counter() - started


def image_bytes(image: str = IMAGE) -> int:
    """Size of an image's files, unpacked."""
    return int(run([*engine(), "image", "inspect", "--format", "{{.Size}}", image]).stdout)


def image_id(image: str = IMAGE) -> str:
    """What an image is called as long as nothing in it changes."""
    return run([*engine(), "image", "inspect", "--format", "{{.Id}}", image]).stdout.strip()


def container_options(*, memory: str, cpu: str | None = None, mounts: Sequence[str] = ()) -> list[str]:
    """Options of ``run`` for a locked-down container: read-only, no capabilities, no network, limited memory.

    ``cpu`` is the processor that qemu imitates where ARM programs are emulated.
    """
    options = ["--platform", "linux/arm64", "--read-only", "--tmpfs", "/tmp:size=64m", "--cap-drop", "ALL"]  # noqa: S108
    options += ["--security-opt", "no-new-privileges", "--network", "none", "--memory", memory, "--memory-swap", memory]
    # Plenty for one server. Podman's own wish is more than a caller whose limits are inherited may give.
    options += ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]
    if engine()[0] != "docker":
        options.append("--pull=never")
    if cpu is not None and not is_arm():
        # Threads that spin while they wait cost an emulated processor most of its time.
        options += ["--env", f"QEMU_CPU={cpu}", "--env", "OMP_WAIT_POLICY=passive"]
    for mount in mounts:
        options += ["--volume", mount]
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", choices=IMAGES, default="runtime", help="which image to build")
    parser.add_argument("--ready", action="store_true", help="only check what building and running need, emulation too")
    parser.add_argument("--wheel", type=Path, metavar="DIR", help="write the llama-cpp-python wheel alone into DIR")
    arguments = parser.parse_args()
    if arguments.ready:
        check_tools()
        enable_emulation()
        return
    os.environ.setdefault("BUILDKIT_PROGRESS", "plain")
    if arguments.wheel is not None:
        arguments.wheel.mkdir(parents=True, exist_ok=True)
        seconds = build("wheel", output=arguments.wheel.resolve())
        print(f"{arguments.wheel}: written in {seconds:.0f} s")
        return
    seconds = build(arguments.target)
    image = IMAGES[arguments.target]
    print(f"{image}: {image_bytes(image) / 1e6:.1f} MB, built in {seconds:.0f} s")


if __name__ == "__main__":
    main()
