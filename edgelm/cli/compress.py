"""``edgelm compress``: from a teacher to a smaller student that an export takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.console import SIZE, device_option

if TYPE_CHECKING:
    from exporter.compress.importance import DepthMeasure, Measure
    from exporter.compress.pipeline import Student
    from exporter.compress.proposal import Proposal
    from exporter.compress.run import CompressOptions
    from exporter.device import DeviceChoice


@click.command(short_help="Prune and distil a model until it fits its device.")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The directory to write: a checkpoint.")
@click.option("--layers", type=click.IntRange(min=1), metavar="N", help="Layers that stay.")
@click.option("--neurons", type=click.IntRange(min=1), metavar="N", help="Feed-forward neurons that stay, per layer.")
@click.option("--heads", type=click.IntRange(min=1), metavar="N", help="Attention heads that stay, per layer.")
@click.option("--hidden", type=click.IntRange(min=1), metavar="N", help="Width that stays.")
@click.option(
    "--vocabulary",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens that stay: those that --text uses most, and all that any text can be written with.",
)
@click.option(
    "--sparsity",
    metavar="SHARE|2:4",
    help="Zeros among the weights. No speed, no smaller file: these engines compute and store zeros as other numbers.",
)
@click.option(
    "--stages", type=click.IntRange(min=1), default=1, show_default=True, help="Prune and distil in so many steps."
)
@click.option("--target", metavar="ID|FILE", help="Choose layers and neurons so that the limits hold on this device.")
@click.option("--quant", default="Q4_K_M", show_default=True, metavar="NAME", help="The mix that --target plans with.")
@click.option("--min-decode-tps", type=float, metavar="X", help="With --target: tokens per second that are needed.")
@click.option("--max-ram", type=SIZE, metavar="SIZE", help="With --target: memory that may be used.")
@click.option("--max-bytes", type=SIZE, metavar="SIZE", help="With --target: largest artefact.")
@click.option("--teacher", metavar="SOURCE", help="Whom to learn from, when it is not SOURCE itself.")
@click.option("--tokens", type=int, default=1_000_000, show_default=True, help="Tokens to learn from; 0 prunes only.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Training text, or JSON lines with text or messages; repeatable. Without: Python's documentation.",
)
@click.option("--own-share", type=float, default=0.0, show_default=True, help="Share that the teacher writes itself.")
@click.option(
    "--own-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many of them it writes; fewer are read repeatedly.",
)
@click.option("--length", type=click.IntRange(min=8), default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences of a step.")
@click.option("--micro-batch", type=click.IntRange(min=1), default=4, show_default=True, help="Computed at once.")
@click.option("--learning-rate", type=float, default=4e-4, show_default=True)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the distributions compared.")
@click.option("--hidden-weight", type=float, default=0.0, show_default=True, help="Weight of hidden states' distance.")
@click.option("--attention-weight", type=float, default=0.0, show_default=True, help="The same for attention outputs.")
@click.option(
    "--importance",
    type=click.Choice(["activation", "fisher", "magnitude"]),
    default="activation",
    show_default=True,
    help="What decides which neurons, heads and channels stay.",
)
@click.option(
    "--depth-by",
    type=click.Choice(["influence", "kl", "cosine"]),
    help="What decides which layers go [default: influence, of encoders cosine].",
)
@click.option(
    "--finish",
    metavar="QUANT|BUNDLE",
    help="Train on through this mix, or from a bundle's own numbers, which stay on the steps of its types.",
)
@click.option("--finish-tokens", type=click.IntRange(min=1), default=200_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@device_option
@click.option("--dry-run", is_flag=True, help="Show the shape and write nothing.")
@click.option("--force", is_flag=True, help="Replace an earlier student.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    source: str,
    output: Path | None,
    layers: int | None,
    neurons: int | None,
    heads: int | None,
    hidden: int | None,
    vocabulary: int | None,
    sparsity: str | None,
    stages: int,
    target: str | None,
    quant: str,
    min_decode_tps: float | None,
    max_ram: int | None,
    max_bytes: int | None,
    teacher: str | None,
    tokens: int,
    texts: tuple[Path, ...],
    own_share: float,
    own_tokens: int | None,
    length: int,
    batch: int,
    micro_batch: int,
    learning_rate: float,
    temperature: float,
    hidden_weight: float,
    attention_weight: float,
    importance: Measure,
    depth_by: DepthMeasure | None,
    finish: str | None,
    finish_tokens: int,
    seed: int,
    device: DeviceChoice,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Prune SOURCE to a smaller shape and distil the teacher into what is left.

    The result is a Hugging Face directory with a model card, ready for edgelm export. A run that was interrupted goes
    on when the same command is given again.

    \b
    Example:
      edgelm compress demo:smollm2 --layers 24 --tokens 100000 -o student
      edgelm compress ./all-MiniLM-L6-v2 --layers 3 -o sentences
      edgelm compress student --tokens 0 --vocabulary 16384 --text notes.txt -o domain
      edgelm compress ./teacher --target raspberry-pi-4-2gb --min-decode-tps 20 --dry-run
    """
    from edgelm.cli.console import stderr_progress
    from exporter.compress.pipeline import compress
    from exporter.compress.run import CompressOptions

    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'.")
    options = CompressOptions(
        source=source,
        teacher=teacher,
        layers=layers,
        neurons=neurons,
        heads=heads,
        hidden=hidden,
        vocabulary=vocabulary,
        sparsity=sparsity,
        stages=stages,
        target=target,
        quant=quant,
        min_decode_tps=min_decode_tps,
        max_ram_bytes=max_ram,
        max_artifact_bytes=max_bytes,
        units=importance,
        depth=depth_by,
        texts=texts,
        own_share=own_share,
        own_tokens=own_tokens,
        tokens=tokens,
        length=length,
        batch=batch,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        temperature=temperature,
        hidden_weight=hidden_weight,
        attention_weight=attention_weight,
        finish=finish,
        finish_tokens=finish_tokens,
        seed=seed,
        device=device,
    )
    if dry_run:
        _dry_run(options, as_json=as_json)
        return
    assert output is not None
    _show(compress(options, output, force=force, progress=stderr_progress()), as_json=as_json)


