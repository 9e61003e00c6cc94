"""Bring a bundle to a device and into service there, so that an interruption at any point leaves a device that serves.

On the device, below one directory: ``bundles/<name>-<hash>`` hold what arrived whole, ``incoming`` what did not yet;
``current`` and ``previous`` are links, changed by renaming; a systemd user unit serves ``current``. A bundle becomes
current only after its hashes were checked on the device and the engine there has run it. Knows bundles by their
manifest only, and the engine as a command on the device.
"""

from __future__ import annotations

import hashlib
import ipaddress
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgelm.bundle import MANIFEST_NAME, Bundle, FileRecord, file_record, open_bundle
from edgelm.errors import DeployError, EdgelmError, ProfileError
from edgelm.progress import Progress
from edgelm.report import Report, parse_report
from edgelm.units import format_bytes
from targets.remote import Remote

UNIT = "edgelm.service"
READY_PATH = "/health/ready"
SPARE_BYTES = 64 * 2**20
BENCH_TIMEOUT_S = 3600.0
INSTALL_TIMEOUT_S = 1800.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """What was asked for. ``directory`` is absolute or below the home directory on the device.

    ``image`` names a container image that the device has; without it EdgeLM runs from ``DIRECTORY/venv``, which is
    made from the wheels in ``wheels`` when they are given. ``ready_s`` is how long the service may take to be ready.
    """

    directory: str = "edgelm"
    listen: str = "127.0.0.1"
    port: int = 8080
    image: str | None = None
    wheels: Path | None = None
    bench: bool = True
    ready_s: float = 180.0


@dataclass(frozen=True, slots=True)
class Deployed:
    """What is in service now. ``report`` is None when nothing was measured."""

    bundle: str
    previous: str | None
    sent_bytes: int
    report: Report | None


@dataclass(frozen=True, slots=True)
class _Device:
    """What the first look at the device told."""

    root: str
    free_bytes: int
    runner: Literal["docker", "podman", ""]
    user: str


def deploy(remote: Remote, path: Path, options: DeployOptions, progress: Progress, say: Say) -> Deployed:
    """Send, check, measure, switch, start, wait until ready; back to the bundle before when it does not get ready.

    Raises ``BundleError`` for a bad bundle and ``DeployError`` for everything that the device refuses.
    """
    bundle = open_bundle(path)
    device = _look(remote, options)
    identity = bundle_identity(bundle)
    sent = _send(remote, bundle, f"{device.root}/incoming/{identity}", device, progress)
    if options.wheels is not None:
        _install(remote, device, options.wheels, progress, say)
    command = _command(remote, device, options)
    was_running = _stop(remote)
    try:
        report = _bench(remote, command, f"{device.root}/incoming/{identity}", say) if options.bench else None
    except EdgelmError:
        if was_running:
            remote.run(f"systemctl --user start {UNIT}")
        raise
    previous = _switch(remote, device.root, identity)
    say(f"{identity} is current on {remote.destination}")
    _write_unit(remote, device, command, options)
    try:
        _start(remote, device, options)
    except DeployError as error:
        if previous is None:
            raise
        say(f"{identity} does not get ready; going back to {previous}")
        _swap(remote, device.root)
        _start(remote, device, options)
        raise DeployError(f"{error.message}; {previous} serves again", hint=error.hint) from error
    return Deployed(identity, previous, sent, report)


def roll_back(remote: Remote, options: DeployOptions) -> Deployed:
    """Serve the bundle that was current before; calling it again goes forward. Raises ``DeployError``."""
    device = _look(remote, options)
    _swap(remote, device.root)
    _start(remote, device, options)
    names = remote.run('cd "$1" && basename "$(readlink current)" && basename "$(readlink previous)"', device.root)
    current, previous = names.split()
    return Deployed(current, previous, 0, None)


def bundle_identity(bundle: Bundle) -> str:
    """Directory name on the device: the bundle's name and the start of its manifest's SHA-256."""
    digest = hashlib.sha256((bundle.path / MANIFEST_NAME).read_bytes()).hexdigest()
    plain = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in bundle.manifest.name)
    return f"{plain.strip('.-') or 'bundle'}-{digest[:12]}"


def _look(remote: Remote, options: DeployOptions) -> _Device:
    script = """
cd "$HOME"
mkdir -p "$1/bundles" "$1/incoming" "$1/state"
chmod 700 "$1/state"
cd "$1"
pwd
df -Pk . | awk 'NR == 2 { print $4 }'
command -v docker > /dev/null 2>&1 && echo docker || { command -v podman > /dev/null 2>&1 && echo podman || echo none; }
echo "$(id -u):$(id -g)"
command -v systemctl > /dev/null || { echo "there is no systemctl; EdgeLM deploys to systemd" >&2; exit 1; }
"""
    root, free, runner, user = remote.run(script, options.directory).splitlines()
    known: dict[str, Literal["docker", "podman", ""]] = {"docker": "docker", "podman": "podman"}
    return _Device(root, int(free) * 1024, known.get(runner, ""), user)


