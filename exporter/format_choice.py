"""``--format auto``: which of the formats an export becomes, by facts, or whether measuring has to tell.

Facts come first: a ``--quant`` that only one format knows, a model that llama.cpp cannot compute, a ``--context`` that
it cannot reach. Where both formats are possible, the target is this machine and ``auto`` was typed, both are made and
measured (``exporter.format_contest``); without it GGUF is made. For other targets it is GGUF: of ONNX Runtime's kernels
no target has measurements, its predictions borrow those of llama.cpp's nearest types, and what a recipe loses is
measured by its proof and not before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgelm.errors import CheckpointError, DoesNotFitError, MissingDependencyError, UsageError
from exporter import mixes, optimum_tasks
from exporter.architectures import describe
from exporter.automatic import GOOD_KL
from exporter.checkpoint import Checkpoint
from exporter.onnx_layout import check_expressible
from exporter.onnx_plan import recipe_named
from exporter.options import ExportOptions, check_options
from exporter.packages import require
from exporter.plan import COPY, Candidate, candidates, paced, resolve, unchanged
from exporter.preflight import check_checkpoint
from targets.profile import TargetProfile


@dataclass(frozen=True, slots=True)
class Contest:
    """Both exports that ``--format auto`` makes here; up to a mean KL of ``kl_limit`` the faster one wins."""

    gguf: ExportOptions
    onnx: ExportOptions
    kl_limit: float

    @property
    def told(self) -> str:
        """What will decide, for plans."""
        return (
            f"format auto: GGUF is planned; the export itself makes ONNX {self.onnx.quant} as well, measures both on "
            f"this machine and keeps the faster if both have a mean KL of at most {self.kl_limit:g}, else the closer"
        )


def settle_format(options: ExportOptions, checkpoint: Checkpoint) -> tuple[ExportOptions, str | None]:
    """The options with ``auto`` settled where something speaks for ONNX, and what does; else as they are, and None.

    What speaks against ONNX as well is not decided here: the caller's own checks tell it. Raises ``UsageError`` for
    options that make no sense with the format.
    """
    if options.format != "auto" or options.types or options.type_overrides:
        return options, None
    reason = _named(options) or _not_as_gguf(options, checkpoint)
    if reason is None:
        return options, None
    settled = replace(options, format="onnx")
    check_options(settled)
    return settled, f"format auto: ONNX, since {reason}"


def contest(
    options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile, *, resume: bool = False
) -> Contest | str | None:
    """The exports to measure against each other, or why GGUF is taken unmeasured; None where nothing is to be told:
    ``auto`` was not asked for, types were named, or the model is none that generates.

    For options that ``settle_format`` left alone. Raises ``CheckpointError`` for a model that cannot be GGUF either.
    """
    if not options.measured_format or options.format != "auto" or not options.chooses_types or options.type_overrides:
        return None
    if optimum_tasks.task_of(checkpoint, options) is not None or describe(checkpoint).encoder is not None:
        return None
    if options.target != "host":
        return f"{profile.name} is not this machine, so speed cannot be measured, and nothing else speaks for ONNX"
    if options.calibration is None and unchanged(options, checkpoint, profile) is not None:
        return "the source's own types can stay, which no ONNX model has"
    if not options.verify:
        return "without the proof that --no-verify leaves out, speeds would be compared at unknown losses"
    if resume:
        return "--resume goes on with one artefact"
    try:
        require("onnx")
        rival = _rival(options, checkpoint, profile)
    except (CheckpointError, DoesNotFitError, MissingDependencyError, UsageError) as error:
        return f"as ONNX it cannot be: {error.message}"
    return Contest(replace(options, format="gguf"), rival, options.max_kl or GOOD_KL)


def _rival(options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile) -> ExportOptions:
    """The options of the ONNX export, its recipe named. Raises what planning it raises."""
    check_checkpoint(checkpoint, "onnx")
    # What a mix of GGUF is as fast as has to become numbers before the format is another one.
    asked = replace(paced(options, checkpoint, profile), format="onnx", as_fast_as=None)
    quant = resolve(replace(asked, calibration=None), checkpoint, profile).quant
    reads = recipe_named(quant).reads_text
    rival = replace(asked, quant=quant, calibration=options.calibration if reads else None)
    check_options(rival)
    return rival


def other_format(options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile) -> list[Candidate]:
    """What ONNX could become beside the GGUF candidates of ``--format auto``, to compare; none where it cannot."""
    if options.format != "auto" or options.quant.lower() != "auto" or options.type_overrides:
        return []
    try:
        # What a mix of GGUF is as fast as stands in the options as numbers by now.
        return candidates(replace(options, format="onnx", as_fast_as=None), checkpoint, profile)
    except CheckpointError:  # a graph that cannot be drawn
        return []


def _named(options: ExportOptions) -> str | None:
    name = options.quant
    if name.lower() == "auto" or name.upper() == COPY:
        return None
    try:
        mixes.mix_named(name)
    except UsageError:
        try:
            recipe_named(name)
        except UsageError:
            return None
        return f"{name} is a quantisation of ONNX models only"
    return None


def _not_as_gguf(options: ExportOptions, checkpoint: Checkpoint) -> str | None:
    """Why an export with ``--quant auto`` cannot be GGUF, where it can be ONNX."""
    if options.quant.lower() != "auto":
        return None
    try:
        drawn = describe(checkpoint, "onnx")
        check_expressible(drawn)
    except CheckpointError:
        return None
    try:
        reach = describe(checkpoint).dimensions.context_trained
    except CheckpointError as error:
        return f"as GGUF it cannot be: {error.message}"
    wanted = options.context or 0
    if reach < wanted <= drawn.dimensions.context_trained:
        return f"llama.cpp computes {reach} tokens of this model and --context asks for {wanted}"
    return None
