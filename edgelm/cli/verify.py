"""``edgelm verify``: check a bundle, or prove it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.console import print_json, print_table, stderr_progress
from edgelm.units import format_bytes

if TYPE_CHECKING:
    from exporter.verification import Verification


@click.command(short_help="Check a bundle's hashes and header, or prove it again.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--reference", metavar="SOURCE", help="The checkpoint it was made from: measure quality against it again."
)
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object on stdout.")
def command(bundle: Path, reference: str | None, as_json: bool) -> None:
    """Check that BUNDLE holds what its manifest promises: hashes, header, tensors and token ids.

    With --reference the whole proof is made again. Exit 1 when the bundle is damaged, 3 when a proof fails.

    \b
    Example:
      edgelm verify bundle
      edgelm verify bundle --reference demo:smollm2 --json
    """
    from exporter.verification import verify

    result = verify(bundle, reference, stderr_progress())
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
        "recorded_quality": manifest.proof.model_dump(mode="json") if manifest.proof else None,
    }


def _print(bundle: Path, result: Verification) -> None:
    from rich.table import Table

    from edgelm.bundle import EmbeddingQuality

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
        elif quality is not None:
            table.add_row(
                name,
                f"mean KL {quality.kl_mean:.4f}, p99 {quality.kl_p99:.4f}, same first choice "
                f"{quality.top1_agreement:.1%}, perplexity {quality.ppl:.2f} (reference {quality.ppl_reference:.2f}), "
                f"{quality.tokens} tokens against {quality.reference}",
            )
    print_table(table)