def _dry_run(options: CompressOptions, *, as_json: bool) -> None:
    from edgelm.cli.console import print_json, stderr_progress
    from exporter.compress.pipeline import proposal

    full, wanted, found, remarks = proposal(options, stderr_progress())
    predicted = found.plan.predicted.model_dump() if found else None
    if as_json:
        document = {"teacher": asdict(full), "student": asdict(wanted), "predicted": predicted, "remarks": remarks}
        print_json({**document, "dry_run": True})
    else:
        _show_shape(str(full), str(wanted), found)
    for remark in remarks:
        click.echo(f"note: {remark}", err=True)


def _show_shape(full: str, wanted: str, found: Proposal | None) -> None:
    from rich.table import Table

    from edgelm.cli.console import print_table
    from edgelm.units import format_bytes

    table = Table(title="shape (nothing written)", show_header=False, title_justify="left")
    table.add_row("teacher", full)
    table.add_row("student", wanted)
    if found is not None:
        predicted = found.plan.predicted
        table.add_row("exported as", f"{found.plan.quant}, {format_bytes(found.plan.artifact_bytes)}")
        table.add_row("expected RAM", format_bytes(predicted.ram_bytes))
        table.add_row("expected decode", f"{predicted.decode_tps or 0:.1f} tokens/s on {found.plan.target}")
    print_table(table)


def _show(student: Student, *, as_json: bool) -> None:
    from rich.table import Table

    from edgelm.cli.console import print_json, print_table
    from exporter.compress.result import figures

    record = student.record
    if as_json:
        print_json({"student": str(student.path), **record.model_dump()})
        return
    title = f"{student.path}: {record.shape}, {record.parameters / 1e6:.1f} M parameters"
    table = Table(title=title, title_justify="left")
    headings, rows = figures(record.comparisons)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    print_table(table)
    for remark in record.remarks:
        click.echo(f"note: {remark}", err=True)
