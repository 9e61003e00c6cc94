"""A local memory of measured runs: one report per line in ``history.jsonl`` under the user's data directory.

``edgelm bench`` appends to it unless told otherwise (``--no-history`` or ``EDGELM_NO_HISTORY=1``); nothing leaves the
machine. Lists earlier runs of a model and says when it became slower. Knows nothing of how runs are made or shown.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import ProfileError, UsageError
from edgelm.report import Report, parse_report

OPT_OUT = "EDGELM_NO_HISTORY"
KEPT_BYTES = 64 * 2**20  # beyond it the older half is dropped
SLOWER = 0.05  # and more than earlier runs differ among themselves
_EARLIER = 3  # runs that a regression is judged against, at least


@dataclass(frozen=True, slots=True)
class Entry:
    """One run. ``change`` compares decode (prefill where nothing was decoded) with the earlier runs of its kind.

    ``regression`` says that it is slower by more than they differ; None where fewer than three valid ones are known.
    """

    id: str
    report: Report
    earlier: int
    change: float | None
    regression: bool | None


def history_path() -> Path:
    """``$XDG_DATA_HOME/edgelm/history.jsonl``, below ``~/.local/share`` by default."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "edgelm" / "history.jsonl"


def wanted() -> bool:
    """Whether the environment lets runs be remembered."""
    return os.environ.get(OPT_OUT, "") in ("", "0")


def remember(report: Report, path: Path | None = None) -> Path:
    """Append a report. Raises ``OSError`` where the directory cannot be written."""
    path = path or history_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # two runs may end at the same time
        stream.seek(0, os.SEEK_END)
        if stream.tell() > KEPT_BYTES:
            stream.seek(0)
            lines = stream.readlines()
            stream.seek(0)
            stream.truncate()
            stream.writelines(lines[len(lines) // 2 :])
        stream.write(report.model_dump_json() + "\n")
    return path


def entries(path: Path | None = None) -> list[Entry]:
    """All remembered runs, oldest first, each judged against those before it. Raises ``ProfileError``."""
    path = path or history_path()
    found: list[Entry] = []
    for identity, report in _reports(path):
        alike = [entry.report for entry in found if _alike(entry.report, report)]
        earlier, change, regression = _judged(alike, report)
        found.append(Entry(identity, report, earlier, change, regression))
    return found


def _reports(path: Path) -> Iterator[tuple[str, Report]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ProfileError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            identity = hashlib.sha256(line.encode()).hexdigest()[:8]
            yield identity, parse_report(line, f"{path}, line {number}")


def _alike(one: Report, other: Report) -> bool:
    """The same artefact measured in the same way on the same kind of machine."""
    same_model = (
        one.model.sha256 == other.model.sha256
        if one.model.sha256 and other.model.sha256
        else (one.model.name, one.model.artifact_bytes) == (other.model.name, other.model.artifact_bytes)
    )
    return same_model and one.host.cpu == other.host.cpu and _way(one) == _way(other)


def _way(report: Report) -> tuple[int | str | None, ...]:
    settings = report.settings
    return (
        settings.prompt_tokens,
        settings.generated_tokens,
        settings.depth,
        settings.sequences,
        settings.threads_decode,
        settings.threads_prefill,
        settings.lookup,
        settings.draft,
        report.engine.gpu,
        report.engine.gpu_layers or 0,  # reports of before know none
        report.engine.host_repack is True,
        report.engine.flash_attention is not False,  # it was always on
    )


def _speed(report: Report) -> float | None:
    samples = report.decode_tps or report.prefill_tps
    return samples.median if samples else None


def _judged(alike: Sequence[Report], report: Report) -> tuple[int, float | None, bool | None]:
    """Spoilt runs are no measure: they are neither judged nor judged by."""
    speeds = [speed for item in alike if item.valid and (speed := _speed(item)) is not None]
    speed = _speed(report)
    if not speeds or speed is None:
        return len(speeds), None, None
    usual = statistics.median(speeds)
    change = speed / usual - 1
    if len(speeds) < _EARLIER or not report.valid:
        return len(speeds), change, None
    # 1.4826 median absolute deviations estimate one standard deviation; three of them are no chance.
    scatter = 3 * 1.4826 * statistics.median(abs(item - usual) for item in speeds) / usual
    return len(speeds), change, change < -max(SLOWER, scatter)


def select(found: Sequence[Entry], model: str | None) -> list[Entry]:
    """The entries of one model: by name, by artefact hash, or by the path of its bundle or file."""
    if model is None:
        return list(found)
    names = {model, Path(model).name, Path(model).stem}
    manifest = Path(model) / "manifest.json"
    bundle = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
    return [
        entry
        for entry in found
        if (bundle is not None and entry.report.model.bundle_sha256 == bundle)
        or (bundle is None and (entry.report.model.name in names or (entry.report.model.sha256 or "-") == model))
    ]


def one(found: Sequence[Entry], identity: str) -> Entry:
    """The entry with this id. Raises ``UsageError``."""
    for entry in found:
        if entry.id == identity:
            return entry
    raise UsageError(f"there is no run '{identity}' in the history", hint="list them with: edgelm history")


def document(entry: Entry) -> dict[str, object]:
    """What ``edgelm history --json`` prints of a run."""
    report = entry.report
    return {
        "id": entry.id,
        "created": report.created,
        "model": json.loads(report.model.model_dump_json()),
        "prefill_tps": report.prefill_tps.median if report.prefill_tps else None,
        "decode_tps": report.decode_tps.median if report.decode_tps else None,
        "rss_peak_bytes": report.memory.rss_peak_bytes,
        "valid": report.valid,
        "labels": [label.kind for label in report.labels],
        "earlier": entry.earlier,
        "change": entry.change,
        "regression": entry.regression,
    }
