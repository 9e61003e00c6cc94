"""How well predictions match published measurements: a CSV of rows in, errors out.

The columns are those of llama.cpp speed tables (device_id, backend, threads, model, params_b, quant, file_mib,
n_prompt, pp_tps, n_gen, tg_tps, llama_cpp_build_or_date, notes). A row whose device has no profile is counted and
named, never guessed. Knows the prediction and the catalogue of models; fits nothing.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle import Record
from edgelm.errors import EdgelmError, ProfileError
from targets.calibration import Calibration, calibration
from targets.catalogue import workload_from_figures
from targets.predict import RunSettings, predict_speed
from targets.profile import TargetProfile, profile_for_device
from targets.workload import Workload

COLUMNS = ("device_id", "quant", "file_mib", "tg_tps")
CSV_LIMIT_BYTES = 64 * 2**20
FIRST_BUILD_OF_2025 = 4400
GPU_BACKENDS = ("cuda", "rocm", "metal", "vulkan")


@dataclass(frozen=True, slots=True)
class Row:
    """One published measurement, understood: numbers in base units, None where the source is silent."""

    line: int
    device_id: str
    backend: str
    model: str
    quant: str
    workload: Workload
    settings: RunSettings
    prefill_tps: float | None
    decode_tps: float | None
    source: str


class Miss(Record):
    """A row and how far its prediction was off: ``error_pct`` is (predicted - measured) / measured."""

    line: int
    device_id: str
    model: str
    quant: str
    measured_tps: float
    predicted_tps: float
    error_pct: float


class Accuracy(Record):
    """Errors of one figure over all rows that state it; shares in percent, ``worst`` first."""

    rows: int
    median_abs_pct_error: float | None
    within_25_pct: float | None
    within_30_pct: float | None
    within_band_pct: float | None
    worst: tuple[Miss, ...]


class Validation(Record):
    """Outcome of ``validate``. ``without_profile`` counts rows by device, ``unreadable`` names lines and reasons."""

    rows: int
    predicted_rows: int
    decode: Accuracy
    prefill: Accuracy
    without_profile: dict[str, int]
    unreadable: tuple[str, ...]


def validate(path: Path, constants: Calibration | None = None, *, worst: int = 5) -> Validation:
    """Predict every row of a CSV and compare. Raises ``ProfileError`` for a file that is no such table."""
    constants = constants or calibration()
    rows, unreadable = read_rows(path)
    missing: dict[str, int] = {}
    decode: list[tuple[Miss, float]] = []
    prefill: list[tuple[Miss, float]] = []
    for row in rows:
        profile = row_profile(row)
        if profile is None:
            name = f"{row.device_id} ({row.backend or 'backend not stated'})"
            missing[name] = missing.get(name, 0) + 1
            continue
        speed = predict_speed(row.workload, profile, row.settings, constants)
        if row.decode_tps is not None:
            decode.append((_miss(row, row.decode_tps, speed.decode_tps), speed.decode_factor))
        if row.prefill_tps is not None:
            prefill.append((_miss(row, row.prefill_tps, speed.prefill_tps), speed.prefill_factor))
    return Validation(
        rows=len(rows) + len(unreadable),
        predicted_rows=len(rows) - sum(missing.values()),
        decode=accuracy(decode, worst),
        prefill=accuracy(prefill, worst),
        without_profile=dict(sorted(missing.items())),
        unreadable=tuple(unreadable),
    )


def accuracy(misses: Sequence[tuple[Miss, float]], worst: int) -> Accuracy:
    """Summary of errors, each with the factor of its 80 % band."""
    errors = [abs(miss.error_pct) for miss, _ in misses]
    if not errors:
        return Accuracy(
            rows=0, median_abs_pct_error=None, within_25_pct=None, within_30_pct=None, within_band_pct=None, worst=()
        )
    inside = [1 / factor <= miss.predicted_tps / miss.measured_tps <= factor for miss, factor in misses]
    ordered = sorted((miss for miss, _ in misses), key=lambda miss: -abs(miss.error_pct))
    return Accuracy(
        rows=len(errors),
        median_abs_pct_error=statistics.median(errors),
        within_25_pct=100 * sum(error <= 25 for error in errors) / len(errors),
        within_30_pct=100 * sum(error <= 30 for error in errors) / len(errors),
        within_band_pct=100 * sum(inside) / len(inside),
        worst=tuple(ordered[:worst]),
    )


def row_profile(row: Row) -> TargetProfile | None:
    """The profile of a row's device for the backend that it names; a GPU's profile serves each of its backends."""
    if row.backend == "cpu":
        return profile_for_device(row.device_id, gpu=False)
    profile = profile_for_device(row.device_id, gpu=True)
    if profile is None and not row.backend:
        return profile_for_device(row.device_id, gpu=False)
    if profile is None or row.backend in ("", profile.backend):
        return profile
    if row.backend not in GPU_BACKENDS:
        return None
    other = {"id": f"{profile.id}.{row.backend}", "backend": row.backend, "kernels": row.backend}
    return profile.model_copy(update=other)


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Rows that can be understood, and a sentence for each that cannot. Raises ``ProfileError``."""
    try:
        if path.stat().st_size > CSV_LIMIT_BYTES:
            raise ProfileError(f"{path} is larger than {CSV_LIMIT_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ProfileError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path} is not a text file in UTF-8") from error
    return parse_rows(text, str(path))


