"""From options, a checkpoint's headers and a target to a plan: every tensor's type, sizes, predictions, reasons.

Pure functions: nothing is read, loaded or written here. ``resolve`` decides, ``candidates`` shows what it chose from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgelm.bundle import Choice, ExportPlan, Format, ModelShape, Prediction, TensorPlan
from edgelm.errors import CheckpointError, DoesNotFitError, UsageError
from edgelm.units import format_bytes
from exporter import ggml, mixes, onnx_plan, optimum_plan
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription, TensorDescription
from exporter.checkpoint import Checkpoint, weight_type
from exporter.optimum_weights import rounding_named
from exporter.options import ExportOptions
from runtime.attention import planned_attention
from targets.predict import RunSettings, predict
from targets.profile import TargetProfile
from targets.workload import TypedWeights, Workload, own_kv_type

COPY, MIXED = "COPY", "MIXED"
CANDIDATES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_NL", "Q4_0", "IQ4_XS", "Q3_K_M", "Q3_K_S", "Q2_K")
DEFAULT_CONTEXT = 4096
LEAST_CONTEXT = 1024
ALIGNMENT = 32
# A mix within this share of the best bits per weight wins if it is so much faster: quality differs little there.
NEAR_BITS, WORTHWHILE_SPEED = 0.9, 1.2
_FLOAT_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that could be carried out, whether it keeps all limits, and why (not)."""

    plan: ExportPlan
    eligible: bool
    reason: str


def resolve(options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile) -> ExportPlan:
    """Decide everything about an export.

    Raises ``UsageError`` for options that make no sense here, ``CheckpointError`` for checkpoints that cannot be
    exported and ``DoesNotFitError`` (with numbers, and with what would fit) when a limit would be missed.
    """
    description = describe(checkpoint, form_of(options))
    options = paced(options, checkpoint, profile)
    if options.chooses_types:
        return choose(candidates(options, checkpoint, profile), profile).plan
    if options.types:
        plan = plan_of_types(options, _given(options, description), checkpoint, description, profile)
    else:
        plan = _plan(options, options.quant, checkpoint, description, profile)
    missed = missed_limits(options, plan)
    if not missed:
        return plan
    others = candidates(replace(options, quant="auto", types=()), checkpoint, profile)
    raise DoesNotFitError(f"{plan.quant} on {profile.name}: {'; '.join(missed)}", hint=_nearest(others))


def paced(options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile) -> ExportOptions:
    """Options whose speed limits are also those of the mix in ``as_fast_as``, as it is expected on the target.

    Raises ``UsageError`` for a mix that does not exist, and where no speed is expected of it.
    """
    if options.as_fast_as is None:
        return options
    if options.format == "onnx":
        raise UsageError("--as-fast-as names a mix of GGUF", hint="give --min-decode-tps X for ONNX")
    weighed = replace(options, imatrix=None, calibration=Path(), type_overrides=())  # speed needs no importance
    plan = _plan(weighed, options.as_fast_as, checkpoint, describe(checkpoint), profile)
    decode_tps, prefill_tps = plan.predicted.decode_tps, plan.predicted.prefill_tps
    if decode_tps is None or prefill_tps is None:
        raise UsageError(f"--as-fast-as {options.as_fast_as}: {plan.predicted.fit_reason}, so it has no speed")
    return replace(
        options,
        min_decode_tps=max(options.min_decode_tps or 0.0, decode_tps),
        min_prefill_tps=max(options.min_prefill_tps or 0.0, prefill_tps),
    )


def candidates(options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile) -> list[Candidate]:
    """What an export could become, most bits per weight first.

    A source that is quantised already is offered as it stands (``COPY``), and nothing with more bits than it has.
    """
    description = describe(checkpoint, form_of(options))
    options = paced(options, checkpoint, profile)
    names = _candidate_names(options, description)
    limit_bits = math.inf
    if options.format != "onnx" and options.quant.lower() == "auto" and is_quantized(checkpoint, description):
        names.insert(0, COPY)
        limit_bits = _plan(options, COPY, checkpoint, description, profile).bits_per_weight
    found = []
    for name in names:
        plan = _plan(options, name, checkpoint, description, profile)
        if plan.bits_per_weight <= limit_bits:
            missed = missed_limits(options, plan)
            found.append(Candidate(plan, not missed, "; ".join(missed) or plan.predicted.fit_reason))
    return sorted(found, key=lambda item: -item.plan.bits_per_weight)


