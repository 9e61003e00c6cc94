"""``edgelm targets``: list, show, detect, predict, validate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.console import GpuLayersType, print_json, print_table

if TYPE_CHECKING:
    from targets.predict import KvType, RunSettings
    from targets.profile import TargetProfile
    from targets.validate import Accuracy
    from targets.workload import Workload

BUSY_SHARE = 0.1  # of all CPUs, taken by others: above it measured figures are not the machine's
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@click.group(name="targets")
def command() -> None:
    """Devices that EdgeLM can plan for: their profiles, predictions from them, and how good these are.

    \b
    Example:
      edgelm targets list
      edgelm targets show raspberry-pi-5-4gb
      edgelm targets detect -o me.toml
      edgelm targets predict raspberry-pi-5 --params-b 1.24 --file-mib 770 --quant Q4_K_M
    """


@command.command(name="list")
@JSON
def list_command(as_json: bool) -> None:
    """All built-in profiles.

    \b
    Example:
      edgelm targets list --json
    """
    from targets.profile import list_profiles

    profiles = list_profiles()
    if as_json:
        print_json({"targets": [_overview(profile) for profile in profiles]})
        return
    from rich.table import Table

    table = Table(title=f"{len(profiles)} targets, beside 'host' (this machine) and .toml files of your own")
    for column in ("id", "name", "runs on", "memory", "bandwidth", "aliases"):
        table.add_column(column, no_wrap=column == "id")
    for profile in profiles:
        entry = _overview(profile)
        bandwidth = entry["theoretical_bandwidth_gbs"]
        sizes = "/".join(f"{size:g}" for size in entry["ram_gib"])
        shown = f"{bandwidth:.0f} GB/s" if bandwidth else "?"
        table.add_row(profile.id, profile.name, profile.backend, f"{sizes} GiB", shown, " ".join(profile.aliases))
    print_table(table)


def _overview(profile: TargetProfile) -> dict[str, Any]:
    theoretical = profile.memory.theoretical
    return {
        "id": profile.id,
        "name": profile.name,
        "backend": profile.backend,
        "aliases": list(profile.aliases),
        "ram_gib": [size / 2**30 for size in profile.memory.variants_bytes],
        "theoretical_bandwidth_gbs": theoretical.value / 1e9 if theoretical else None,
    }


@command.command()
@click.argument("target", metavar="ID")
@JSON
def show(target: str, as_json: bool) -> None:
    """One profile with the source of every figure. ID is an id, an alias, 'host' or a .toml file.

    \b
    Example:
      edgelm targets show raspberry-pi-5-4gb
    """
    from targets.calibration import calibration
    from targets.predict import device_scale, effective_bandwidth, family_of
    from targets.profile import load_profile, profile_toml

    profile = load_profile(target)
    constants = calibration()
    scale = device_scale(profile, constants)
    bandwidth = effective_bandwidth(profile, family_of(profile, constants), scale)
    rows = f"{scale.decode_rows} published decode rows of it and {scale.prefill_rows} prefill rows"
    if as_json:
        document = profile.model_dump(mode="json")
        effective = {"value": bandwidth, "decode_rows": scale.decode_rows, "prefill_rows": scale.prefill_rows}
        document |= {"usable_ram_bytes": profile.usable_ram_bytes, "effective_bandwidth": effective}
        print_json(document)
        return
    click.echo(profile_toml(profile), nl=False)
    click.echo(f"\n# usable memory: {profile.usable_ram_bytes / 1e9:.2f} GB: {profile.usable_ram_reason}")
    click.echo(f"# sustained bandwidth: {bandwidth / 1e9:.1f} GB/s, calibrated on {rows}")


@command.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the profile to this file.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure memory and kernels (minutes).")
@click.option(
    "--storage",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Measure how fast this directory's disk reads as well (writes and removes 128 MiB).",
)
@click.option("--id", "name", default="host", show_default=True, help="Id of the written profile.")
@JSON
def detect(output: Path | None, measure: bool, storage: Path | None, name: str, as_json: bool) -> None:
    """Describe this machine as a profile: cores, limits, memory, and what is measured on it.

    Measured are the read bandwidth by thread count and by size, and the speed of the engine's kernels by type of
    weights and of attention. A busy machine gives low figures.

    \b
    Example:
      edgelm targets detect -o me.toml
      edgelm plan demo:smollm2 --target me.toml
    """
    from targets.host import detect_host
    from targets.profile import Figure, parse_profile, profile_toml
    from targets.storage import measure_storage

    profile = detect_host().model_copy(update={"id": name})
    if measure:
        profile = _measured(profile)
    if storage is not None:
        rate = Figure(value=measure_storage(storage), source="measured: one unbuffered pass over 128 MiB")
        profile = profile.model_copy(update={"storage_read": rate})
    text = profile_toml(profile)
    parse_profile(text.encode(), "the detected profile")
    if output is not None:
        output.write_text(text, encoding="utf-8")
        click.echo(f"wrote {output}; use it as --target {output}", err=True)
    if as_json:
        print_json(profile.model_dump(mode="json"))
    elif output is None:
        click.echo(text, nl=False)


def _measured(profile: TargetProfile) -> TargetProfile:
    """The detected profile with what is measured on this machine, told on stderr."""
    from edgelm.errors import EngineError
    from runtime.kernels import measure_kernels
    from targets.bandwidth import ForeignLoad, measure_read_bandwidth
    from targets.host import measured
    from targets.kernels import throughput_gflops, with_kernels

    threads, load = int(profile.threads_prefill.value), ForeignLoad()
    click.echo("measuring the read bandwidth ...", err=True)
    profile = measured(profile, measure_read_bandwidth(threads))
    click.echo("measuring the engine's kernels ...", err=True)
    try:
        runs = measure_kernels(threads, profile.usable_ram_bytes)
    except EngineError as error:
        # Memory alone still makes a useful profile; what is missing stands in it.
        click.echo(f"warning: {error.message}; {error.hint}", err=True)
        return _noted(profile, f"kernels were not measured: {error.message}")
    busy = load.share()
    profile = with_kernels(profile, runs)
    if busy > BUSY_SHARE:
        note = f"measured while other processes took {busy:.0%} of the CPU: the figures are too low"
        click.echo(f"warning: {note}; detect again on a quiet machine", err=True)
        profile = _noted(profile, note)
    for kind, name in (("Q8_0", "int8"), ("F16", "f16")):
        gflops = throughput_gflops(profile, kind)
        if gflops is not None:
            click.echo(f"{name} matrix throughput: {gflops:.0f} GFLOP/s ({kind}, {threads} threads)", err=True)
    return profile


def _noted(profile: TargetProfile, note: str) -> TargetProfile:
    return profile.model_copy(update={"notes": (*profile.notes, note)})


@command.command()
@click.argument("target", metavar="ID")
@click.option("--params-b", type=click.FloatRange(min=0, min_open=True), required=True, help="Parameters in billions.")
@click.option("--file-mib", type=click.FloatRange(min=0, min_open=True), required=True, help="File size in MiB.")
@click.option("--quant", required=True, help="Preset or type, for example Q4_K_M or Q8_0.")
@click.option("--model", help="Name of a published model, for its exact shape; else the usual one of that size.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads for decode and prefill; else the profile's own.")
@click.option("--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of KV cache.")
@click.option("--depth", type=click.IntRange(min=0), default=0, show_default=True, help="Tokens cached before decode.")
@click.option("--kv-type", type=click.Choice(["f16", "q8_0", "f32"]), default="f16", show_default=True)
@click.option("--gpu-layers", type=GpuLayersType(), metavar="auto|N", help="On the GPU ID; the rest on --host.")
@click.option("--host", metavar="ID", help="Machine around the GPU, for --gpu-layers  [default: this machine].")
@click.option(
    "--host-repack/--no-host-repack", default=None, help="Its weights rearranged, for --gpu-layers  [default: no]."
)
@JSON
def predict(
    target: str,
    params_b: float,
    file_mib: float,
    quant: str,
    model: str | None,
    threads: int | None,
    context: int,
    depth: int,
    kv_type: KvType,
    gpu_layers: int | None,
    host: str | None,
    host_repack: bool | None,
    as_json: bool,
) -> None:
    """Predict speed and memory of a model on a target from the figures that a download page states.

    \b
    Example:
      edgelm targets predict raspberry-pi-5 --params-b 1.24 --file-mib 770 --quant Q4_K_M
      edgelm targets predict pi5 --params-b 1.24 --file-mib 770 --quant Q4_K_M --depth 4000 --kv-type q8_0
      edgelm targets predict rtx-4060-8gb --params-b 14.8 --file-mib 8570 --quant Q4_K_M --gpu-layers auto --host laptop
    """
    from dataclasses import replace

    from edgelm.errors import UsageError
    from runtime.attention import planned_attention
    from targets.catalogue import workload_from_figures
    from targets.predict import RunSettings, load_text
    from targets.predict import predict as predict_workload
    from targets.profile import load_profile
    from targets.vram import HOST_REPACK

    workload = workload_from_figures(
        parameters=params_b * 1e9, file_bytes=round(file_mib * 2**20), quant=quant, model=model
    )
    if depth >= context:
        raise UsageError(f"--depth {depth} does not fit into --context {context}", hint="give a larger --context")
    settings = RunSettings(
        context=context, depth=depth, threads_decode=threads, threads_prefill=threads, kv_type=kv_type
    )
    if host is not None and gpu_layers is None:
        raise UsageError("--host is for --gpu-layers", hint="name layers, or auto")
    if host_repack is not None and gpu_layers is None:
        raise UsageError("--host-repack is for --gpu-layers", hint="name layers, or auto")
    if gpu_layers is not None:
        places = target, host or "host", HOST_REPACK if host_repack is None else host_repack
        _predict_split(workload, places, settings, gpu_layers, as_json=as_json)
        return
    profile = load_profile(target)
    settings = replace(settings, flash_attention=planned_attention(profile, workload, settings))
    prediction = predict_workload(workload, profile, settings)
    if as_json:
        print_json(prediction.model_dump(mode="json"))
        return
    from rich.table import Table

    table = Table(title=f"{params_b:g} B parameters, {quant}, {file_mib:g} MiB on {prediction.target}")
    for column in ("decode tokens/s", "prefill tokens/s", "RAM", "load", "verdict"):
        table.add_column(column)
    table.add_row(
        _rate(prediction.decode_tps, prediction.decode_tps_band),
        _rate(prediction.prefill_tps, prediction.prefill_tps_band),
        f"{prediction.ram_bytes / 1e6:.0f} MB",
        load_text(prediction),
        f"{prediction.fits}: {prediction.fit_reason}",
    )
    print_table(table)


def _predict_split(
    workload: Workload, places: tuple[str, str, bool], settings: RunSettings, gpu_layers: int, *, as_json: bool
) -> None:
    """Layers on the GPU of the first place, the rest on the machine of the second, rearranged or not."""
    from dataclasses import asdict

    from edgelm.units import format_bytes
    from targets.profile import load_profile
    from targets.split import predict_split

    gpu, host = (load_profile(name) for name in places[:2])
    found = predict_split(workload, gpu, host, settings, gpu_layers, host_repack=places[2])
    plan = found.plan
    if as_json:
        shares = {"gpu": gpu.label, "host": host.label, "gpu_layers": plan.gpu_layers, "layers": plan.most}
        sizes = {"ram_bytes": found.ram_bytes, "vram": asdict(plan.parts), "reason": plan.reason}
        print_json({"decode_tps": found.decode_tps, "prefill_tps": None, **shares, **sizes})
        return
    click.echo(f"{plan.sentence()}; {format_bytes(found.ram_bytes)} on {host.label}")
    click.echo(f"decode {found.decode_tps:.3g} tokens/s; prompts are not predicted for a split")


def _rate(value: float | None, band: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" + (f" ({band[0]:.3g}-{band[1]:.3g})" if band else "")


@command.command()
@click.argument("table", metavar="CSV", type=click.Path(path_type=Path))
@click.option("--worst", type=click.IntRange(min=0), default=5, show_default=True, help="How many misses to name.")
@JSON
def validate(table: Path, worst: int, as_json: bool) -> None:
    """Predict every row of a table of published measurements and tell how far off the predictions are.

    \b
    Example:
      edgelm targets validate measurements.csv
    """
    from targets.calibration import calibration
    from targets.validate import validate as validate_table

    outcome = validate_table(table, worst=worst)
    holdout = calibration().holdout
    if as_json:
        print_json(outcome.model_dump(mode="json") | {"leave_one_device_out": holdout.model_dump(mode="json")})
        return
    from rich.table import Table

    shown = Table(title=f"{outcome.predicted_rows} of {outcome.rows} rows have a profile")
    for column in (
        "figure",
        "rows",
        "median error",
        "within 25 %",
        "within 30 %",
        "inside 80 % band",
        "median unseen",
        "inside unseen",
    ):
        shown.add_column(column, justify="left" if column == "figure" else "right")
    for name, accuracy in (("decode", outcome.decode), ("prefill", outcome.prefill)):
        unseen = getattr(holdout, name)
        shown.add_row(
            name, *_accuracy_cells(accuracy), f"{unseen.median_abs_pct_error:.1f} %", f"{unseen.inside_band_pct:.1f} %"
        )
    print_table(shown)
    click.echo("median unseen: leave-one-device-out error of the calibration, fitted without any row of the device")
    for name, accuracy in (("decode", outcome.decode), ("prefill", outcome.prefill)):
        for miss in accuracy.worst:
            figures = f"measured {miss.measured_tps:.4g}, predicted {miss.predicted_tps:.4g} ({miss.error_pct:+.0f} %)"
            click.echo(f"worst {name}: line {miss.line}, {miss.device_id}, {miss.model} {miss.quant}: {figures}")
    for device, count in outcome.without_profile.items():
        click.echo(f"no profile: {device}, {count} rows")
    for sentence in outcome.unreadable:
        click.echo(f"not understood: {sentence}")


def _accuracy_cells(accuracy: Accuracy) -> list[str]:
    shares = (accuracy.median_abs_pct_error, accuracy.within_25_pct, accuracy.within_30_pct, accuracy.within_band_pct)
    return [str(accuracy.rows), *("-" if share is None else f"{share:.1f} %" for share in shares)]