def parse_rows(text: str, name: str) -> tuple[list[Row], list[str]]:
    """As ``read_rows``, from the text of a CSV; ``name`` is what errors call it."""
    reader = csv.DictReader(text.splitlines())
    names = reader.fieldnames or ()
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise ProfileError(
            f"{name} has no column {', '.join(missing)}",
            hint="a CSV with the columns that docs/targets.md lists is needed",
        )
    rows: list[Row] = []
    unreadable: list[str] = []
    try:
        for cells in reader:
            row = _row_or_reason({key: (cells.get(key) or "").strip() for key in names}, reader.line_num)
            if isinstance(row, Row):
                rows.append(row)
            else:
                unreadable.append(row)
    except csv.Error as error:
        raise ProfileError(f"{name} is not a CSV: line {reader.line_num}: {error}") from error
    return rows, unreadable


def _row_or_reason(cells: dict[str, str], line: int) -> Row | str:
    try:
        return _row(cells, line)
    except (EdgelmError, ValueError) as error:
        return f"line {line}: {error}"


def _row(cells: dict[str, str], line: int) -> Row:
    billions = _positive(cells, "params_b")
    file_mib = _positive(cells, "file_mib")
    if file_mib is None:
        raise ValueError("file_mib is empty")
    prompt, generated = _positive(cells, "n_prompt"), _positive(cells, "n_gen")
    threads = _positive(cells, "threads")
    # Some tables measure prefill and decode at different counts and say so in words.
    stated = re.search(r"\bpp at (\d{1,4}) threads", cells.get("notes", ""))
    decode_threads = max(int(threads), 1) if threads else None
    return Row(
        line=line,
        device_id=cells["device_id"],
        backend=cells.get("backend", "").lower(),
        model=cells.get("model", ""),
        quant=cells["quant"],
        workload=workload_from_figures(
            parameters=billions * 1e9 if billions else None,
            file_bytes=round(file_mib * 2**20),
            quant=cells["quant"],
            model=cells.get("model") or None,
        ),
        settings=RunSettings(
            context=4096,
            # The cache fills while tokens are generated: on average it holds half of them.
            depth=int(generated or 128) // 2,
            prompt_tokens=max(int(prompt or 512), 1),
            threads_decode=decode_threads,
            threads_prefill=max(int(stated.group(1)), 1) if stated else decode_threads,
            old_engine=_is_old(cells.get("llama_cpp_build_or_date", "")),
        ),
        prefill_tps=_positive(cells, "pp_tps"),
        decode_tps=_positive(cells, "tg_tps"),
        source=cells.get("source_url", ""),
    )


def _is_old(build: str) -> bool:
    """Whether a build number or date lies before 2025; unknown counts as new."""
    number = re.search(r"\bb(\d{4,5})\b", build)
    if number:
        return int(number.group(1)) < FIRST_BUILD_OF_2025
    year = re.search(r"\b(20\d\d)\b", build)
    return year is not None and int(year.group(1)) < 2025


def _positive(cells: dict[str, str], column: str) -> float | None:
    text = cells.get(column, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{column} is '{text}', not a number") from None
    if not 0 < value < 1e12:
        raise ValueError(f"{column} is {text}, not a number above zero")
    return value


def _miss(row: Row, measured: float, predicted: float) -> Miss:
    return Miss(
        line=row.line,
        device_id=row.device_id,
        model=row.model,
        quant=row.quant,
        measured_tps=measured,
        predicted_tps=predicted,
        error_pct=100 * (predicted - measured) / measured,
    )