def form_of(options: ExportOptions) -> Format:
    """The format that options ask for; ``auto`` starts from GGUF."""
    return "onnx" if options.format == "onnx" else "gguf"


def _candidate_names(options: ExportOptions, description: ModelDescription) -> list[str]:
    if options.quant.lower() != "auto":
        return [options.quant]
    if options.format != "onnx":
        return list(CANDIDATES)
    return list(onnx_plan.CANDIDATES if description.encoder is None else optimum_plan.CANDIDATES)


def unchanged(options: ExportOptions, checkpoint: Checkpoint, profile: TargetProfile) -> ExportPlan | None:
    """The plan that keeps every tensor as it is: for a quantised source that fits and keeps all limits, else None.

    Nothing that starts from quantised weights can lose less, so ``auto`` need not look further.
    """
    if options.format == "onnx" or not is_quantized(checkpoint, describe(checkpoint, form_of(options))):
        return None
    kept = [item for item in candidates(options, checkpoint, profile) if item.plan.quant == COPY and item.eligible]
    return choose(kept, profile).plan if kept and kept[0].plan.predicted.fits == "fits" else None


def choose(found: Sequence[Candidate], profile: TargetProfile) -> Candidate:
    """The best candidate: most bits per weight, unless one with nearly as many is faster here.

    Candidates that would page weights from storage are taken only when nothing fits. Raises ``DoesNotFitError``.
    """
    eligible = [item for item in found if item.eligible]
    if not eligible:
        raise DoesNotFitError(f"nothing fits on {profile.name}: {found[-1].reason}", hint=_nearest(found))
    fitting = [item for item in eligible if item.plan.predicted.fits == "fits"]
    if not fitting:
        best = min(eligible, key=lambda item: item.plan.artifact_bytes)
        return _with_note(best, f"auto: {best.plan.quant}, the smallest, since nothing fits into memory")
    best = max(fitting, key=lambda item: (item.plan.quant == COPY, item.plan.bits_per_weight))
    bits = best.plan.bits_per_weight
    if best.plan.quant == COPY:
        return _with_note(best, f"auto: COPY, the source's own types ({bits:.2f} bits per weight) lose nothing more")
    near = [item for item in fitting if item.plan.bits_per_weight >= NEAR_BITS * bits]
    fastest = max(near, key=_decode_tps)
    if _decode_tps(fastest) >= WORTHWHILE_SPEED * _decode_tps(best) > 0:
        gain = _decode_tps(fastest) / _decode_tps(best)
        told = f"{gain:.2f} times the speed of {best.plan.quant}, which has {bits:.2f} bits per weight"
        return _with_note(fastest, f"auto: {fastest.plan.quant} ({fastest.plan.bits_per_weight:.2f}) has {told}")
    told = f"keeps the most bits per weight ({bits:.2f}) of the {len(fitting)} mixes that fit"
    return _with_note(best, f"auto: {best.plan.quant} {told}")


def _decode_tps(candidate: Candidate) -> float:
    return candidate.plan.predicted.decode_tps or 0.0


def _with_note(candidate: Candidate, note: str) -> Candidate:
    plan = candidate.plan.model_copy(update={"notes": (*candidate.plan.notes, note)})
    return Candidate(plan, candidate.eligible, note)


def _nearest(found: Sequence[Candidate]) -> str:
    eligible = [item.plan for item in found if item.eligible]
    if eligible:
        named = ", ".join(f"{plan.quant} ({format_bytes(plan.artifact_bytes)})" for plan in eligible[:3])
        return f"these would do: {named}"
    smallest = min((item.plan for item in found), key=lambda plan: plan.artifact_bytes)
    needs = f"{format_bytes(smallest.artifact_bytes)}, {format_bytes(smallest.predicted.ram_bytes)} of RAM"
    return f"the smallest is {smallest.quant} ({needs}); a shorter --context or a larger target may help"


