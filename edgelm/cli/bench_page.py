"""How ``edgelm bench`` shows a report on a terminal: a table of points, the memory as one bar, the run as a curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgelm.cli.console import print_table
from edgelm.units import format_bytes

if TYPE_CHECKING:
    from edgelm.report import ConditionsRecord, Measurement, Report, Samples

_BAR_WIDTH = 60
# part of the record -> (what it is called, its character in the bar)
_PARTS = {
    "weights_mapped_bytes": ("weights, mapped", "█"),
    "weights_copied_bytes": ("weights, copied", "▓"),
    "kv_bytes": ("KV cache", "▒"),
    "compute_bytes": ("compute", "░"),
    "vocabulary_bytes": ("vocabulary", "v"),
    "interpreter_bytes": ("interpreter", "p"),
    "libraries_bytes": ("libraries", "l"),
    "server_bytes": ("server", "s"),
    "unexplained_bytes": ("unexplained", "?"),
}


def print_report(report: Report) -> None:
    """Everything for people, on stdout."""
    from rich.table import Table

    valid = "" if report.valid else ", NOT VALID"
    table = Table(title=f"{report.model.name} {report.model.quant} on {report.host.cpu}{valid}")
    table.add_column("test")
    for heading in ("threads", "tok/s: median (95 % of it)", "5 % to 95 %", "first token (s)", "predicted"):
        table.add_column(heading, justify="right")
    table.add_column("labels", overflow="fold")
    for item in report.measurements:
        table.add_row(*_cells(report, item))
    print_table(table)
    for line in [
        *_starts(report),
        *memory_lines(report),
        *_vram(report),
        *_sustained(report),
        *_conditions(report.conditions),
    ]:
        click.echo(line)


def _cells(report: Report, item: Measurement) -> tuple[str, ...]:
    from targets.report.bench_table import point_name

    samples = item.tps
    interval = f" ({samples.interval[0]:.1f} to {samples.interval[1]:.1f})" if samples.interval else ""
    beyond = f", {len(samples.outliers)} outliers" if samples.outliers else ""
    return (
        point_name(item),
        str(item.threads),
        f"{samples.median:.1f}{interval}",
        f"{samples.p5:.1f} to {samples.p95:.1f}{beyond}",
        f"{item.ttft_s.median:.3f}" if item.ttft_s else "-",
        _predicted(report, item),
        ", ".join(dict.fromkeys(label.kind for label in item.labels)) or "-",
    )


def _predicted(report: Report, item: Measurement) -> str:
    """The prediction is for the first point of each kind."""
    first: Samples | None = report.prefill_tps if item.kind == "prefill" else report.decode_tps
    if report.predicted is None or (item.tps is not first and item.tps != first):
        return "-"
    tps = report.predicted.prefill_tps if item.kind == "prefill" else report.predicted.decode_tps
    return "-" if tps is None else f"{tps:.1f}"


def _starts(report: Report) -> list[str]:
    from targets.predict import load_text

    lines = []
    for item in report.starts:
        first = "" if item.first_token_s is None else f", first token {item.first_token_s:.2f} s after"
        lines.append(f"{item.kind} start: open {item.open_s:.2f} s (engine {item.load_s:.2f} s){first}")
    if report.predicted is not None and load_text(report.predicted) != "-":
        lines.append(f"predicted load: {load_text(report.predicted)}")
    return lines


def memory_lines(report: Report) -> list[str]:
    """Peak and steady size, and the parts as one bar with its legend."""
    memory = report.memory
    predicted = f", predicted {format_bytes(report.predicted.ram_bytes)}" if report.predicted else ""
    steady = "" if memory.rss_steady_bytes is None else f", steady {format_bytes(memory.rss_steady_bytes)}"
    pss = "" if memory.pss_bytes is None else f", PSS {format_bytes(memory.pss_bytes)}"
    lines = [f"memory: peak {format_bytes(memory.rss_peak_bytes)}{steady}{pss}{predicted}"]
    if memory.parts is None:
        kinds = f"{format_bytes(memory.anonymous_bytes)} anonymous, {format_bytes(memory.file_bytes)} from files"
        return [*lines, f"  {kinds}"]
    sizes = {name: getattr(memory.parts, name) or 0 for name in _PARTS}
    whole = sum(max(size, 0) for size in sizes.values()) or 1
    bar, done = "", 0
    for name, size in sizes.items():
        done += max(size, 0)
        bar += _PARTS[name][1] * (round(_BAR_WIDTH * done / whole) - len(bar))
    legend = (f"{_PARTS[name][1]} {_PARTS[name][0]} {format_bytes(size)}" for name, size in sizes.items() if size)
    return [*lines, f"  {bar}", f"  {', '.join(legend)}"]


def _vram(report: Report) -> list[str]:
    """What lies on a GPU, and why as much."""
    engine, vram = report.engine, report.memory.vram
    if vram is None:
        return []
    parts = (("weights", vram.weights_bytes), ("KV cache", vram.kv_bytes), ("compute", vram.compute_bytes))
    split = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)
    process = "" if vram.process_bytes is None else f", the driver counts {format_bytes(vram.process_bytes)}"
    share = f"{engine.gpu_layers} of {engine.layers} layers on {vram.device}"
    sizes = f"{format_bytes(vram.announced_bytes)} ({split}), predicted {format_bytes(vram.predicted_bytes)}{process}"
    return [f"gpu: {share}: {sizes}"]


def _sustained(report: Report) -> list[str]:
    from targets.report.bench_table import curve

    record = report.sustained
    if record is None:
        return []
    speeds = curve([point.decode_tps for point in record.points])
    fall = f"{record.first_tps:.1f} to {record.last_tps:.1f} tok/s ({record.change:+.0%})"
    lines = [f"sustained {record.seconds:.0f} s: {fall}", f"  {speeds}"]
    heat = [point.temperature_c for point in record.points if point.temperature_c is not None]
    throttled = sum(1 for point in record.points if point.throttled)
    if heat:
        lines.append(f"  {curve(heat)} {min(heat):.0f} to {max(heat):.0f} C, throttled in {throttled} moments")
    return lines


def _conditions(record: ConditionsRecord | None) -> list[str]:
    if record is None:
        return []
    parts = []
    if record.temperature_c is not None:
        parts.append(f"{record.temperature_c.least:.0f} to {record.temperature_c.most:.0f} C")
    if record.clock_mhz is not None:
        parts.append(f"{record.clock_mhz.least:.0f} to {record.clock_mhz.most:.0f} MHz")
    if record.governor is not None:
        parts.append(f"governor {record.governor}")
    if record.foreign_cores is not None:
        parts.append(f"others used {record.foreign_cores:.2f} cores")
    if record.power is not None:
        parts.append(f"{record.power.mean_w:.1f} W ({record.power.source}: {record.power.covers})")
    if record.throttled_since_boot:
        parts.append(f"since boot: {', '.join(record.throttled_since_boot)}")
    return [f"conditions: {', '.join(parts)}"] if parts else []
