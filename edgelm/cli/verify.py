"""``edgelm verify``: check a bundle, or prove it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.console import GpuLayersType, device_option, gpu_option, print_json, print_table, stderr_progress
from edgelm.units import format_bytes

if TYPE_CHECKING:
    from edgelm.bundle import Quality
    from exporter.device import DeviceChoice
    from exporter.verification import Verification


@click.command(short_help="Check a bundle's hashes and header, or prove it again.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--reference", metavar="SOURCE", help="The checkpoint it was made from: measure quality against it again."
)
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Text to measure quality on, instead of the built-in one; needs --reference.",
)
@device_option
@click.option(
    "--gpu-layers",
    type=GpuLayersType(),
    default="0",
    show_default=True,
    metavar="auto|N",
    help="Layers of the bundle that a GPU computes while it is measured (GGUF only); needs --reference.",
)
@gpu_option
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on stdout.")
def command(
    bundle: Path,
    reference: str | None,
    evaluation: Path | None,
    device: DeviceChoice,
    gpu_layers: int,
    gpu: str,
    as_json: bool,
) -> None:
    """Check that BUNDLE holds what its manifest promises: hashes, header, tensors and token ids.

    With --reference the whole proof is made again, and with --gpu-layers on a GPU; the manifest's figures are of a CPU.
    Exit 1 when the bundle is damaged, 3 when a proof fails.

    \b
    Example:
      edgelm verify bundle
      edgelm verify bundle --reference demo:smollm2 --json
      edgelm verify bundle --reference ./my-model --eval my-text.txt
      edgelm verify bundle --reference ./my-model --gpu-layers auto
    """
    from exporter.device import Placement
    from exporter.verification import verify

    placement = Placement(device, gpu_layers, gpu)
    result = verify(bundle, reference, stderr_progress(), evaluation=evaluation, placement=placement)
    if as_json:
        print_json(_document(bundle, result))
    else:
        _print(bundle, result)


def _document(bundle: Path, result: Verification) -> dict[str, Any]:
    manifest = result.bundle.manifest
    return {
        "bundle": str(bundle),
        "format": manifest.format,
        "quant": manifest.plan.quant,
        "files": len(manifest.files),
        "artifact_bytes": manifest.artifact_bytes,
        "tensor_types": manifest.plan.type_counts,
        "token_identity": result.token_identity.model_dump(mode="json"),
        "quality": result.quality.model_dump(mode="json") if result.quality else None,
        "within_recorded_interval": result.within_recorded,
        "recorded_quality": manifest.proof.model_dump(mode="json") if manifest.proof else None,
    }


def _print(bundle: Path, result: Verification) -> None:
    from rich.table import Table

    from edgelm.bundle import EmbeddingQuality, TaskQuality
    from edgelm.cli.export import task_figures

    manifest, identity = result.bundle.manifest, result.token_identity
    table = Table(title=f"{bundle}: {manifest.name}")
    table.add_column("check")
    table.add_column("result")
    table.add_row("hashes and sizes", f"{len(manifest.files)} files match the manifest")
    types = ", ".join(f"{count} {name}" for name, count in manifest.plan.type_counts.items())
    table.add_row("artefact", f"{format_bytes(manifest.artifact_bytes)}, as planned: {types}")
    table.add_row("token ids", f"identical on {identity.texts} texts, {identity.tokens} tokens")
    for name, quality in (("quality, now", result.quality), ("quality, recorded", manifest.proof)):
        if isinstance(quality, EmbeddingQuality):
            table.add_row(
                name,
                f"cosine {quality.cosine_mean:.6f} mean, {quality.cosine_min:.6f} least, same nearest text "
                f"{quality.nearest_agreement:.1%}, {quality.texts} texts against {quality.reference}",
            )
            if quality.computed_by is not None:
                table.add_row(f"{name}: computed by", quality.computed_by)
        elif isinstance(quality, TaskQuality):
            table.add_row(name, f"{task_figures(quality)}, against {quality.reference}")
        elif quality is not None:
            for what, figures in _figures(quality):
                table.add_row(f"{name}: {what}" if what else name, figures)
    if result.within_recorded is not None:
        where = "inside" if result.within_recorded else "OUTSIDE"
        table.add_row("now and recorded", f"the mean KL of now is {where} the recorded 95 % interval")
    print_table(table)


def _figures(quality: Quality) -> list[tuple[str, str]]:
    """What a measurement says, a row for each kind of figure."""
    around = low_high(quality.kl_mean_interval, 4)
    tail = f"p90 {quality.kl_p90:.4f}, " if quality.kl_p90 is not None else ""
    tail += f"p99 {quality.kl_p99:.4f}, max {quality.kl_max:.3f}"
    rows = [
        ("", f"mean KL {quality.kl_mean:.4f}{around}, {tail}"),
        ("text", f"{quality.tokens} tokens of {quality.text} against {quality.reference}"),
        ("first choice", f"the same for {quality.top1_agreement:.1%}"),
        (
            "perplexity",
            f"{quality.ppl:.2f}{low_high(quality.ppl_interval, 2)}, of the reference {quality.ppl_reference:.2f}",
        ),
    ]
    if quality.worst_tensors:
        named = (f"{item.name} {item.type} {item.kl:.2g}" for item in quality.worst_tensors)
        rows.append(("most lost in", f"{', '.join(named)} (KL, estimated)"))
    if quality.computed_by is not None:
        rows.insert(1, ("computed by", quality.computed_by))
    chat = quality.chat
    if chat is not None:
        alike = f"prompts of {chat.conversations} conversations as by {chat.compared_with}"
        end = f"ended by itself after {chat.answer_tokens} tokens"
        if not chat.stopped:
            end = f"NOT ended within {chat.answer_tokens} tokens"
        rows += [("chat template", alike), ("answer", f"{end}: {chat.answer.strip()!r} to {chat.prompt!r}")]
    return rows


def low_high(interval: tuple[float, float] | None, digits: int) -> str:
    """A 95 % interval in brackets, nothing when there is none."""
    return "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
