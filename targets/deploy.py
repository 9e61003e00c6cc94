"""Bring a bundle to a device and into service there, so that an interruption at any point leaves a device that serves.

On the device, below one directory: ``bundles/<name>-<hash>`` hold what arrived whole, ``incoming`` what did not yet,
``software/<time>`` virtual environments. A release is a directory of links to a bundle and to the software that serves
it, with the script that starts both: ``releases/<time>/{bundle,software,start,address}``. ``current`` and ``previous``
are links to releases, changed by renaming, so that going back takes the software along; a systemd user unit starts
``current/start``. A bundle is released only after its hashes were checked on the device and the engine there has run
it. Knows bundles by their manifest only, and the engine as a command on the device.
"""

from __future__ import annotations

import hashlib
import ipaddress
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgelm.bundle import MANIFEST_NAME, Bundle, FileRecord, file_record, open_bundle
from edgelm.errors import DeployError, EdgelmError, ProfileError
from edgelm.progress import Progress
from edgelm.report import Report, parse_report
from targets.image import bring_image
from targets.remote import Remote, Say, check_room
from targets.unit import Unit, unit_text

UNIT = "edgelm.service"
READY_PATH = "/health/ready"
BENCH_TIMEOUT_S = 3600.0
INSTALL_TIMEOUT_S = 1800.0
BACK_READY_S = 300.0  # what served before gets its time, however impatient the caller is


@dataclass(frozen=True, slots=True)
class DeployOptions:
    """What was asked for. ``directory`` is absolute or below the home directory on the device.

    ``image`` names a container image that the device or this machine has; without it EdgeLM runs from the software of
    the current release (else from ``DIRECTORY/venv``), or from a new environment made of the wheels in ``wheels``.
    ``ready_s`` is how long the service may take to be ready.
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
    is_podman: bool  # under its own name or as docker


@dataclass(frozen=True, slots=True)
class _Program:
    """What runs EdgeLM on the device: shell words up to its subcommand, and the environment that they belong to."""

    words: str
    software: str | None


def deploy(remote: Remote, path: Path, options: DeployOptions, progress: Progress, say: Say) -> Deployed:
    """Send, check, measure, switch, start, wait until ready; back to what served before when it does not get ready.

    Raises ``BundleError`` for a bad bundle and ``DeployError`` for everything that the device refuses.
    """
    bundle = open_bundle(path)
    device = _look(remote, options)
    identity = bundle_identity(bundle)
    sent = _send(remote, bundle, f"{device.root}/incoming/{identity}", device, progress)
    software = None if options.wheels is None else _install(remote, device, options.wheels, progress, say)
    program = _program(remote, device, options, software, progress, say)
    was_running = _stop(remote)
    try:
        report = _bench(remote, program.words, f"{device.root}/incoming/{identity}", say) if options.bench else None
        release = _release(remote, device.root, identity, program, options)
    except EdgelmError:
        if was_running:
            remote.run(f"systemctl --user start {UNIT}")
        raise
    before = _point(remote, device.root, "current", release)
    say(f"{identity} is current on {remote.destination}")
    try:
        _write_unit(remote, device)
        _start(remote, device, options.ready_s)
    except DeployError as error:
        raise _taken_back(remote, device, before, options, error, say) from error
    previous = None
    if before is not None:
        _point(remote, device.root, "previous", before)
        previous = _served(remote, device.root, "previous")
    _tidy(remote, device.root)
    return Deployed(identity, previous, sent, report)


def _taken_back(
    remote: Remote, device: _Device, before: str | None, options: DeployOptions, error: DeployError, say: Say
) -> DeployError:
    """Serve what was served before, or nothing; the error to raise."""
    if before is None:
        remote.run(
            f'systemctl --user stop {UNIT}; systemctl --user disable --quiet {UNIT}; rm -f "$1/current"', device.root
        )
        return error
    _point(remote, device.root, "current", before)
    served = _served(remote, device.root, "current")
    say(f"it does not get ready; going back to {served}")
    _start(remote, device, max(options.ready_s, BACK_READY_S))
    return DeployError(f"{error.message}; {served} serves again", hint=error.hint)


def roll_back(remote: Remote, options: DeployOptions) -> Deployed:
    """Serve the release that was current before; calling it again goes forward. Raises ``DeployError``."""
    device = _look(remote, options)
    _swap(remote, device.root)
    _start(remote, device, options.ready_s)
    current, previous = (_served(remote, device.root, name) for name in ("current", "previous"))
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
runner=none
for name in podman docker; do ! command -v "$name" > /dev/null || runner=$name; done
echo "$runner"
echo "$(id -u):$(id -g)"
command -v systemctl > /dev/null || { echo "there is no systemctl; EdgeLM deploys to systemd" >&2; exit 1; }
[ "$runner" = none ] || "$runner" --version 2> /dev/null || true
"""
    root, free, runner, user, *version = remote.run(script, options.directory).splitlines()
    known: dict[str, Literal["docker", "podman", ""]] = {"docker": "docker", "podman": "podman"}
    return _Device(root, int(free) * 1024, known.get(runner, ""), user, any("podman" in line for line in version))


