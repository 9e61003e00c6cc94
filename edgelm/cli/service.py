"""``edgelm service``: the systemd unit that keeps ``edgelm serve`` alive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgelm.bundle import Choice
    from runtime.engine import FlashAttention

PRIVATE_DIRECTORIES = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - of a service, by PrivateTmp


@click.command(
    short_help="Write the systemd unit that keeps a server alive.", context_settings={"ignore_unknown_options": True}
)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVE_OPTIONS]")
@click.option("--system", "user", metavar="USER", help="A unit of the system that runs as USER, not one of your own.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write it here, not to stdout.")
def command(bundle: Path, serve_options: tuple[str, ...], user: str | None, output: Path | None) -> None:
    """Write a systemd unit for 'edgelm serve BUNDLE SERVE_OPTIONS': told ready after a first token, watched, limited
    to the memory that is predicted, with no right that it does not need, and started again whatever ends it.

    \b
    Example:
      edgelm service bundle -o ~/.config/systemd/user/edgelm.service -- --port 9000
      systemctl --user daemon-reload
      systemctl --user enable --now edgelm
      sudo loginctl enable-linger $USER     # to start at boot

    \b
      edgelm service bundle --system pi | sudo tee /etc/systemd/system/edgelm.service
      sudo systemctl daemon-reload && sudo systemctl enable --now edgelm
    """
    from edgelm.cli.serve import command as serve
    from targets.unit import Unit, unit_text

    words = [str(bundle.resolve()), *serve_options]
    # Serve's own parser refuses what serve would refuse, here and not at the next boot.
    chosen = serve.make_context("serve", list(words), parent=click.get_current_context().parent).params
    bundles: tuple[Path, ...] = chosen["bundles"]
    key = chosen["api_key_file"]
    prompts = chosen["prompt_cache"]
    if user is not None:
        _check_visible([*bundles, *(path for path in (key, chosen["draft"], prompts) if path is not None)])
    unit = Unit(
        command=[*_program(), "serve", *words],
        description=f"EdgeLM serving {bundle.resolve().name}",
        directory=str(Path.cwd()),
        user=user,
        memory_max=_memory_max(bundles, chosen),
        writable=_writable(key, prompts),
    )
    text = unit_text(unit)
    if output is None:
        click.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")


def _check_visible(paths: list[Path]) -> None:
    """A unit of the system gets a /tmp of its own. Raises ``UsageError``."""
    from edgelm.errors import UsageError

    for path in paths:
        if any(path.resolve().is_relative_to(directory) for directory in PRIVATE_DIRECTORIES):
            raise UsageError(
                f"{path} is in a directory for temporary files, which a unit of the system does not see",
                hint="move it, or write a unit of your own: leave --system out",
            )


def _writable(key: Path | None, prompts: Path | None) -> list[str]:
    """Directories that serve writes to: for a key that is not there yet, and for prompts that are kept."""
    made = [] if key is None or key.exists() else [key.resolve().parent]
    if prompts is not None:
        made.append(prompts.resolve() if prompts.exists() else prompts.resolve().parent)
    return [str(path) for path in made]


def _program() -> list[str]:
    """How this very EdgeLM is started: the script beside its interpreter, else the module."""
    import sys

    script = Path(sys.executable).with_name("edgelm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "edgelm"]


def _memory_max(bundles: tuple[Path, ...], chosen: dict[str, object]) -> Choice:
    """Half more than is predicted, in whole MiB: enough for requests' own buffers, too little to take the board."""
    from edgelm.bundle import Choice
    from edgelm.units import format_bytes
    from runtime.engine import EngineOptions
    from runtime.settings import predicted_bytes

    context, parallel, kv_type = chosen["context"] or 0, chosen["parallel"], chosen["kv_type"]
    flash_attention: FlashAttention = chosen["flash_attention"]  # type: ignore[assignment]
    assert isinstance(context, int)
    assert isinstance(parallel, int)
    options = EngineOptions(
        context=context,
        sequences=parallel,
        kv_type="q8_0" if kv_type == "q8_0" else "f16",
        flash_attention=flash_attention,
        host_repack=bool(chosen["host_repack"]),
        lookup=bool(chosen["lookup"]),
        draft=str(chosen["draft"] or ""),
    )
    predicted = sum(predicted_bytes(bundle, options, in_process=bool(chosen["in_process"])) for bundle in bundles)
    limit = -(-predicted * 3 // 2 // 2**20) * 2**20
    return Choice(value=limit, reason=f"predicted {format_bytes(predicted)}, and half of it more for requests")
