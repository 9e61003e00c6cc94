"""A report as rows with llama-bench's columns, so that tables of both stand side by side: Markdown, CSV, JSON lines.

Values that llama-bench does not have (labels, intervals) stand in columns of their own behind. Knows the report only.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from itertools import pairwise
from typing import Any

from edgelm.report import Measurement, Report

_BACKENDS = {"llama.cpp": "CPU", "onnxruntime": "ONNX"}


def point_name(item: Measurement) -> str:
    """``pp512``, ``tg128 @ d2048``; ``x4`` for four sequences together."""
    several = f" x{item.sequences}" if item.sequences > 1 else ""
    behind = f" @ d{item.depth}" if item.depth else ""
    return f"{'pp' if item.kind == 'prefill' else 'tg'}{item.tokens}{several}{behind}"


def markdown(report: Report) -> str:
    """llama-bench's Markdown table (mean and standard deviation), with the median and the labels behind."""
    header = ("model", "size", "params", "backend", "threads", "test", "t/s", "median", "labels")
    lines = [f"| {' | '.join(header)} |", "|---|---:|---:|---|---:|---:|---:|---:|---|"]
    for item in report.measurements:
        mean, deviation = _mean_and_deviation(item.tps.samples)
        cells = (
            f"{report.model.architecture} {report.model.quant}",
            f"{report.model.artifact_bytes / 2**20:.2f} MiB",
            f"{report.model.parameters / 1e6:.2f} M",
            _backend(report),
            str(item.threads),
            point_name(item),
            f"{mean:.2f} ± {deviation:.2f}",
            f"{item.tps.median:.2f}",
            ", ".join(dict.fromkeys(label.kind for label in item.labels)) or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rows(report: Report) -> list[dict[str, Any]]:
    """One flat row per point; the names are llama-bench's as far as it has them."""
    return [_row(report, item) for item in report.measurements]


def _backend(report: Report) -> str:
    """What computed, as llama-bench calls it: the GPU's backend where layers were there."""
    engine = report.engine
    on_gpu = next((device.backend for device in engine.devices if device.name == engine.gpu), None)
    return on_gpu or _BACKENDS.get(engine.name, engine.name)


def _row(report: Report, item: Measurement) -> dict[str, Any]:
    prefill = item.kind == "prefill"
    total = item.tokens * item.sequences
    nanoseconds = [round(1e9 * total / tps) for tps in item.tps.samples]
    mean, deviation = _mean_and_deviation(item.tps.samples)
    mean_ns, deviation_ns = _mean_and_deviation(nanoseconds)
    versions = report.engine.versions
    return {
        "build_commit": versions.get("llama.cpp") or versions.get("onnxruntime", ""),
        "cpu_info": report.host.cpu,
        "backends": _backend(report),
        "model_filename": report.model.name,
        "model_type": f"{report.model.architecture} {report.model.quant}",
        "model_size": report.model.artifact_bytes,
        "model_n_params": report.model.parameters,
        "n_threads": item.threads,
        "n_gpu_layers": report.engine.gpu_layers or 0,
        "flash_attn": int(_flash_attention(report)),
        "n_prompt": item.tokens if prefill else 0,
        "n_gen": 0 if prefill else item.tokens,
        "n_depth": item.depth,
        "test_time": report.created,
        "avg_ns": round(mean_ns),
        "stddev_ns": round(deviation_ns),
        "avg_ts": mean,
        "stddev_ts": deviation,
        "samples_ns": nanoseconds,
        "samples_ts": list(item.tps.samples),
        "n_seq": item.sequences,
        "median_ts": item.tps.median,
        "power_w": item.power_w,
        "labels": [label.kind for label in item.labels],
        "valid": report.valid,
    }


def _flash_attention(report: Report) -> bool:
    """Reports of before say nothing: it was always on with llama.cpp."""
    told = report.engine.flash_attention
    return report.engine.name == "llama.cpp" if told is None else told


def json_lines(report: Report) -> str:
    """One JSON object per line and point."""
    return "\n".join(json.dumps(row, allow_nan=False) for row in rows(report))


def csv_text(report: Report) -> str:
    """The same rows with a header line; samples and labels are separated by spaces inside their cells."""
    stream = io.StringIO()
    found = rows(report)
    writer = csv.DictWriter(stream, list(found[0]) if found else [], quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    for row in found:
        flat = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}
        writer.writerow(flat)
    return stream.getvalue().rstrip("\n")


def _mean_and_deviation(values: Any) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


_BARS = "▁▂▃▄▅▆▇█"


def curve(values: list[float], width: int = 60) -> str:
    """A line of block characters: the height of each is the mean of its stretch, from zero to the highest value."""
    if not values or max(values) <= 0:
        return ""
    count = min(len(values), width)
    edges = [at * len(values) // count for at in range(count + 1)]
    means = [statistics.fmean(values[start:end]) for start, end in pairwise(edges)]
    top = max(means)
    return "".join(_BARS[min(int(mean / top * len(_BARS)), len(_BARS) - 1)] for mean in means)