def _send(remote: Remote, bundle: Bundle, target: str, device: _Device, progress: Progress) -> int:
    """Send what the device lacks, going on where an earlier try was cut off; check every hash there."""
    records = (*bundle.manifest.files, file_record(bundle.path / MANIFEST_NAME))
    held = _held_sizes(remote, target, device.root, records)
    offsets = {record.name: min(held.get(record.name, 0), record.size_bytes) for record in records}
    missing = sum(record.size_bytes - offsets[record.name] for record in records)
    if missing + SPARE_BYTES > device.free_bytes:
        raise DeployError(
            f"{remote.destination} has {format_bytes(device.free_bytes)} free, {format_bytes(missing)} are to be sent",
            hint=f"make room there, {format_bytes(SPARE_BYTES)} beyond the bundle",
        )
    with progress.stage("sending", missing, unit="bytes") as stage:
        for record in records:
            if offsets[record.name] < record.size_bytes:
                remote.append(bundle.path / record.name, f"{target}/{record.name}", offsets[record.name], stage)
    _check_arrival(remote, target, records)
    return missing


def _held_sizes(remote: Remote, target: str, root: str, records: tuple[FileRecord, ...]) -> dict[str, int]:
    """Sizes of the files that are there already. A bundle that was deployed before is linked, not sent."""
    script = """
if [ -d "$2" ] && [ ! -d "$1" ]; then cp -al "$2" "$1"; fi
mkdir -p "$1"
cd "$1"
shift 2
for name in "$@"; do [ ! -f "$name" ] || stat -c '%s %n' "$name"; done
"""
    bundles = f"{root}/bundles/{target.rsplit('/', 1)[1]}"
    listed = remote.run(script, target, bundles, *(record.name for record in records))
    return {name: int(size) for size, name in (line.split(" ", 1) for line in listed.splitlines())}


def _check_arrival(remote: Remote, target: str, records: tuple[FileRecord, ...]) -> None:
    """Compare hashes on the device; what is wrong is removed there, so that the next try sends it anew."""
    script = """
cd "$1"
printf '%s' "$2" | sha256sum --check --strict 2> /dev/null | sed -n 's/: FAILED.*$//p' | while read -r name; do
  rm -f "$name"
  echo "$name"
done
sync
"""
    lines = "".join(f"{record.sha256}  {record.name}\n" for record in records)
    wrong = remote.run(script, target, lines, timeout_s=1800.0).split()
    if wrong:
        raise DeployError(
            f"{', '.join(wrong)} arrived damaged on {remote.destination} and was removed there",
            hint="deploy again: only what is missing is sent",
        )


def _install(remote: Remote, device: _Device, wheels: Path, progress: Progress, say: Say) -> None:
    """A virtual environment with EdgeLM from wheels; the one before stays until the new one is complete."""
    files = sorted(wheels.glob("*.whl"))
    if not any(path.name.startswith("edgelm-") for path in files):
        raise DeployError(f"there is no edgelm wheel in {wheels}", hint="make one with: pip wheel --no-deps -w DIR .")
    target = f"{device.root}/wheels"
    remote.run('rm -rf "$1" && mkdir "$1"', target)
    with progress.stage("sending wheels", sum(path.stat().st_size for path in files), unit="bytes") as stage:
        for path in files:
            remote.append(path, f"{target}/{path.name}", 0, stage)
    _check_arrival(remote, target, tuple(file_record(path) for path in files))
    say("installing EdgeLM on the device")
    script = """
cd "$1"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 1; }
new="venv-$(date +%s)"
python3 -m venv "$new" || { rm -rf "$new"; exit 1; }
"$new/bin/python" -m pip install --quiet --find-links wheels wheels/*.whl || { rm -rf "$new"; exit 1; }
"$new/bin/edgelm" --version > /dev/null || { rm -rf "$new"; exit 1; }
old=$(readlink venv || true)
ln -s "$new" .venv-next
mv -T .venv-next venv
[ -z "$old" ] || rm -rf "$old"
"""
    remote.run(script, device.root, timeout_s=INSTALL_TIMEOUT_S)


