"""``edgelm plan``: what an export could become on a target, without writing anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.console import SIZE, device_option

if TYPE_CHECKING:
    from edgelm.bundle import ExportPlan
    from exporter.device import DeviceChoice
    from exporter.plan import Candidate
    from targets.profile import TargetProfile


@click.command(short_help="Show what an export could become on a target; write nothing.")
@click.argument("source")
@click.option("--target", default="host", show_default=True, metavar="ID|FILE", help="Device; see: edgelm targets list")
@click.option("--format", "format_name", type=click.Choice(["auto", "gguf", "onnx"]), help="As of edgelm export.")
@click.option("--quant", default="auto", show_default=True, metavar="NAME", help="Look at this one only.")
@click.option("--context", type=click.IntRange(min=1), metavar="N", help="Tokens that prompt and answer may have.")
@click.option("--type", "types", multiple=True, metavar="PATTERN=TYPE", help="As for edgelm export.")
@click.option("--max-ram", type=SIZE, metavar="SIZE", help="Limit on the memory expected to be used.")
@click.option("--max-bytes", type=SIZE, metavar="SIZE", help="Limit on the size of the artefact.")
@click.option("--min-decode-tps", type=float, metavar="X", help="Least tokens/s expected.")
@click.option("--min-prefill-tps", type=float, metavar="X", help="The same for reading the prompt.")
@click.option("--as-fast-as", metavar="NAME", help="Both at least as for this mix, e.g. Q4_K_M, on the target.")
@click.option("--max-kl", type=float, metavar="X", help="Highest mean KL expected, in nats per token.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE|self", help="As for edgelm export.")
@click.option("--measure", is_flag=True, help="Measure what every tensor loses in every type; show that front instead.")
@device_option
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write one HTML page with a picture.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    source: str,
    target: str,
    format_name: str | None,
    quant: str,
    context: int | None,
    types: tuple[str, ...],
    max_ram: int | None,
    max_bytes: int | None,
    min_decode_tps: float | None,
    min_prefill_tps: float | None,
    as_fast_as: str | None,
    max_kl: float | None,
    calibration: Path | None,
    measure: bool,
    device: DeviceChoice,
    html: Path | None,
    as_json: bool,
) -> None:
    """Show what exporting SOURCE to a target could give: size, memory, speed, and which one would be chosen.

    Reads headers only and shows the usual mixes, in seconds. With --measure (and torch and transformers installed) it
    measures what every tensor loses in every type, minutes once per model, and shows the front of what is possible:
    what edgelm export --quant auto chooses from. Exits with 4 when nothing keeps the limits.

    \b
    Example:
      edgelm plan demo:smollm2 --target raspberry-pi-5-4gb
      edgelm plan ./my-model --target laptop --measure --max-kl 0.02 --json
      edgelm plan ./my-model --target pi5 --measure --html front.html
    """
    from edgelm.cli.console import print_json, stderr_progress
    from exporter.options import ExportOptions, as_format, parse_type_override
    from exporter.pipeline import choices

    if not measure and (max_kl is not None or calibration is not None or device != "auto"):
        raise click.UsageError("--max-kl, --calibration and --device need --measure: headers do not tell what is lost")
    options = ExportOptions(
        source=source,
        target=target,
        format=as_format(format_name or "auto"),
        measured_format=format_name == "auto",
        quant=quant,
        context=context,
        type_overrides=tuple(parse_type_override(text, as_format(format_name or "auto")) for text in types),
        max_ram_bytes=max_ram,
        max_artifact_bytes=max_bytes,
        min_decode_tps=min_decode_tps,
        min_prefill_tps=min_prefill_tps,
        as_fast_as=as_fast_as,
        max_kl=max_kl,
        calibration=calibration,
        device=device,
    )
    profile, found, chosen, failure = choices(options, stderr_progress(), measure=measure)
    if html is not None:
        _picture(html, source, profile, found)
    if as_json:
        print_json(_document(profile.label, found, chosen))
    else:
        _show(profile.name, found, chosen)
    if failure is not None:
        raise failure


def _picture(path: Path, source: str, profile: TargetProfile, found: list[Candidate]) -> None:
    from edgelm.cli.compare import write_page
    from targets.compare import compare_plans

    name = source.rstrip("/").rsplit("/", 1)[-1]
    write_page(path, compare_plans(name, [(item.plan, item.reason) for item in found], profile))


def _same(one: ExportPlan, other: ExportPlan) -> bool:
    return (one.format, one.quant, one.tensors) == (other.format, other.quant, other.tensors)


def _document(target: str, found: list[Candidate], chosen: Candidate | None) -> dict[str, Any]:
    from edgelm.cli.export import summary

    rows = []
    for item in found:
        row = summary(item.plan, item.plan.artifact_bytes, None)
        row.pop("quality")  # nothing is measured here
        rows.append({**row, "fits": item.eligible, "reason": item.reason})
    best = None
    if chosen is not None:
        best = {"quant": chosen.plan.quant, "artifact_bytes": chosen.plan.artifact_bytes, "reason": chosen.reason}
    return {"target": target, "candidates": rows, "chosen": best}


def _show(target: str, found: list[Candidate], chosen: Candidate | None) -> None:
    from rich.table import Table

    from edgelm.cli.console import print_table
    from edgelm.units import format_bytes

    table = Table(title=target, title_justify="left")
    for column in (
        "",
        "format",
        "quant",
        "bits/weight",
        "size",
        "RAM",
        "KL",
        "decode tok/s",
        "prefill tok/s",
        "load",
        "fits",
        "why",
    ):
        table.add_column(column, justify="right" if "/" in column or column in ("size", "RAM", "KL") else "left")
    for item in found:
        plan, predicted = item.plan, item.plan.predicted
        rates = [f"{rate:.1f}" if rate is not None else "-" for rate in (predicted.decode_tps, predicted.prefill_tps)]
        mark = "*" if chosen is not None and _same(chosen.plan, plan) else ""
        sizes = [f"{plan.bits_per_weight:.2f}", format_bytes(plan.artifact_bytes), format_bytes(predicted.ram_bytes)]
        sizes.append("-" if plan.predicted_kl is None else f"{plan.predicted_kl:.4f}")
        loads = (predicted.load_warm_s, predicted.load_cold_s)
        rates.append("/".join("-" if seconds is None else f"{seconds:.2g}" for seconds in loads))
        fits = predicted.fits if item.eligible else "no"
        table.add_row(mark, plan.format, plan.quant, *sizes, *rates, fits, "" if fits == "fits" else item.reason)
    print_table(table)
    if chosen is not None:
        click.echo(chosen.reason)