def _send(remote: Remote, bundle: Bundle, target: str, device: _Device, progress: Progress) -> int:
    """Send what the device lacks, going on where an earlier try was cut off; check every hash there."""
    records = (*bundle.manifest.files, file_record(bundle.path / MANIFEST_NAME))
    held = _held_sizes(remote, target, device.root, records)
    offsets = {record.name: min(held.get(record.name, 0), record.size_bytes) for record in records}
    missing = sum(record.size_bytes - offsets[record.name] for record in records)
    check_room(remote, device.free_bytes, missing)
    with progress.stage("sending", missing, unit="bytes") as stage:
        for record in records:
            if offsets[record.name] < record.size_bytes:
                remote.append(bundle.path / record.name, f"{target}/{record.name}", offsets[record.name], stage)
    remote.check_files(target, records)
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


def _install(remote: Remote, device: _Device, wheels: Path, progress: Progress, say: Say) -> str:
    """A new virtual environment with EdgeLM from wheels, and its path; what was installed before stays as it is."""
    files = sorted(wheels.glob("*.whl"))
    if not any(path.name.startswith("edgelm-") for path in files):
        raise DeployError(f"there is no edgelm wheel in {wheels}", hint="make one with: pip wheel --no-deps -w DIR .")
    target = f"{device.root}/wheels"
    remote.run('rm -rf "$1" && mkdir "$1"', target)
    with progress.stage("sending wheels", sum(path.stat().st_size for path in files), unit="bytes") as stage:
        for path in files:
            remote.append(path, f"{target}/{path.name}", 0, stage)
    remote.check_files(target, [file_record(path) for path in files])
    say("installing EdgeLM on the device")
    script = """
cd "$1"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 1; }
mkdir -p software
new=$(mktemp -d "software/$(date +%Y%m%d-%H%M%S)-XXXXXX")
fail() { rm -rf "$new"; exit 1; }
python3 -m venv "$new" || fail
"$new/bin/python" -m pip install --quiet --find-links wheels wheels/*.whl || fail
"$new/bin/edgelm" --version > /dev/null || fail
echo "$1/$new"
"""
    return remote.run(script, device.root, timeout_s=INSTALL_TIMEOUT_S).splitlines()[-1]


def _program(
    remote: Remote, device: _Device, options: DeployOptions, software: str | None, progress: Progress, say: Say
) -> _Program:
    """What will run EdgeLM: a container, a new environment, or the one that serves now."""
    if options.image is not None:
        return _Program(_container(remote, device, options.image, progress, say), None)
    script = """
for place in "$2" "$1/current/software" "$1/venv"; do
  if [ -n "$place" ] && [ -x "$place/bin/edgelm" ]; then cd -P "$place"; pwd; exit; fi
done
"""
    found = remote.run(script, device.root, software or "").strip()
    if not found:
        raise DeployError(
            f"EdgeLM is not installed in {device.root} on {remote.destination}",
            hint="give --wheels DIR to install EdgeLM there, or --image NAME for a container",
        )
    return _Program(shlex.quote(f"{found}/bin/edgelm"), found)


def _container(remote: Remote, device: _Device, image: str, progress: Progress, say: Say) -> str:
    """The words that run a container; paths are the same inside it."""
    if not device.runner:
        raise DeployError(f"{remote.destination} has neither docker nor podman", hint="leave --image out")
    # By its id: a name may mean another image tomorrow, and going back has to find this one.
    image_id = bring_image(remote, device.root, device.runner, image, progress, say)
    words = [device.runner, "run", "--rm", "--init", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]  # noqa: S108
    words += ["--security-opt", "no-new-privileges", "--network", "host", "--user", device.user]
    if device.is_podman and not device.user.startswith("0:"):
        words += ["--userns", "keep-id"]  # else this user's files belong to root inside
    words += ["--volume", f"{device.root}:{device.root}", image_id]
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