def missed_limits(options: ExportOptions, plan: ExportPlan) -> list[str]:
    """The limits that a plan is expected to miss, each as a phrase with its numbers."""
    predicted, missed = plan.predicted, []
    if predicted.fits == "no":
        missed.append(f"does not fit: {predicted.fit_reason}")
    if options.max_ram_bytes is not None and predicted.ram_bytes > options.max_ram_bytes:
        missed.append(f"{_size(predicted.ram_bytes)} of RAM, --max-ram is {_size(options.max_ram_bytes)}")
    if options.max_artifact_bytes is not None and plan.artifact_bytes > options.max_artifact_bytes:
        missed.append(f"{_size(plan.artifact_bytes)} on disk, --max-bytes is {_size(options.max_artifact_bytes)}")
    if options.min_decode_tps is not None and (predicted.decode_tps or 0.0) < options.min_decode_tps:
        told = "unknown" if predicted.decode_tps is None else f"{predicted.decode_tps:.1f}"
        limit = _rate_limit(options, "--min-decode-tps", options.min_decode_tps)
        missed.append(f"{told} tokens/s expected, {limit}")
    if options.min_prefill_tps is not None and (predicted.prefill_tps or 0.0) < options.min_prefill_tps:
        told = "unknown" if predicted.prefill_tps is None else f"{predicted.prefill_tps:.1f}"
        limit = _rate_limit(options, "--min-prefill-tps", options.min_prefill_tps)
        missed.append(f"prefill of {told} tokens/s expected, {limit}")
    return missed


def _rate_limit(options: ExportOptions, name: str, tps: float) -> str:
    return f"{name} is {tps:g}" if options.as_fast_as is None else f"as fast as {options.as_fast_as} is {tps:.1f}"


def _size(size_bytes: int) -> str:
    return f"{format_bytes(size_bytes)} ({size_bytes} bytes)"


def is_quantized(checkpoint: Checkpoint, description: ModelDescription) -> bool:
    """Whether any tensor of the source is stored in a quantised type."""
    headers = (checkpoint.tensors[item.source_name] for item in description.tensors if item.values is None)
    return any(ggml.TYPES[weight_type(header)].is_quantized for header in headers)


def _plan(
    options: ExportOptions, quant: str, checkpoint: Checkpoint, description: ModelDescription, profile: TargetProfile
) -> ExportPlan:
    if options.format == "onnx":
        return _onnx_plan(options, quant, checkpoint, description, profile)
    name = quant.upper() if quant.upper() == COPY else mixes.mix_named(quant).name
    tensors = _tensor_plans(_decisions(options, name, checkpoint, description), description)
    return _assembled(options, name, tensors, checkpoint, description, profile)


def plan_of_types(
    options: ExportOptions,
    types: Mapping[str, mixes.Decision],
    checkpoint: Checkpoint,
    description: ModelDescription,
    profile: TargetProfile,
) -> ExportPlan:
    """The plan that stores tensors in the given types, all others as F32."""
    decisions = {item.name: types.get(item.name, mixes.KEPT_F32) for item in description.tensors}
    return _assembled(options, MIXED, _tensor_plans(decisions, description), checkpoint, description, profile)


