"""What to expect when a GPU computes some of the layers and the CPU of its host the rest.

Layers come one after the other, so their times add up: those on the GPU at its bandwidth, the others at the host's,
each as ``predict`` has it, and what it costs to go back and forth. The plan of what fits is ``vram``'s, on layers of
equal size. Not known and left out: prompts, for which the host's layers pass through the GPU over a bus whose speed no
profile tells. The costs of going back and forth come from one kind of machine, an H200 with 16 cores of a Xeon.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from edgelm.errors import DoesNotFitError, UsageError
from edgelm.units import format_bytes
from targets.calibration import Calibration, Family, calibration
from targets.predict import (
    RunSettings,
    decode_seconds,
    device_scale,
    family_of,
    fixed_us,
    head_of,
    ram_parts,
    without_head,
)
from targets.profile import TargetProfile
from targets.vram import HOST_REPACK, Device, LayeredModel, OffloadPlan, Room, plan_offload
from targets.workload import TypedWeights, Workload

# Fitted to 52 rows of benchmarks/results/gpu_offload-third.jsonl (135M, 360M and 1.1B in two and three types, 7B; a
# quarter, half and three quarters of the layers on an H200, 16 threads, rearranged and not): what going from the host
# to the GPU and back costs a token, and by how much a layer's fixed cost on the host grows when its threads have slept
# while the GPU computed.
_CROSSING_US = 50.0
_HOST_LAYER_GROWTH = 1.23
# How many more cycles weights take that lie as the file has them, where the profile does not tell: on AMX from the same
# rows, elsewhere as on a Zen 4 with two threads. Types of 32 weights have hardly any kernels but the rearranged ones.
_AS_FILED_AMX = {"Q4_0": 3.3, "Q8_0": 4.0}
_AS_FILED = {"Q4_0": 2.5, "IQ4_NL": 1.9, "Q4_K": 1.46}
_AS_FILED_OTHERS = 1.1


@dataclass(frozen=True, slots=True)
class SplitPrediction:
    """``ram_bytes`` is what the host's memory holds, ``plan`` what the GPU's does."""

    decode_tps: float
    plan: OffloadPlan
    ram_bytes: int


def predict_split(
    workload: Workload,
    gpu: TargetProfile,
    host: TargetProfile,
    settings: RunSettings,
    gpu_layers: int,
    constants: Calibration | None = None,
    *,
    host_repack: bool = HOST_REPACK,
) -> SplitPrediction:
    """Decode speed and memory with ``gpu_layers`` on ``gpu``, counted as in ``vram``; ``host_repack`` as an engine's
    options have it.

    Raises ``UsageError`` when the profiles are not a GPU and a CPU or the model is no GGUF, ``DoesNotFitError`` when
    more layers are asked for than fit, or the rest does not fit the host.
    """
    if gpu.kind != "gpu" or host.kind != "cpu":
        raise UsageError(
            f"layers are split between a GPU and a CPU, not between {gpu.label} and {host.label}",
            hint="name the GPU as the target and the machine around it with --host",
        )
    if workload.format != "gguf":
        raise UsageError("only GGUF models are split between a GPU and a CPU")
    constants = constants or calibration()
    device = Device(gpu.id, gpu.name, gpu.backend, "gpu", gpu.usable_ram_bytes, gpu.ram_bytes)
    room = Room(settings.context, kv_type=settings.kv_type, batch=settings.batch)
    plan = plan_offload(layered(workload), room, device, gpu_layers, no_gpu="")
    there = max(plan.gpu_layers - 1, 0)
    on_gpu = part_of(workload, there, with_head=plan.gpu_layers > 0)
    on_cpu = part_of(workload, workload.layers - there, with_head=plan.gpu_layers == 0)
    # The cache of the host's layers is counted with them; what else the GPU spares it are weights.
    spared_bytes = plan.spared_bytes - plan.parts.kv_bytes if plan.gpu_layers else 0
    kept = replace(on_cpu, file_bytes=workload.file_bytes - spared_bytes)
    ram = ram_parts(kept, host, settings, family_of(host, constants)).model_dump()
    beside = plan.gpu_layers > 0
    if beside and not host_repack:
        ram["repack_bytes"] = 0
    ram_bytes = sum(ram.values())
    if ram_bytes > host.usable_ram_bytes:
        sizes = f"{format_bytes(ram_bytes)} stay with {host.label}, {format_bytes(host.usable_ram_bytes)} can be used"
        raise DoesNotFitError(f"{sizes}: {host.usable_ram_reason}", hint="use a smaller quantisation or context")
    seconds = 0.0
    for profile, part in ((gpu, on_gpu), (host, on_cpu)):
        if part.weights:
            known, family, scale = profile, family_of(profile, constants), device_scale(profile, constants)
            if profile is host and beside and not host_repack:
                known, family = as_filed(profile, family)
            alone_s = decode_seconds(part, known, settings, family, scale, constants.norm)
            fixed_s = part.layers * fixed_us(known, settings, family) * 1e-6
            seconds += beside_gpu(alone_s, fixed_s) if profile is host and beside else alone_s
    return SplitPrediction(1 / seconds, plan, ram_bytes)


def as_filed(profile: TargetProfile, family: Family) -> tuple[TargetProfile, Family]:
    """A CPU and its kernels where no weights are rearranged for them: as measured there, else by what it cost where it
    was. What a large model and one thread take moves along."""
    cycles = profile.kernel_cycles
    measured = {} if cycles is None else cycles.decode_as_filed
    if not measured:
        factors = _AS_FILED_AMX if "amx_int8" in profile.isa else _AS_FILED
        measured = {kind: family.decode_of(kind) * factors.get(kind, _AS_FILED_OTHERS) for kind in family.repacked}
    growth = {kind: value / family.decode_of(kind) for kind, value in measured.items()}
    family = family.model_copy(update={"decode": family.decode | measured})
    if cycles is None:
        return profile, family
    moved = {
        name: {kind: growth.get(kind, 1.0) * value for kind, value in getattr(cycles, name).items()}
        for name in ("decode_single", "decode_large")
    }
    return profile.model_copy(update={"kernel_cycles": cycles.model_copy(update=moved)}), family


def beside_gpu(alone_s: float, fixed_s: float) -> float:
    """What the host's layers take beside a GPU, the way there and back included, from what they take alone, of which
    ``fixed_s`` are their fixed costs."""
    return alone_s - fixed_s + _HOST_LAYER_GROWTH * fixed_s + _CROSSING_US * 1e-6


def part_of(workload: Workload, layers: int, *, with_head: bool) -> Workload:
    """``layers`` of a workload whose layers are equal, with or without its head."""
    share = layers / workload.layers
    weights = _scaled(without_head(workload), share) if share else []
    head = _head(workload)
    if with_head and head is not None:
        weights = [*weights, head]
    kv_elements = round(workload.kv_elements_per_token * share)
    return replace(workload, weights=tuple(weights), layers=layers, kv_elements_per_token=kv_elements)


def _scaled(weights: Iterable[TypedWeights], share: float) -> list[TypedWeights]:
    return [
        TypedWeights(item.type, *(round(count * share) for count in (item.parameters, item.size_bytes, item.rows)))
        for item in weights
    ]


def _head(workload: Workload) -> TypedWeights | None:
    holder = head_of(workload)
    if holder is None:
        return None
    parameters = workload.vocabulary * workload.hidden
    size_bytes = round(holder.size_bytes * parameters / holder.parameters)
    return TypedWeights(holder.type, parameters, size_bytes, workload.vocabulary)


def layered(workload: Workload) -> LayeredModel:
    """A workload as a GPU takes it, all layers alike.

    The inner size comes from what a gated layer's parameters leave beside attention: two square matrices and keys and
    values; its three matrices are of hidden x inner size each.
    """
    body, head = list(without_head(workload)), _head(workload)
    body_bytes = sum(item.size_bytes for item in body)
    head_bytes = 0 if head is None else head.size_bytes
    per_layer = sum(item.parameters for item in body) / workload.layers
    kv = workload.kv_elements_per_token / workload.layers
    attention = 2 * workload.hidden**2 + kv * workload.hidden
    inner = max(round((per_layer - attention) / (3 * workload.hidden)), 0)
    bytes_per_weight = body_bytes / max(sum(item.parameters for item in body), 1)
    return LayeredModel(
        name=workload.architecture,
        layers=(round(body_bytes / workload.layers),) * workload.layers,
        head_bytes=head_bytes,
        tied_bytes=head_bytes if workload.lookup is None else 0,
        kv_elements=(round(kv),) * workload.layers,
        hidden=workload.hidden,
        feed_forward=inner,
        vocabulary=workload.vocabulary,
        widest_bytes=round(max(inner, workload.hidden) * workload.hidden * bytes_per_weight),
    )
