"""``edgelm export``: from a checkpoint to a proven bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.console import SIZE, device_option
from edgelm.collector import paused_collector

if TYPE_CHECKING:
    from edgelm.bundle import EmbeddingQuality, ExportPlan, Quality, TaskQuality
    from exporter.device import DeviceChoice


@click.command(short_help="Turn a checkpoint into a proven bundle for one target.")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The bundle to write: a new directory.")
@click.option("--target", default="host", show_default=True, metavar="ID|FILE", help="Device; see: edgelm targets list")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["auto", "gguf", "onnx"]),
    help="auto: where both can be and the target is this machine, both are made, proven and measured, and the better "
    "one is kept. Without: GGUF, and ONNX where only it can be.",
)
@click.option(
    "--quant", default="auto", show_default=True, metavar="NAME", help="Q4_K_M, Q8_0, COPY, ...; ONNX: int8, int4, ..."
)
@click.option("--context", type=click.IntRange(min=1), metavar="N", help="Tokens that prompt and answer may have.")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="PATTERN=TYPE",
    help="Type of the tensors whose GGUF name the regular expression is found in; the first match counts.",
)
@click.option(
    "--types-from",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The very types of another bundle of this model, or those that edgelm compress --finish trained it for.",
)
@click.option("--max-ram", type=SIZE, metavar="SIZE", help="Fail (exit 4) when more memory is expected to be used.")
@click.option("--max-bytes", type=SIZE, metavar="SIZE", help="Fail (exit 4) when the artefact is larger.")
@click.option("--min-decode-tps", type=float, metavar="X", help="Fail (exit 4) when fewer tokens/s are expected.")
@click.option("--min-prefill-tps", type=float, metavar="X", help="The same for reading the prompt.")
@click.option("--as-fast-as", metavar="NAME", help="Both at least as for this mix, e.g. Q4_K_M, on the target.")
@click.option("--max-kl", type=float, metavar="X", help="Fail (exit 3) when the mean KL, in nats per token, is higher.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE|self",
    help="Text, or JSON lines with text or messages, to measure types (--quant auto) or the importance of columns on; "
    "self: the model's own words.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Weigh the rounding of a named --quant by this importance matrix (llama.cpp's, GGUF or .dat).",
)
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Text to measure quality on, instead of the built-in one.",
)
@device_option
@click.option("--no-verify", is_flag=True, help="Leave out the quality measurement; token identity is always proven.")
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
@click.option("--resume", is_flag=True, help="Keep finished tensors when interrupted; go on from them the next time.")
@click.option("--force", is_flag=True, help="Replace a bundle that exists.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    source: str,
    output: Path | None,
    target: str,
    format_name: str | None,
    quant: str,
    context: int | None,
    types: tuple[str, ...],
    types_from: Path | None,
    max_ram: int | None,
    max_bytes: int | None,
    min_decode_tps: float | None,
    min_prefill_tps: float | None,
    as_fast_as: str | None,
    max_kl: float | None,
    calibration: Path | None,
    imatrix: Path | None,
    evaluation: Path | None,
    device: DeviceChoice,
    no_verify: bool,
    dry_run: bool,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Turn SOURCE into a bundle for one target: planned, quantised and proven.

    SOURCE is a checkpoint directory, a .gguf file, a hub id (org/name, org/name@revision)
    or demo:smollm2.

    \b
    Example:
      edgelm export demo:smollm2 --target raspberry-pi-5-4gb --quant Q4_0 -o bundle
      edgelm export ./my-model -o bundle --max-ram 1GB --type 'ffn_down=Q6_K'
      edgelm export org/large-model@v1.0 -o bundle --quant Q4_K_M --resume
    """
    from edgelm.cli.console import print_json, stderr_progress

    with paused_collector():
        from exporter.given_types import read_types
        from exporter.options import ExportOptions, as_format, parse_type_override
        from exporter.pipeline import export, prepare

    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
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
        imatrix=imatrix,
        evaluation=evaluation,
        verify=not no_verify,
        device=device,
        types=read_types(types_from) if types_from is not None else (),
    )
    started = time.monotonic()
    if dry_run:
        plan = prepare(options, stderr_progress(), headers_only=True).plan
        if as_json:
            print_json({**summary(plan, plan.artifact_bytes, None), "dry_run": True, "plan": plan.model_dump()})
        else:
            show(plan, plan.artifact_bytes, None, "plan (nothing written)")
        return
    assert output is not None
    bundle = export(options, output, force=force, resume=resume, progress=stderr_progress())
    manifest, size_bytes = bundle.manifest, bundle.manifest.artifact_bytes
    if as_json:
        result = {"bundle": str(bundle.path), **summary(manifest.plan, size_bytes, manifest.proof)}
        result["contest"] = None if manifest.contest is None else manifest.contest.model_dump()
        print_json({**result, "elapsed_s": time.monotonic() - started, "peak_rss_bytes": peak_rss_bytes()})
    else:
        show(manifest.plan, size_bytes, manifest.proof, str(bundle.path), time.monotonic() - started)


