"""The report: one measured run with everything needed to compare it, or to reject it.

Written by ``edgelm bench``, read by ``edgelm compare`` and ``edgelm history`` on any machine. Numbers are base units;
None means not measured, never zero. ``docs/report.md`` explains the fields, ``docs/report.schema.json`` is generated
from this module. Reports of schema version 1 are read and brought up to date; newer ones are refused with a sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from edgelm.bundle import Prediction, Quality, Record
from edgelm.errors import ProfileError

REPORT_SCHEMA_VERSION = 2
REPORT_LIMIT_BYTES = 64 * 2**20

LabelKind = Literal[
    "throttled", "clock", "quota", "busy", "stolen", "swapped", "paged", "unsteady", "interrupted", "unclassified"
]


class Label(Record):
    """Why figures are spoilt. ``unclassified`` stands for the warnings of reports of schema version 1."""

    kind: LabelKind
    reason: str


class Samples(Record):
    """Repeated measurements of one figure, every sample kept, in the order taken.

    ``interval`` is the 95 % interval of the median (bootstrap), None for fewer than three samples. ``outliers`` are
    indices of samples beyond 1.5 interquartile ranges (Tukey's fences); they count like all others.
    """

    median: float
    p5: float
    p95: float
    samples: tuple[float, ...]
    interval: tuple[float, float] | None = None
    outliers: tuple[int, ...] = ()


class Measurement(Record):
    """One point of a sweep: ``tokens`` per sequence, computed behind ``depth`` tokens that are in the cache already.

    ``tps`` counts the tokens of all sequences. ``started_s`` and ``seconds`` place it in the run, warm-up excluded.
    ``power_w`` is the mean while it ran. ``labels`` say what spoilt this point. ``drafted_tokens`` are the guesses of
    speculative decoding in all repetitions, ``accepted_tokens`` those that were right; None where none were asked for.
    """

    kind: Literal["prefill", "decode"]
    tokens: int
    depth: int
    sequences: int
    threads: int
    tps: Samples
    ttft_s: Samples | None = None
    started_s: float
    seconds: float
    power_w: float | None = None
    labels: tuple[Label, ...] = ()
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None


class StartRecord(Record):
    """One start of the model. ``open_s`` is all of it (hashes, tokenizer, engine), ``load_s`` the engine alone.

    ``cached_share`` is the part of the files that was in the page cache before. A start is cold when little was.
    """

    kind: Literal["cold", "warm"]
    open_s: float
    load_s: float
    first_token_s: float | None
    cached_share: float | None
    note: str = ""


class SustainedPoint(Record):
    """One moment of a long run: decode speed since the point before, and what the sensors said at its end."""

    at_s: float
    decode_tps: float
    temperature_c: float | None = None
    clock_mhz: float | None = None
    throttled: tuple[str, ...] = ()


class SustainedRecord(Record):
    """Decoding for minutes. ``change`` is the last tenth's median over the first tenth's, less 1."""

    seconds: float
    points: tuple[SustainedPoint, ...]
    first_tps: float
    last_tps: float
    change: float


class MemoryParts(Record):
    """Resident memory by purpose in bytes. ``docs/report.md`` says how each is told apart.

    ``weights_mapped`` and ``libraries`` are backed by files; ``weights_copied`` are repacked or unmapped weights;
    ``interpreter`` is Python with its modules before a model is opened, ``vocabulary`` the tokenizer and what the
    engine keeps beside weights, cache and buffers; ``server`` is the HTTP process, None where none ran.
    ``unexplained`` is what the total holds beyond the sum, negative when the parts claim too much.
    """

    weights_mapped_bytes: int
    weights_copied_bytes: int
    kv_bytes: int
    compute_bytes: int
    vocabulary_bytes: int
    interpreter_bytes: int
    libraries_bytes: int
    server_bytes: int | None = None
    unexplained_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the parts, without what they do not explain."""
        return (
            self.weights_mapped_bytes
            + self.weights_copied_bytes
            + self.kv_bytes
            + self.compute_bytes
            + self.vocabulary_bytes
            + self.interpreter_bytes
            + self.libraries_bytes
            + (self.server_bytes or 0)
        )


class CgroupMemory(Record):
    """The control group's own view: it counts page cache that the process read, and other processes in it."""

    version: Literal[1, 2]
    path: str
    current_bytes: int
    peak_bytes: int | None
    limit_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None


class VramRecord(Record):
    """What the model holds in the memory of one GPU, in bytes.

    ``weights``, ``kv`` and ``compute`` are the buffers that the engine announced there, ``predicted`` is what the plan
    of the offload expected of their sum. ``free_before`` and ``free_loaded`` are the device's own word before and after
    loading, other programs included; ``process`` is what NVIDIA's driver counts for this process, None where nobody
    tells. None of it is part of ``MemoryParts``.
    """

    device: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    predicted_bytes: int
    total_bytes: int
    free_before_bytes: int
    free_loaded_bytes: int
    process_bytes: int | None = None

    @property
    def announced_bytes(self) -> int:
        """Sum of the buffers."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes


class MemoryRecord(Record):
    """Memory of the measuring process in bytes.

    ``rss_peak`` is the highest resident size seen while measuring, ``rss_steady`` the one at the end of it, which
    ``anonymous``, ``file``, ``pss``, ``swap`` and ``parts`` describe. ``kv`` and ``weights`` are the engine's own
    figures. ``available_low`` is the least MemAvailable of the machine; faults and swap-in count while measuring.
    ``vram`` is what lies on a GPU, None where nothing does.
    """

    rss_peak_bytes: int
    anonymous_bytes: int
    file_bytes: int
    kv_bytes: int
    weights_bytes: int
    rss_steady_bytes: int | None = None
    pss_bytes: int | None = None
    swap_bytes: int | None = None
    available_low_bytes: int | None = None
    major_faults: int | None = None
    swapped_in_pages: int | None = None
    parts: MemoryParts | None = None
    cgroup: CgroupMemory | None = None
    vram: VramRecord | None = None


class Span(Record):
    """Least, median and most of what was read while measuring."""

    least: float
    median: float
    most: float


class PowerRecord(Record):
    """Electrical power while measuring. ``covers`` says what the source sees of the machine."""

    source: str
    covers: str
    mean_w: float
    energy_j: float


class ConditionsRecord(Record):
    """What the sensors saw from the first measured token to the last. Every field is None where nobody tells.

    ``throttled`` and ``throttled_since_boot`` name the flags of a Raspberry Pi's firmware. ``foreign_cores`` is CPU
    time of other processes per second, ``stolen_share`` time that a hypervisor took per CPU second, ``runnable`` the
    processes that wanted to run, this one's included. ``pressure`` is the share of time in which some task waited for
    ``cpu``, ``memory`` or ``io`` (Linux PSI). ``quota_share`` is the share of time in which a CPU quota held us back.
    """

    readings: int
    interval_s: float
    seconds: float
    governor: str | None = None
    temperature_c: Span | None = None
    temperature_zone: str | None = None
    clock_mhz: Span | None = None
    clock_limit_mhz: float | None = None
    throttled: tuple[str, ...] | None = None
    throttled_since_boot: tuple[str, ...] | None = None
    load_1m: float | None = None
    foreign_cores: float | None = None
    stolen_share: float | None = None
    runnable: Span | None = None
    pressure: dict[str, float] = Field(default_factory=dict)
    quota_share: float | None = None
    power: PowerRecord | None = None


class HostRecord(Record):
    """The machine that measured, as far as it told. ``isa`` are the CPU's extensions, used or not."""

    profile: str
    cpu: str
    isa: tuple[str, ...]
    cores: int
    ram_bytes: int
    available_ram_bytes: int
    os: str
    limits: tuple[str, ...] = ()


class ModelRecord(Record):
    """What was measured. ``sha256`` is the artefact's, ``bundle_sha256`` the manifest's, which names every file."""

    name: str
    format: Literal["gguf", "onnx"]
    quant: str
    architecture: str
    parameters: int
    artifact_bytes: int
    sha256: str | None = None
    bundle_sha256: str | None = None


class DeviceRecord(Record):
    """A device that the engine's build sees; ``igpu`` shares the machine's memory."""

    name: str
    description: str
    backend: str
    kind: Literal["cpu", "gpu", "igpu", "accel"]
    total_bytes: int


class EngineRecord(Record):
    """What computed. ``system`` is the engine's own word on its build.

    ``features_used`` are CPU extensions that the build uses, ``features_idle`` those that the CPU has besides;
    ``waiting`` tells how threads wait for one another and ``waiting_reason`` why; ``huge_page_bytes`` how much of the
    model was moved to huge pages, None in reports of engines that did not know. ``gpu_layers`` of ``layers`` (the head
    counts as one) were on the GPU ``gpu``, for ``offload_reason``; None where the engine knows no GPUs. ``host_repack``
    tells whether weights beside it were rearranged for the CPU; None without a GPU, and in reports of before, when they
    never were. ``flash_attention`` was used or not, for ``attention_reason``; None where the engine has one kind, and
    in reports of before, which had it with llama.cpp.
    """

    name: str
    versions: dict[str, str]
    system: str
    features_used: tuple[str, ...] = ()
    features_idle: tuple[str, ...] = ()
    blas: bool | None = None
    waiting: str | None = None
    waiting_reason: str = ""
    huge_page_bytes: int | None = None
    devices: tuple[DeviceRecord, ...] = ()
    gpu: str | None = None
    gpu_layers: int | None = None
    layers: int | None = None
    offload_reason: str = ""
    host_repack: bool | None = None
    flash_attention: bool | None = None
    attention_reason: str = ""


class Settings(Record):
    """How it was measured; the first prompt, depth and number of sequences of a sweep stand for it in summaries.

    ``depth`` is the number of tokens already in the cache. ``affinity`` lists the CPUs that the process might use.
    ``stopped_by`` says what ended the repetitions. ``lookup`` and ``draft`` (a model's name) tell where guesses came
    from: single sequences then continued a fixed text, else random tokens.
    """

    prompt_tokens: int
    generated_tokens: int
    repetitions: int
    depth: int
    context: int
    threads_decode: int
    threads_prefill: int
    kv_type: Literal["f32", "f16", "q8_0"] = "f16"
    threads_reason: str = ""
    affinity: tuple[int, ...] = ()
    sequences: int = 1
    seed: int = 0
    stopped_by: Literal["count", "precision", "time", "interrupt"] = "count"
    lookup: bool = False
    draft: str | None = None


class Report(Record):
    """One run of ``edgelm bench``. ``valid`` is False when a label says that figures are spoilt.

    ``prefill_tps``, ``decode_tps`` and ``ttft_s`` repeat the first point of their kind of ``measurements``, the one
    that ``settings`` describes. ``warnings`` repeats the reasons of all labels, ``notes`` do not spoil anything.
    """

    schema_version: Literal[2] = 2
    created: str
    model: ModelRecord
    settings: Settings
    engine: EngineRecord
    prefill_tps: Samples | None
    decode_tps: Samples | None
    ttft_s: Samples | None
    load_s: float
    memory: MemoryRecord
    predicted: Prediction | None
    quality: Quality | None
    host: HostRecord
    valid: bool
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    starts: tuple[StartRecord, ...] = ()
    sustained: SustainedRecord | None = None
    conditions: ConditionsRecord | None = None

    @model_validator(mode="after")
    def _labelled_is_not_valid(self) -> Report:
        if self.valid and self.labels:
            raise ValueError(f"a run with the label '{self.labels[0].kind}' cannot be valid")
        return self


def read_report(path: Path) -> Report:
    """The validated report in a JSON file, of this or an earlier schema version. Raises ``ProfileError``."""
    try:
        with path.open("rb") as stream:
            content = stream.read(REPORT_LIMIT_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"cannot read report {path}: {error.strerror}") from error
    return parse_report(content, str(path))


def parse_report(content: bytes | str, name: str) -> Report:
    """The report in JSON text; ``name`` is what errors call it. Raises ``ProfileError``."""
    if len(content) > REPORT_LIMIT_BYTES:
        raise ProfileError(f"report {name} is larger than {REPORT_LIMIT_BYTES} bytes")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{name} is not JSON: {error}", hint="write one with: edgelm bench BUNDLE -o F") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(version, int):
        raise ProfileError(
            f"{name} is not a valid report: schema_version is missing", hint="write one with: edgelm bench BUNDLE -o F"
        )
    if version > REPORT_SCHEMA_VERSION:
        raise ProfileError(
            f"{name} is a report of schema version {version}, this EdgeLM reads up to {REPORT_SCHEMA_VERSION}",
            hint="upgrade EdgeLM on the machine that compares",
        )
    if version == 1:
        document = _from_version_1(document)
    try:
        # As JSON again: tuples come from lists only when pydantic knows that it reads JSON.
        return Report.model_validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ProfileError(f"{name} is not a valid report: {where}: {first['msg']}") from error


def _from_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """Version 1 kept the engine as one table of strings and knew neither labels nor single measurements."""
    document = {**document, "schema_version": REPORT_SCHEMA_VERSION}
    engine = document.get("engine")
    if isinstance(engine, dict):
        versions = {key: value for key, value in engine.items() if key not in ("name", "system")}
        document["engine"] = {
            "name": engine.get("name", "unknown"),
            "system": engine.get("system", ""),
            "versions": versions,
        }
    document["measurements"] = _measurements_of_version_1(document)
    warnings = document.get("warnings")
    if isinstance(warnings, list) and document.get("valid") is False:
        document["labels"] = [{"kind": "unclassified", "reason": reason} for reason in warnings]
    return document


def _measurements_of_version_1(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Its two figures as points; when they were taken was not kept."""
    settings = document.get("settings")
    if not isinstance(settings, dict):
        return []
    found = []
    for kind, tokens in (("prefill", "prompt_tokens"), ("decode", "generated_tokens")):
        samples = document.get(f"{kind}_tps")
        if samples is None:
            continue
        found.append(
            {
                "kind": kind,
                "tokens": settings.get(tokens),
                "depth": settings.get("depth"),
                "sequences": 1,
                "threads": settings.get(f"threads_{kind}"),
                "tps": samples,
                "ttft_s": document.get("ttft_s") if kind == "prefill" else None,
                "started_s": 0.0,
                "seconds": 0.0,
                "labels": [
                    {"kind": "unclassified", "reason": reason}
                    for reason in document.get("warnings") or []
                    if document.get("valid") is False
                ],
            }
        )
    return found


def report_schema() -> dict[str, Any]:
    """JSON Schema of a report, as ``docs/report.schema.json`` holds it."""
    schema = Report.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