def _release(remote: Remote, root: str, identity: str, program: _Program, options: DeployOptions) -> str:
    """A new release of a checked bundle, not yet current; its path below the root."""
    serve = ["--target", "auto", "--host", options.listen, "--port", str(options.port)]
    if not _is_loopback(options.listen):
        serve += ["--api-key-file", f"{root}/state/api-key"]
    bundle = f"{root}/bundles/{identity}"
    start = f"#!/bin/sh\nexec {program.words} serve {' '.join(map(shlex.quote, (bundle, *serve)))}\n"
    script = """
cd "$1"
rm -rf .replaced
[ ! -d "bundles/$2" ] || mv -T "bundles/$2" .replaced
mv -T "incoming/$2" "bundles/$2"
rm -rf .replaced
mkdir -p releases
new=$(mktemp -d "releases/$(date +%Y%m%d-%H%M%S)-XXXXXX")
ln -s "../../bundles/$2" "$new/bundle"
[ -z "$3" ] || ln -s "$3" "$new/software"
printf '%s' "$4" > "$new/start"
printf '%s' "$5" > "$new/address"
chmod 755 "$new/start"
echo "$new"
"""
    address = f"{options.listen} {options.port}\n"
    return remote.run(script, root, identity, program.software or "", start, address).strip()


def _point(remote: Remote, root: str, name: str, release: str) -> str | None:
    """Let the link ``current`` or ``previous`` name a release, by renaming; the release that it named before."""
    script = """
cd "$1"
old=$(readlink "$2" || true)
ln -sfn "$3" ".$2"
mv -T ".$2" "$2"
[ ! -x "$old/start" ] || echo "$old"
"""
    return remote.run(script, root, name, release).strip() or None


def _served(remote: Remote, root: str, name: str) -> str:
    """The identity of the bundle of ``current`` or ``previous``."""
    return remote.run('basename "$(readlink "$1/$2/bundle")"', root, name).strip()


def _swap(remote: Remote, root: str) -> None:
    script = """
cd "$1"
[ -x previous/start ] || { echo "there is no earlier release to go back to" >&2; exit 1; }
now=$(readlink current)
then=$(readlink previous)
ln -sfn "$then" .current
ln -sfn "$now" .previous
mv -T .current current
mv -T .previous previous
"""
    remote.run(script, root)


def _tidy(remote: Remote, root: str) -> None:
    """Remove releases that are neither current nor previous, and what no release needs any more."""
    script = """
cd "$1"
real() { readlink -f "$1" || true; }
for release in releases/*; do
  [ "$(real "$release")" = "$(real current)" ] || [ "$(real "$release")" = "$(real previous)" ] || rm -rf "$release"
done
for kind in bundle:bundles software:software; do
  for directory in "${kind#*:}"/*; do
    [ -d "$directory" ] || continue
    kept=no
    for name in current previous; do
      [ "$(real "$name/${kind%:*}")" != "$(real "$directory")" ] || kept=yes
    done
    [ "$kept" = yes ] || rm -rf "$directory"
  done
done
"""
    remote.run(script, root)


def _write_unit(remote: Remote, device: _Device) -> None:
    """The systemd unit of the device's user; it starts at boot, without anybody logging in.

    It outlives releases and starts whatever is current, a container or software that does not speak to systemd
    included: so it neither waits for a word of readiness nor limits rights and memory by what one of them needs.
    """
    unit = unit_text(Unit([f"{device.root}/current/start"], notify=False, hardened=False))
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


def _start(remote: Remote, device: _Device, ready_s: float) -> None:
    """Restart the service and wait until it says that it is ready. Raises ``DeployError`` with its last words."""
    listen, port = remote.run('cat "$1/current/address"', device.root).split()
    remote.run(f"systemctl --user restart {UNIT}")
    host = listen if _is_specific(listen) else "127.0.0.1"
    deadline = time.monotonic() + ready_s
    while time.monotonic() < deadline:
        key = remote.run('cat "$1" 2> /dev/null || true', f"{device.root}/state/api-key").strip() or None
        if remote.http_get(host, int(port), READY_PATH, key) == 200:
            return
        time.sleep(1.0)
    words = remote.run(f"journalctl --user -u {UNIT} -n 5 -o cat --no-pager 2> /dev/null || true").strip()
    raise DeployError(
        f"the service on {remote.destination} was not ready within {ready_s:g} s"
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
