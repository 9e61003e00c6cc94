"""The report: one measured run with everything needed to compare it, or to reject it.

Written by ``edgelm bench``, read by ``edgelm compare`` on any machine. Numbers are base units; None means not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from edgelm.bundle import Prediction, Quality, Record
from edgelm.errors import ProfileError

REPORT_SCHEMA_VERSION = 1


class Samples(Record):
    """Repeated measurements of one figure, every sample kept, in the order taken."""

    median: float
    p5: float
    p95: float
    samples: tuple[float, ...]


class MemoryRecord(Record):
    """Memory of the measuring process in bytes.

    ``rss_peak`` is the highest resident size seen while measuring; ``anonymous`` and ``file`` split the resident size
    at the end of the run; ``kv`` and ``weights`` are the engine's own figures.
    """

    rss_peak_bytes: int
    anonymous_bytes: int
    file_bytes: int
    kv_bytes: int
    weights_bytes: int


class HostRecord(Record):
    """The machine that measured, as far as it told."""

    profile: str
    cpu: str
    isa: tuple[str, ...]
    cores: int
    ram_bytes: int
    available_ram_bytes: int
    os: str
    limits: tuple[str, ...] = ()


class ModelRecord(Record):
    """What was measured."""

    name: str
    format: Literal["gguf", "onnx"]
    quant: str
    architecture: str
    parameters: int
    artifact_bytes: int
    sha256: str | None = None


class Settings(Record):
    """How it was measured. ``depth`` is the number of tokens already in the cache, ``kv_type`` the cache's type."""

    prompt_tokens: int
    generated_tokens: int
    repetitions: int
    depth: int
    context: int
    threads_decode: int
    threads_prefill: int
    kv_type: Literal["f32", "f16", "q8_0"] = "f16"


class Report(Record):
    """One run of ``edgelm bench``. ``valid`` is False when a warning says that the figures are spoilt."""

    schema_version: Literal[1] = 1
    created: str
    model: ModelRecord
    settings: Settings
    engine: dict[str, str]
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


def read_report(path: Path) -> Report:
    """The validated report in a JSON file. Raises ``ProfileError``."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ProfileError(f"cannot read report {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ProfileError(f"{path} is not a valid report: {where}: {first['msg']}") from error
