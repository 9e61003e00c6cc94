"""``--quant auto``: from measured damages, a target and limits to the front of possible exports and the best of them.

Speeds and memory of a type on the target come from the profile's kernel classes, so the same model may get other types
for another device. Pure functions of an analysis; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgelm.bundle import ExportPlan, TensorDamage
from edgelm.errors import DoesNotFitError
from edgelm.units import format_bytes
from exporter import ggml, mixes
from exporter.allocate import Allocation, Limits, Option, cheapest, front, solve
from exporter.analysis import Analysis, size_in
from exporter.architectures.base import ModelDescription
from exporter.checkpoint import Checkpoint, weight_type
from exporter.damage import total
from exporter.options import ExportOptions
from exporter.plan import missed_limits, plan_of_types
from targets.calibration import calibration as kernel_constants
from targets.predict import RunSettings, predict_speed
from targets.profile import TargetProfile
from targets.workload import TypedWeights, Workload

GOOD_KL = 0.02
"""Mean KL in nats per token up to which, without any limit asked for, smaller and faster is taken as better."""
_POINTS = 14
_ATTEMPTS = 6
# A plan estimates the file's header; the limit holds for the file.
_HEADER_SLACK_BYTES = 4096
_REFERENCE_CONTEXT = 512


@dataclass(frozen=True)
class Point:
    """One plan of the front with what it would lose, whether it keeps all limits, and the limits it misses."""

    plan: ExportPlan
    kl: float
    eligible: bool
    reason: str


@dataclass(frozen=True)
class _Task:
    options: ExportOptions
    checkpoint: Checkpoint
    description: ModelDescription
    profile: TargetProfile
    analysis: Analysis

    def point(self, allocation: Allocation) -> Point:
        kl = self.analysis.predicted_kl(total(self.analysis.damages, allocation.types))
        decisions = {name: mixes.Decision(kind, self._reason(name, kind)) for name, kind in allocation.types.items()}
        plan = plan_of_types(self.options, decisions, self.checkpoint, self.description, self.profile)
        plan = plan.model_copy(update={"predicted_kl": kl, "calibration": self.analysis.calibration})
        missed = missed_limits(self.options, plan)
        if self.options.max_kl is not None and kl > self.options.max_kl:
            missed.append(f"mean KL of {kl:.4f} expected, --max-kl is {self.options.max_kl:g}")
        return Point(plan, kl, not missed, "; ".join(missed) or plan.predicted.fit_reason)

    def _reason(self, name: str, kind: str) -> str:
        lost = self.analysis.damages.get(name, {}).get(kind)
        return "asked for" if lost is None else f"measured: KL {self.analysis.scale * lost:.2g}"


def points(
    options: ExportOptions,
    checkpoint: Checkpoint,
    description: ModelDescription,
    profile: TargetProfile,
    analysis: Analysis,
) -> list[Point]:
    """The front for a target, smallest first, with extra points exactly at the limits that were asked for."""
    task = _Task(options, checkpoint, description, profile, analysis)
    choices = _options(task)
    found = [task.point(item) for item in front(choices, Limits(), _POINTS)]
    found += [task.point(item) for item in _at_limits(task, choices)]
    unique = {(point.plan.artifact_bytes, round(point.kl, 9)): point for point in found}
    return sorted(unique.values(), key=lambda point: (point.plan.artifact_bytes, -point.kl))


def choose(found: Sequence[Point], options: ExportOptions, profile: TargetProfile) -> Point:
    """The best point under the limits. Raises ``DoesNotFitError`` with the nearest points when there is none.

    With a KL limit that is the smallest that keeps it; with other limits the one of least KL; with none the smallest
    of at most ``GOOD_KL``, or of the least KL that fits into the target's memory.
    """
    eligible = [point for point in found if point.eligible]
    if not eligible:
        told = f"nothing keeps the limits on {profile.name}: {_least_missed(found).reason}"
        raise DoesNotFitError(told, hint=_nearest(found))
    fitting = [point for point in eligible if point.plan.predicted.fits == "fits"] or eligible
    limited = (options.max_artifact_bytes, options.max_ram_bytes, options.min_decode_tps, options.min_prefill_tps)
    good = [point for point in fitting if point.kl <= (options.max_kl or GOOD_KL)]
    if good and (options.max_kl is not None or all(limit is None for limit in limited)):
        best = min(good, key=lambda point: point.plan.artifact_bytes)
        told = f"the smallest with a mean KL of at most {options.max_kl or GOOD_KL:g}"
    else:
        best = min(fitting, key=lambda point: point.kl)
        told = "the least KL under the limits"
    told = f"auto: {told}: {format_bytes(best.plan.artifact_bytes)}, KL {best.kl:.4f} expected"
    plan = best.plan.model_copy(update={"notes": (*best.plan.notes, told)})
    return replace(best, plan=plan, reason=told)


def worst_tensors(plan: ExportPlan, analysis: Analysis, count: int = 5) -> tuple[TensorDamage, ...]:
    """The tensors that lose most in a plan, worst first."""
    lost = [
        TensorDamage(name=item.name, type=item.type, kl=analysis.scale * analysis.damages[item.name][item.type])
        for item in plan.tensors
        if item.type in analysis.damages.get(item.name, {})
    ]
    return tuple(sorted(lost, key=lambda item: -item.kl)[:count])


def _least_missed(found: Sequence[Point]) -> Point:
    return min(found, key=lambda point: (point.reason.count(";"), point.plan.artifact_bytes))


def _nearest(found: Sequence[Point]) -> str:
    """The smallest, the fastest and the best point that exist."""

    def told(point: Point) -> str:
        rate = point.plan.predicted.decode_tps
        speed = "" if rate is None else f", {rate:.1f} tokens/s"
        return f"{format_bytes(point.plan.artifact_bytes)} with KL {point.kl:.4f}{speed}"

    smallest = min(found, key=lambda point: point.plan.artifact_bytes)
    fastest = max(found, key=lambda point: point.plan.predicted.decode_tps or 0.0)
    best = min(found, key=lambda point: point.kl)
    return f"nearest: smallest {told(smallest)}; fastest {told(fastest)}; best {told(best)}"


# --- limits


def _at_limits(task: _Task, choices: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """The best allocation under all limits at once, if there is one.

    Limits on the artefact, memory and speed are not sums over tensors alone; what a plan has beyond its tensors is
    taken off, and where the linear model of speed is off the limit is moved and solved again.
    """
    options = task.options
    if not any((options.max_artifact_bytes, options.max_ram_bytes, options.min_decode_tps, options.min_prefill_tps)):
        return []
    base = cheapest(choices, "size_bytes")
    plan = task.point(base).plan
    size_limit = math.inf
    if options.max_artifact_bytes is not None:
        size_limit = options.max_artifact_bytes - (plan.artifact_bytes - base.size_bytes) - _HEADER_SLACK_BYTES
    ram_limit = math.inf
    if options.max_ram_bytes is not None:
        ram_limit = options.max_ram_bytes - (plan.predicted.ram_bytes - base.ram_bytes)
    decode_s = 1 / options.min_decode_tps if options.min_decode_tps else math.inf
    prefill_s = 1 / options.min_prefill_tps if options.min_prefill_tps else math.inf
    found = []
    for _ in range(_ATTEMPTS):
        allocation = solve(choices, Limits(size_limit, ram_limit, decode_s, prefill_s))
        if allocation is None:
            break
        found.append(allocation)
        reached = task.point(allocation).plan.predicted
        slow = [
            _overshoot(options.min_decode_tps, reached.decode_tps),
            _overshoot(options.min_prefill_tps, reached.prefill_tps),
        ]
        if max(slow) <= 1:
            break
        decode_s, prefill_s = decode_s / max(slow[0], 1), prefill_s / max(slow[1], 1)
    return found


def _overshoot(wanted: float | None, reached: float | None) -> float:
    if wanted is None:
        return 0.0
    return math.inf if not reached else wanted / reached * 1.0005 if wanted > reached else 1.0


def _options(task: _Task) -> dict[str, list[Option]]:
    """What every tensor can become, with damage and costs on the target."""
    description, damages = task.description, task.analysis.damages
    repacked = kernel_constants().family(task.profile.kernels).repacked
    head = "token_embd.weight" if description.dimensions.tied else "output.weight"
    own_types = _own_types(task)
    costs: dict[str, tuple[float, float]] = {}
    found: dict[str, list[Option]] = {}
    for item in description.tensors:
        shape = mixes.WeightShape(item.name, item.shape)
        if not mixes.is_quantizable(shape):
            continue
        asked = mixes.override_for(shape, task.options.type_overrides)
        known = damages.get(item.name, {})
        row = {asked.type: known.get(asked.type, 0.0)} if asked else dict(known) or {"F16": 0.0}
        if not asked and own_types[item.name] is not None:
            row[str(own_types[item.name])] = 0.0  # copied as it is
        parameters = math.prod(item.shape)
        looked_up = item.name == "token_embd.weight" and not description.dimensions.tied
        for kind, lost in row.items():
            if kind not in costs:
                costs[kind] = _unit_costs(kind, task)
            size_bytes = size_in(description, item.name, kind)
            decode_s, prefill_s = costs[kind]
            found.setdefault(item.name, []).append(
                Option(
                    kind,
                    lost,
                    size_bytes,
                    ram_bytes=size_bytes * (2 if kind in repacked and item.name != head and not looked_up else 1),
                    decode_s=0.0 if looked_up else decode_s * parameters,
                    prefill_s=0.0 if looked_up or item.name == head else prefill_s * parameters,
                )
            )
    return found


def _own_types(task: _Task) -> dict[str, str | None]:
    """The quantised type that a tensor has in the source already."""
    found: dict[str, str | None] = {}
    for item in task.description.tensors:
        header = task.checkpoint.tensors.get(item.source_name)
        kind = None if header is None else weight_type(header)
        found[item.name] = kind if kind is not None and ggml.TYPES[kind].is_quantized else None
    return found


def _unit_costs(kind: str, task: _Task) -> tuple[float, float]:
    """Decode and prefill seconds per token and weight of a type on the target, were all weights of that type."""
    parameters, dimensions = task.description.parameters, task.description.dimensions
    size_bytes = round(parameters * ggml.TYPES[kind].bits / 8)
    workload = Workload(
        format="gguf",
        architecture=task.description.architecture,
        parameters=parameters,
        file_bytes=size_bytes,
        weights=(TypedWeights(kind, parameters, size_bytes),),
        lookup=None,
        layers=dimensions.layers,
        hidden=dimensions.hidden,
        vocabulary=0,  # prefill would leave out a head of this size; here every weight counts
        kv_elements_per_token=2 * dimensions.kv_heads_total * dimensions.head_size,
    )
    speed = predict_speed(workload, task.profile, RunSettings(context=_REFERENCE_CONTEXT))
    return 1 / speed.decode_tps / parameters, 1 / speed.prefill_tps / parameters
