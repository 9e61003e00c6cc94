"""``edgelm deploy``: a bundle into service on a device that ssh reaches."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm.cli.console import print_json, stderr_progress


@click.command(short_help="Put a bundle into service on a board, over ssh.")
@click.argument("words", nargs=-1, required=True, metavar="[BUNDLE] [USER@]HOST")
@click.option("--rollback", is_flag=True, help="Go back to the bundle and software that served before; give no BUNDLE.")
@click.option("--directory", default="edgelm", show_default=True, help="Where on the device, below its home directory.")
@click.option(
    "--wheels", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Install from these first."
)
@click.option("--image", metavar="NAME", help="Run in this container image; it is sent when the device lacks it.")
@click.option(
    "--listen", default="127.0.0.1", show_default=True, help="Address to serve on; beyond loopback with a key."
)
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option("--no-bench", is_flag=True, help="Measure nothing on the device.")
@click.option("--ready-timeout", type=click.FloatRange(min=1), default=180.0, show_default=True, metavar="SECONDS")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the device's report here.")
@click.option("--ssh-config", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="As ssh -F.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    words: tuple[str, ...],
    rollback: bool,
    directory: str,
    wheels: Path | None,
    image: str | None,
    listen: str,
    port: int,
    no_bench: bool,
    ready_timeout: float,
    output: Path | None,
    ssh_config: Path | None,
    as_json: bool,
) -> None:
    """Send BUNDLE to a device, check it there, measure it, serve it as a systemd unit and wait until it is ready.

    What was cut off goes on where it stopped. The bundle that was served before is kept for --rollback, with the
    software that served it, and both come back by themselves when the new ones do not get ready.

    \b
    Example:
      edgelm deploy bundle pi@raspberrypi.local --wheels dist -o report.json
      edgelm compare report.json
      edgelm deploy --rollback pi@raspberrypi.local
    """
    from targets.deploy import DeployOptions, deploy, roll_back
    from targets.remote import connect

    if len(words) != (1 if rollback else 2):
        raise click.UsageError("give [USER@]HOST alone with --rollback" if rollback else "give BUNDLE and [USER@]HOST")
    if wheels is not None and image is not None:
        raise click.UsageError("--wheels and --image exclude each other: EdgeLM runs in an environment or a container")
    if output is not None and (rollback or no_bench):
        raise click.UsageError("--output has no use without a measurement")
    options = DeployOptions(directory, listen, port, image, wheels, not no_bench, ready_timeout)
    with connect(words[-1], ("-F", str(ssh_config)) if ssh_config else ()) as remote:
        if rollback:
            done = roll_back(remote, options)
        else:
            done = deploy(remote, Path(words[0]), options, stderr_progress(), lambda line: click.echo(line, err=True))
    report = done.report
    if output is not None and report is not None:
        output.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if as_json:
        facts = {"device": words[-1], "bundle": done.bundle, "previous": done.previous, "sent_bytes": done.sent_bytes}
        print_json({**facts, "report": report.model_dump(mode="json") if report else None})
        return
    click.echo(f"{done.bundle} is ready on {words[-1]}" + (f", before it: {done.previous}" if done.previous else ""))
    if report is not None and report.decode_tps is not None:
        click.echo(f"measured there: decode {report.decode_tps.median:.1f} tok/s, load {report.load_s:.1f} s")
