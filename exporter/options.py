"""What was typed for an export, checked for sense but not yet resolved against a model or a device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from edgelm.errors import UsageError
from exporter import ggml
from exporter.device import DeviceChoice, resolve_device
from exporter.onnx_plan import RECIPES, recipe_named
from exporter.onnx_types import parse_type

FormatChoice = Literal["auto", "gguf", "onnx"]
"""``auto`` is GGUF unless something speaks against it; see ``exporter.format_choice``."""


def as_format(name: str) -> FormatChoice:
    """The format of that name. Raises ``UsageError``."""
    for choice in get_args(FormatChoice):
        if name == choice:
            found: FormatChoice = choice
            return found
    raise UsageError(f"there is no format '{name}'", hint=f"there are: {', '.join(get_args(FormatChoice))}")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The options of ``edgelm export`` and ``edgelm plan``. None means: not asked for.

    ``type_overrides`` are (regular expression on GGUF tensor names, type). ``evaluation`` is a text file that replaces
    the built-in evaluation text; ``calibration`` one for what types or importance are measured on, or ``self``;
    ``imatrix`` an importance matrix that was measured already.
    ``types`` are (GGUF name, type) of every tensor, as ``exporter.given_types`` reads them; none: types are chosen.
    ``device`` is where torch computes the unquantised model. ``as_fast_as`` names a mix whose speed on the target is
    the least that is wanted; ``exporter.plan.paced`` turns it into numbers. ``measured_format``: the format ``auto``
    may make and measure both where facts do not tell: a second export, its proof and minutes of measuring more.
    """

    source: str
    target: str = "host"
    format: FormatChoice = "auto"
    quant: str = "auto"
    context: int | None = None
    type_overrides: tuple[tuple[str, str], ...] = ()
    max_ram_bytes: int | None = None
    max_artifact_bytes: int | None = None
    min_decode_tps: float | None = None
    min_prefill_tps: float | None = None
    max_kl: float | None = None
    calibration: Path | None = None
    imatrix: Path | None = None
    evaluation: Path | None = None
    verify: bool = True
    types: tuple[tuple[str, str], ...] = ()
    device: DeviceChoice = "auto"
    as_fast_as: str | None = None
    measured_format: bool = False

    @property
    def chooses_types(self) -> bool:
        """Whether types are left to us: no mix was named, and no types."""
        return self.quant.lower() == "auto" and not self.types

    @property
    def weighs_rounding(self) -> bool:
        """Whether the importance of columns was asked to weigh rounding."""
        return self.calibration is not None or self.imatrix is not None


def parse_type_override(text: str, format_name: FormatChoice = "auto") -> tuple[str, str]:
    """(pattern, type) of ``PATTERN=TYPE``. Raises ``UsageError`` naming the part that makes no sense."""
    pattern, separator, type_name = text.rpartition("=")
    if not separator or not pattern:
        raise UsageError(f"'{text}' is not PATTERN=TYPE", hint="write for example 'ffn_down=Q6_K'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"'{pattern}' is no regular expression: {error}") from error
    if format_name == "onnx":
        return pattern, parse_type(type_name).name
    kind = ggml.type_named(type_name)
    if not kind.quantizable:
        raise UsageError(f"nothing can be quantised to {kind.name}")
    return pattern, kind.name


def _reads_calibration(options: ExportOptions) -> bool:
    return options.quant.lower() != "auto" and recipe_named(options.quant).reads_text


def _uses_torch(options: ExportOptions) -> bool:
    recipe = RECIPES.get(options.quant.lower())
    return (
        options.verify
        or (options.chooses_types and options.format != "onnx")
        or str(options.calibration) == "self"
        or (recipe is not None and recipe.calibrated)
    )


def _check_imatrix(options: ExportOptions) -> None:
    if options.imatrix is None or not options.imatrix.is_file():
        raise UsageError(f"--imatrix: {options.imatrix} is no file", hint="name a file of llama-imatrix, or of edgelm")
    if options.calibration is not None:
        raise UsageError("--imatrix and --calibration are two sources of the same weights", hint="leave one out")
    if options.format == "onnx" or options.chooses_types:
        told = "--quant auto measures more" if options.chooses_types else "ONNX has no use for it"
        raise UsageError(f"--imatrix weighs the rounding of a --quant that is named, in GGUF; {told}")


def check_options(options: ExportOptions) -> None:
    """Refuse contradictions before any work is done. Raises ``UsageError``, and ``MissingDependencyError`` for a GPU
    that is not there."""
    if options.device != "auto" and not _uses_torch(options):
        raise UsageError("--device has no use here: nothing is measured and nothing is proven", hint="leave it out")
    if options.device == "cuda":
        resolve_device(options.device)  # said now, not after minutes
    if options.max_kl is not None and not options.verify:
        raise UsageError("--max-kl needs the proof that --no-verify leaves out")
    if options.evaluation is not None and not options.verify:
        raise UsageError("--eval has no use with --no-verify")
    if options.evaluation is not None and not options.evaluation.is_file():
        raise UsageError(f"--eval: {options.evaluation} is no file")
    if options.calibration is not None and options.format == "onnx" and not _reads_calibration(options):
        raise UsageError(
            "--calibration with --format onnx is for int8 and for recipes that end in -gptq; others read no text",
            hint="leave it out",
        )
    if options.calibration is not None and str(options.calibration) != "self" and not options.calibration.is_file():
        raise UsageError(f"--calibration: {options.calibration} is no file", hint="name a text or JSONL file, or: self")
    if options.imatrix is not None:
        _check_imatrix(options)
    if options.types:
        if options.quant.lower() != "auto" or options.type_overrides:
            raise UsageError("--types-from names every type: it goes with neither --quant nor --type")
        if options.format == "onnx":
            raise UsageError("--types-from is for GGUF; types of ONNX are named by --quant and --type")
    limits = (
        ("--max-kl", options.max_kl),
        ("--min-decode-tps", options.min_decode_tps),
        ("--min-prefill-tps", options.min_prefill_tps),
    )
    for name, value in limits:
        if value is not None and not value > 0:
            raise UsageError(f"{name} must be above zero, not {value}")
    if options.context is not None and options.context < 1:
        raise UsageError(f"--context must be at least 1, not {options.context}")