def _command(remote: Remote, device: _Device, options: DeployOptions) -> str:
    """The shell words that run EdgeLM on the device, up to its subcommand; paths are the same inside a container."""
    if options.image is None:
        program = f"{device.root}/venv/bin/edgelm"
        hint = "give --wheels DIR to install EdgeLM there, or --image NAME for a container"
        if remote.run('[ ! -x "$1" ] || echo yes', program).strip() != "yes":
            raise DeployError(f"EdgeLM is not installed in {device.root}/venv on {remote.destination}", hint=hint)
        return shlex.quote(program)
    if not device.runner:
        raise DeployError(f"{remote.destination} has neither docker nor podman", hint="leave --image out")
    script = '"$1" image inspect "$2" > /dev/null 2>&1 && echo yes || true'
    if remote.run(script, device.runner, options.image).strip() != "yes":
        raise DeployError(
            f"{remote.destination} has no image {options.image}",
            hint=f"docker save {options.image} | ssh {remote.destination} {device.runner} load",
        )
    words = [device.runner, "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]  # noqa: S108
    words += ["--security-opt", "no-new-privileges", "--network", "host", "--user", device.user]
    words += ["--volume", f"{device.root}:{device.root}", options.image]
    return " ".join(shlex.quote(word) for word in words)


def _stop(remote: Remote) -> bool:
    """Stop the service, so that two models never share a small board's memory; whether it was running."""
    script = f"systemctl --user is-active --quiet {UNIT} || exit 0; systemctl --user stop {UNIT}; echo yes"
    return remote.run(script).strip() == "yes"


def _bench(remote: Remote, command: str, target: str, say: Say) -> Report:
    """The report that ``edgelm bench`` writes on the device."""
    say("measuring on the device")
    output = remote.run(f'{command} bench "$1" -p 128 -n 32 -r 3 --json', target, timeout_s=BENCH_TIMEOUT_S)
    try:
        return parse_report(output, f"the report of {remote.destination}")
    except ProfileError as error:
        raise DeployError(error.message, hint=error.hint) from error


def _switch(remote: Remote, root: str, identity: str) -> str | None:
    """Make a checked bundle current by renaming a link; keep the one before, remove older ones."""
    script = """
cd "$1"
rm -rf .replaced
[ ! -d "bundles/$2" ] || mv -T "bundles/$2" .replaced
mv -T "incoming/$2" "bundles/$2"
rm -rf .replaced
old=$(readlink current || true)
if [ -n "$old" ] && [ "$old" != "bundles/$2" ]; then
  ln -sfn "$old" .previous
  mv -T .previous previous
fi
ln -sfn "bundles/$2" .current
mv -T .current current
kept=$(readlink previous || true)
for directory in bundles/*; do
  [ "$directory" = "bundles/$2" ] || [ "$directory" = "$kept" ] || rm -rf "$directory"
done
basename "$kept"
"""
    return remote.run(script, root, identity).strip() or None


def _swap(remote: Remote, root: str) -> None:
    script = """
cd "$1"
[ -L previous ] && [ -d "$(readlink previous)" ] || { echo "there is no earlier bundle to go back to" >&2; exit 1; }
now=$(readlink current)
then=$(readlink previous)
ln -sfn "$then" .current
ln -sfn "$now" .previous
mv -T .current current
mv -T .previous previous
"""
    remote.run(script, root)


def _write_unit(remote: Remote, device: _Device, command: str, options: DeployOptions) -> None:
    """The systemd unit of the device's user; it starts at boot, without anybody logging in."""
    serve = [f"{device.root}/current", "--host", options.listen, "--port", str(options.port)]
    if not _is_loopback(options.listen):
        serve += ["--api-key-file", f"{device.root}/state/api-key"]
    program = f"/usr/bin/env {command}" if options.image else command
    unit = f"""[Unit]
Description=EdgeLM
After=network-online.target

[Service]
ExecStart={program} serve {" ".join(shlex.quote(word) for word in serve)}
Restart=on-failure
RestartSec=5
TimeoutStopSec=45

[Install]
WantedBy=default.target
"""
    script = f"""
units="${{XDG_CONFIG_HOME:-$HOME/.config}}/systemd/user"
mkdir -p "$units"
printf '%s' "$1" > "$units/.{UNIT}"
mv "$units/.{UNIT}" "$units/{UNIT}"
systemctl --user daemon-reload
systemctl --user enable --quiet {UNIT}
loginctl enable-linger > /dev/null 2>&1 || echo "it will not start at boot: run 'sudo loginctl enable-linger'" >&2
"""
    remote.run(script, unit)


def _start(remote: Remote, device: _Device, options: DeployOptions) -> None:
    """Restart the service and wait until it says that it is ready. Raises ``DeployError`` with its last words."""
    remote.run(f"systemctl --user restart {UNIT}")
    host = options.listen if _is_specific(options.listen) else "127.0.0.1"
    deadline = time.monotonic() + options.ready_s
    while time.monotonic() < deadline:
        key = remote.run('cat "$1" 2> /dev/null || true', f"{device.root}/state/api-key").strip() or None
        if remote.http_get(host, options.port, READY_PATH, key) == 200:
            return
        time.sleep(1.0)
    words = remote.run(f"journalctl --user -u {UNIT} -n 5 -o cat --no-pager 2> /dev/null || true").strip()
    raise DeployError(
        f"the service on {remote.destination} was not ready within {options.ready_s:g} s"
        + (f": {words.splitlines()[-1]}" if words else ""),
        hint=f"ssh {remote.destination} journalctl --user -u {UNIT}",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_specific(host: str) -> bool:
    return host not in ("0.0.0.0", "::")  # noqa: S104 - recognised, not bound