def peak_rss_bytes() -> int:
    """Highest resident size of this process so far."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summary(
    plan: ExportPlan, artifact_bytes: int, quality: Quality | EmbeddingQuality | TaskQuality | None
) -> dict[str, Any]:
    """The keys that scripts read; ``edgelm plan`` shows each candidate by the same ones."""
    from edgelm.bundle import EmbeddingQuality, TaskQuality

    measured = None
    if isinstance(quality, (EmbeddingQuality, TaskQuality)):
        measured = quality.model_dump()
    elif quality is not None:
        keys = {"reference", "tokens", "kl_mean", "kl_mean_interval", "kl_p90", "kl_p99", "kl_max", "ppl_interval"}
        keys |= {"chat", "worst_tensors", "top1_agreement", "ppl", "ppl_reference", "token_identity"}
        measured = quality.model_dump(include=keys)
    return {
        "target": plan.target,
        "format": plan.format,
        "quant": plan.quant,
        "bits_per_weight": plan.bits_per_weight,
        "artifact_bytes": artifact_bytes,
        "tensor_types": plan.type_counts,
        "predicted": plan.predicted.model_dump(),
        "quality": measured,
        "predicted_kl": plan.predicted_kl,
        "calibration": None if plan.calibration is None else plan.calibration.model_dump(),
        "notes": list(plan.notes),
    }


def show(
    plan: ExportPlan,
    artifact_bytes: int,
    quality: Quality | EmbeddingQuality | TaskQuality | None,
    title: str,
    elapsed_s: float | None = None,
) -> None:
    """A small table for people, and the plan's remarks on stderr."""
    from rich.table import Table

    from edgelm.bundle import EmbeddingQuality, TaskQuality
    from edgelm.cli.console import print_table
    from edgelm.units import format_bytes
    from targets.predict import load_text

    predicted = plan.predicted
    types = ", ".join(f"{count} {name}" for name, count in plan.type_counts.items())
    rows = [
        ("quantisation", f"{plan.format.upper()} {plan.quant}, {plan.bits_per_weight:.2f} bits per weight"),
        ("tensors", types),
        ("artefact", format_bytes(artifact_bytes)),
        ("context", f"{plan.context.value} ({plan.context.reason})"),
        ("target", plan.target),
        ("expected RAM", f"{format_bytes(predicted.ram_bytes)} ({predicted.fits}: {predicted.fit_reason})"),
        ("expected decode", _rate(predicted.decode_tps)),
        ("expected prefill", _rate(predicted.prefill_tps)),
        ("expected load", load_text(predicted)),
    ]
    if isinstance(quality, EmbeddingQuality):
        rows += [
            ("cosine", f"{quality.cosine_mean:.6f} mean, {quality.cosine_min:.6f} least ({quality.texts} texts)"),
            ("same nearest text", f"{quality.nearest_agreement:.1%}"),
            ("reference", quality.reference),
        ]
    elif isinstance(quality, TaskQuality):
        rows += [("against the original", task_figures(quality)), ("reference", quality.reference)]
    elif quality is not None:
        rows += [
            ("KL", f"{quality.kl_mean:.4f} mean, {quality.kl_p99:.4f} p99 nats per token ({quality.tokens} tokens)"),
            ("same top token", f"{quality.top1_agreement:.1%}"),
            ("perplexity", f"{quality.ppl:.2f}, unquantised {quality.ppl_reference:.2f} ({quality.reference})"),
        ]
        if plan.predicted_kl is not None:
            rows.append(("expected KL", f"{plan.predicted_kl:.4f}"))
        if quality.chat is not None:
            end = "ended by itself" if quality.chat.stopped else "NOT ended by itself"
            rows.append(("chat", f"template as by {quality.chat.compared_with}; an answer {end}"))
    if elapsed_s is not None:
        rows.append(("made in", f"{elapsed_s:.1f} s, peak memory {format_bytes(peak_rss_bytes())}"))
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    print_table(table)
    for note in plan.notes:
        click.echo(f"note: {note}", err=True)


def task_figures(quality: TaskQuality) -> str:
    """What was measured of a model with a task of its own, in one line."""
    return (
        f"same outcome for {quality.agreement:.1%} of {quality.texts} texts, same first choice "
        f"{quality.top1_agreement:.1%}, KL {quality.kl_mean:.5f} mean, {quality.kl_max:.4f} max nats"
    )


def _rate(tps: float | None) -> str:
    return "unknown" if tps is None else f"{tps:.1f} tokens/s"
