"""A container image to a device: what this machine has and the device has not is sent like every other file.

Knows images by name, id and processor architecture, and the commands that Docker and Podman share; not what runs in
a container.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle import file_record
from edgelm.errors import DeployError
from edgelm.progress import Progress
from targets.remote import Remote, Say, check_room

LOAD_TIMEOUT_S = 1800.0
# What Linux calls processors, and what images do.
_ARCHITECTURES = {"aarch64": "arm64", "x86_64": "amd64", "armv7l": "arm", "riscv64": "riscv64"}


@dataclass(frozen=True, slots=True)
class _Here:
    """An image of this machine, and the container engine that has it."""

    engine: str
    image_id: str


def bring_image(remote: Remote, root: str, runner: str, image: str, progress: Progress, say: Say) -> str:
    """The id of ``image`` on the device, after sending it when this machine has another one of that name.

    An image for another kind of processor than the device's is not sent. ``root`` is EdgeLM's directory there,
    ``runner`` its container engine. Raises ``DeployError`` when neither machine has the image.
    """
    script = """
uname -m
there=$("$2" image inspect --format "{{.Id}}" "$3" 2> /dev/null) || there=none
echo "$there"
cat "$1/image" 2> /dev/null || true
"""
    machine, there, *sent = remote.run(script, root, runner, image).splitlines()
    here = _image_here(image, _ARCHITECTURES.get(machine, machine))
    if here is None:
        if there == "none":
            raise DeployError(
                f"neither {remote.destination} nor this machine has an image {image} for {machine}",
                hint="make arm64-image builds edgelm:arm64 here; then it is sent",
            )
        return there
    # One image may have another id in another engine, so what was sent last is written down with both.
    if there.removeprefix("sha256:") == here.image_id or f"{here.image_id} {there}" in sent:
        return there
    return _send(remote, root, runner, image, here, progress, say)


def _image_here(image: str, architecture: str) -> _Here | None:
    for engine in filter(shutil.which, ("docker", "podman")):
        command = [engine, "image", "inspect", "--format", "{{.Architecture}} {{.Id}}", image]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.split()[0] == architecture:
            return _Here(engine, found.stdout.split()[1].removeprefix("sha256:"))
    return None


def _send(remote: Remote, root: str, runner: str, image: str, here: _Here, progress: Progress, say: Say) -> str:
    with tempfile.TemporaryDirectory(prefix="edgelm-image-") as directory:
        path = _save(Path(directory), image, here, say)
        record = file_record(path)
        script = """
cd "$1/incoming"
for old in image-*.tar.gz; do [ "$old" = "$2" ] || rm -f "$old"; done
df -Pk . | awk 'NR == 2 { print $4 }'
[ ! -f "$2" ] || stat -c %s "$2"
"""
        free, *held = remote.run(script, root, path.name).split()
        offset = min(int(held[0]), record.size_bytes) if held else 0
        check_room(remote, int(free) * 1024, record.size_bytes - offset)
        with progress.stage("sending the image", record.size_bytes - offset, unit="bytes") as stage:
            if offset < record.size_bytes:
                remote.append(path, f"{root}/incoming/{path.name}", offset, stage)
    remote.check_files(f"{root}/incoming", [record])
    say("loading the image on the device")
    # Unpacked here: Podman 4.3 takes no compressed file. It gives a name without a registry one of its own, so what was
    # loaded gets the asked name as well.
    script = """
loaded=$(gunzip -c "$1/incoming/$3" | "$2" load | sed -n 's/^Loaded image[^:]*: *//p' | tail -n 1)
[ -n "$loaded" ] || { echo "$2 did not say what it loaded" >&2; exit 1; }
"$2" tag "$loaded" "$4"
rm -f "$1/incoming/$3"
there=$("$2" image inspect --format "{{.Id}}" "$4")
echo "$5 $there" > "$1/image"
echo "$there"
"""
    words = (root, runner, record.name, image, here.image_id)
    return remote.run(script, *words, timeout_s=LOAD_TIMEOUT_S).strip()


def _save(directory: Path, image: str, here: _Here, say: Say) -> Path:
    """The image as a compressed file, named by its id: the same image goes on where sending it was cut off."""
    say(f"packing {image}, which the device lacks")
    path = directory / f"image-{here.image_id[:12]}.tar.gz"
    with (
        subprocess.Popen([here.engine, "save", image], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child,
        path.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as sink,
    ):
        assert child.stdout is not None
        assert child.stderr is not None
        shutil.copyfileobj(child.stdout, sink, 2**20)
        errors = child.stderr.read().decode("utf-8", "replace").strip()
    if child.returncode != 0:
        raise DeployError(
            f"{here.engine} cannot save {image}: {errors.splitlines()[-1] if errors else 'no reason given'}"
        )
    return path