def _assembled(
    options: ExportOptions,
    name: str,
    tensors: tuple[TensorPlan, ...],
    checkpoint: Checkpoint,
    description: ModelDescription,
    profile: TargetProfile,
) -> ExportPlan:
    _check_encoder(options, description)
    data_bytes = sum(-(-item.size_bytes // ALIGNMENT) * ALIGNMENT for item in tensors)
    artifact_bytes = data_bytes + checkpoint.vocabulary_bytes + 4096 + 96 * len(tensors)
    workload = _workload(description, tensors, artifact_bytes)
    context, prediction = _context(options, description, workload, profile)
    if description.encoder is not None:  # it generates nothing
        prediction = prediction.model_copy(update={"decode_tps": None, "decode_tps_band": None})
    return ExportPlan(
        target=profile.label,
        format="gguf",
        quant=name,
        architecture=checkpoint.architecture,
        parameters=description.parameters,
        bits_per_weight=8 * sum(item.size_bytes for item in tensors) / description.parameters,
        artifact_bytes=artifact_bytes,
        context=context,
        threads_decode=profile.threads_decode,
        threads_prefill=profile.threads_prefill,
        tensors=tensors,
        predicted=prediction,
        shape=_shape(workload),
        notes=_notes(name, checkpoint, description, tensors),
    )


def _check_encoder(options: ExportOptions, description: ModelDescription) -> None:
    """Raises ``UsageError`` for limits that say nothing of an encoder."""
    if description.encoder is None:
        return
    for name, value in (("--max-kl", options.max_kl), ("--min-decode-tps", options.min_decode_tps)):
        if value is not None:
            raise UsageError(f"{name} has no meaning for an encoder, which predicts no tokens")


def _shape(workload: Workload) -> ModelShape:
    """What other targets need to predict from the plan alone."""
    return ModelShape(
        layers=workload.layers,
        hidden=workload.hidden,
        vocabulary=workload.vocabulary,
        kv_elements_per_token=workload.kv_elements_per_token,
        lookup_tensor=None if workload.lookup is None else "token_embd.weight",
    )


def _onnx_plan(
    options: ExportOptions, quant: str, checkpoint: Checkpoint, description: ModelDescription, profile: TargetProfile
) -> ExportPlan:
    name, tensors, artifact_bytes = _onnx_tensors(options, quant, checkpoint, description)
    workload = _workload(description, tensors, artifact_bytes, "onnx")
    context, prediction = _context(options, description, workload, profile)
    if description.encoder is not None:  # it generates nothing
        prediction = prediction.model_copy(update={"decode_tps": None, "decode_tps_band": None})
    return ExportPlan(
        target=profile.label,
        format="onnx",
        quant=name,
        architecture=checkpoint.architecture,
        parameters=description.parameters,
        bits_per_weight=8 * sum(item.size_bytes for item in tensors) / description.parameters,
        artifact_bytes=artifact_bytes,
        context=context,
        threads_decode=profile.threads_decode,
        threads_prefill=profile.threads_prefill,
        tensors=tensors,
        predicted=prediction,
        shape=_shape(workload),
        notes=_notes(name, checkpoint, description, tensors),
    )


def _onnx_tensors(
    options: ExportOptions, quant: str, checkpoint: Checkpoint, description: ModelDescription
) -> tuple[str, tuple[TensorPlan, ...], int]:
    """The name of the recipe, what becomes of every tensor, and the size of the artefact."""
    if description.encoder is None:
        recipe = onnx_plan.recipe_named(quant)
        tensors = onnx_plan.tensor_plans(description, recipe, options.type_overrides)
        return recipe.name, tensors, onnx_plan.artifact_bytes(description, tensors, options.context or 0)
    _check_encoder(options, description)
    if checkpoint.source.kind != "huggingface":
        raise CheckpointError(
            f"{checkpoint.source.location} is a GGUF file of an encoder, which no ONNX graph can be drawn of",
            hint="export from the original checkpoint",
        )
    if options.type_overrides:
        raise UsageError("--type is for decoders; an encoder in ONNX has one type for all", hint="leave it out")
    rounding = rounding_named(quant)
    tensors = optimum_plan.tensor_plans(
        ((item.name, item.source_name, item.shape) for item in description.tensors), rounding
    )
    return rounding.name, tensors, sum(item.size_bytes for item in tensors) + optimum_plan.GRAPH_BYTES


def _notes(
    quant: str, checkpoint: Checkpoint, description: ModelDescription, tensors: Sequence[TensorPlan]
) -> tuple[str, ...]:
    notes = list(description.notes)
    if quant != COPY and is_quantized(checkpoint, description):
        notes.append("the source is quantised already; its losses stay and those of this export are added to them")
    replaced = sum("no multiple" in item.reason for item in tensors)
    if replaced:
        notes.append(f"{replaced} of {len(tensors)} tensors have rows that do not fit their type and take another one")
    return tuple(notes)


def _tensor_plans(decisions: Mapping[str, mixes.Decision], description: ModelDescription) -> tuple[TensorPlan, ...]:
    by_name = {item.name: item for item in description.tensors}
    return tuple(_tensor_plan(by_name[name], decisions[name]) for name in mixes.in_quantizer_order(list(by_name)))


def _tensor_plan(tensor: TensorDescription, decision: mixes.Decision) -> TensorPlan:
    rows = math.prod(tensor.shape[:-1])
    return TensorPlan(
        name=tensor.name,
        source_name=tensor.source_name,
        shape=tensor.shape,
        type=decision.type,
        size_bytes=rows * ggml.TYPES[decision.type].row_bytes(tensor.shape[-1]),
        reason=decision.reason,
    )


def _decisions(
    options: ExportOptions, quant: str, checkpoint: Checkpoint, description: ModelDescription
) -> Mapping[str, mixes.Decision]:
    weights = [mixes.WeightShape(item.name, item.shape) for item in description.tensors]
    _check_overrides(options, weights)
    if quant == COPY:
        return _copied(options, checkpoint, description)
    mix, dimensions = mixes.mix_named(quant), description.dimensions
    decisions = mixes.tensor_types(
        mix,
        weights,
        layers=dimensions.layers,
        heads=dimensions.heads,
        kv_heads=dimensions.kv_heads,
        overrides=options.type_overrides,
        has_importance=options.weighs_rounding,
    )
    lacking = mixes.lacking_importance(mix, {name: item.type for name, item in decisions.items()})
    if lacking is not None and not options.weighs_rounding:
        raise UsageError(
            f"{mix.name} stores {lacking} as {decisions[lacking].type}, which is useless without an importance matrix",
            hint="give --calibration FILE or --imatrix FILE, or choose Q3_K_M, IQ4_XS or a mix of more bits",
        )
    return decisions


def _check_overrides(options: ExportOptions, weights: Sequence[mixes.WeightShape]) -> None:
    for pattern, type_name in options.type_overrides:
        if not any(re.search(pattern, item.name) and mixes.is_quantizable(item) for item in weights):
            raise UsageError(
                f"--type '{pattern}={type_name}' fits no tensor that can be quantised",
                hint="names are GGUF's, as blk.0.ffn_down.weight; edgelm export --dry-run --json lists them",
            )


def _given(options: ExportOptions, description: ModelDescription) -> dict[str, mixes.Decision]:
    """The types that were given for every tensor. Raises ``UsageError`` when they are of another model."""
    types = {name: ggml.type_named(kind) for name, kind in options.types}
    names = {item.name for item in description.tensors}
    strange = next(iter(sorted(names.symmetric_difference(types))), None)
    if strange is not None:
        whose = "the model has no such tensor" if strange in types else "no type is given for this tensor of the model"
        raise UsageError(f"the types to take are of another model: {strange}: {whose}")
    for item in description.tensors:
        if item.shape[-1] % types[item.name].block:
            raise UsageError(
                f"the types to take are of another model: rows of {item.name} have {item.shape[-1]} numbers, "
                f"{types[item.name].name} stores blocks of {types[item.name].block}"
            )
    return {name: mixes.Decision(kind.name, "as in the types given") for name, kind in types.items()}


def _copied(options: ExportOptions, checkpoint: Checkpoint, description: ModelDescription) -> dict[str, mixes.Decision]:
    """Every tensor in the type that the source has it in, apart from what was asked for by name."""
    decisions = {}
    for item in description.tensors:
        shape = mixes.WeightShape(item.name, item.shape)
        asked = mixes.override_for(shape, options.type_overrides)
        if asked is not None:
            decisions[item.name] = asked
        elif not mixes.is_quantizable(shape):
            decisions[item.name] = mixes.KEPT_F32
        else:
            decisions[item.name] = mixes.Decision(weight_type(checkpoint.tensors[item.source_name]), "as in the source")
    return decisions


def _workload(
    description: ModelDescription, tensors: Sequence[TensorPlan], artifact_bytes: int, format_name: Format = "gguf"
) -> Workload:
    dimensions = description.dimensions
    groups: dict[str, tuple[int, int, int]] = {}
    lookup = None
    for item in tensors:
        parameters, rows = math.prod(item.shape), math.prod(item.shape[:-1])
        if item.name == "token_embd.weight" and not dimensions.tied:
            lookup = TypedWeights(item.type, parameters, item.size_bytes, rows)
            continue
        count, size_bytes, rows_before = groups.get(item.type, (0, 0, 0))
        groups[item.type] = (count + parameters, size_bytes + item.size_bytes, rows_before + rows)
    return Workload(
        format=format_name,
        architecture=description.architecture,
        parameters=description.parameters,
        file_bytes=artifact_bytes,
        weights=tuple(TypedWeights(name, *sizes) for name, sizes in groups.items()),
        lookup=lookup,
        layers=dimensions.layers,
        hidden=dimensions.hidden,
        vocabulary=dimensions.vocabulary,
        kv_elements_per_token=0 if description.encoder else 2 * dimensions.kv_heads_total * dimensions.head_size,
        own_kv_type=own_kv_type(format_name, groups),
        heads=dimensions.heads,
    )


def _context(
    options: ExportOptions, description: ModelDescription, workload: Workload, profile: TargetProfile
) -> tuple[Choice, Prediction]:
    """The context and the prediction at it: as asked for, else the default, halved while that does not fit."""
    trained = description.dimensions.context_trained
    if options.context is not None:
        if options.context > trained:
            raise UsageError(
                f"--context {options.context} is more than the {trained} tokens that the model was trained for",
                hint=f"choose at most {trained}",
            )
        choice = Choice(value=options.context, reason="asked for")
        return choice, _predicted(workload, profile, options.context)
    if description.encoder is not None:
        return _encoder_context(description.encoder.context, trained, workload, profile)
    context = min(trained, DEFAULT_CONTEXT)
    reason = f"the model was trained for {trained}" if context == trained else f"default; trained for {trained}"
    prediction = _predicted(workload, profile, context)
    while not _fits(options, prediction) and context // 2 >= LEAST_CONTEXT:
        context //= 2
        reason = f"more does not fit; trained for {trained}"
        prediction = _predicted(workload, profile, context)
    return Choice(value=context, reason=reason), prediction


def _predicted(workload: Workload, profile: TargetProfile, context: int) -> Prediction:
    """With the kind of attention that the machine will compute, which scores take memory without."""
    settings = RunSettings(context=context)
    return predict(workload, profile, replace(settings, flash_attention=planned_attention(profile, workload, settings)))


def _encoder_context(tuned: int, trained: int, workload: Workload, profile: TargetProfile) -> tuple[Choice, Prediction]:
    """As long as the model was tuned for: without a cache, a shorter one would save nothing."""
    reason = f"tuned for texts of this length; it has {trained} positions" if tuned < trained else "its positions"
    return Choice(value=tuned, reason=reason), predict(workload, profile, RunSettings(context=tuned))


def _fits(options: ExportOptions, prediction: Prediction) -> bool:
    within = options.max_ram_bytes is None or prediction.ram_bytes <= options.max_ram_bytes
    return within and prediction.fits == "fits"


def file_type(plan: ExportPlan) -> int:
    """llama.cpp's number for ``general.file_type``; for a copy, that of the type that holds most parameters."""
    if plan.quant not in (COPY, MIXED):
        return mixes.mix_named(plan.quant).file_type
    held: dict[str, int] = {}
    for item in plan.tensors:
        held[item.type] = held.get(item.type, 0) + math.prod(item.shape)
    most = max(held, key=lambda name: held[name])
    by_default = {mix.default: mix.file_type for mix in reversed(list(mixes.MIXES.values()))}
    return _FLOAT_FILE_TYPES.get(most, by_default.get(most, 1024))


def rounds(plan: ExportPlan) -> bool:
    """Whether any tensor of a GGUF plan is quantised, and not copied as it is."""
    return plan.quant != COPY and any(ggml.TYPES[item.type].is_quantized for item in plan.tensors)
