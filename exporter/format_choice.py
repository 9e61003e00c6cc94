"""``--format auto``: which of the formats an export becomes, by what each can express and by what was asked for.

GGUF unless a fact speaks against it: a ``--quant`` that only ONNX knows, a model that llama.cpp cannot compute, or a
``--context`` that it cannot reach. Speeds do not decide: of ONNX Runtime's kernels no target has measurements, its
predictions borrow those of llama.cpp's nearest types, and what a recipe loses is measured by its proof and not before.
"""

from __future__ import annotations

from dataclasses import replace

from edgelm.errors import CheckpointError, UsageError
from exporter import mixes
from exporter.architectures import describe
from exporter.checkpoint import Checkpoint
from exporter.onnx_layout import check_expressible
from exporter.onnx_plan import recipe_named
from exporter.options import ExportOptions, check_options
from exporter.plan import COPY, Candidate, candidates
from targets.profile import TargetProfile


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
