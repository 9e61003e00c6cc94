"""What a target will reach with a model: decode and prefill speed, memory, and whether it fits.

Decode is a roofline: the bytes streamed per token over the sustained bandwidth against the arithmetic of the types'
kernels, plus attention over the cache where that was measured, plus a fixed cost per layer (launches on a GPU, barriers
between threads on a CPU). Prefill is arithmetic by kernel class. Memory is the sum of process, weights, repacked copy,
KV cache and compute buffers. Pure functions of a workload, a profile and the calibration: nothing is measured, no model
file is opened.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from edgelm.bundle import Prediction, RamParts
from edgelm.errors import UsageError
from edgelm.units import format_bytes
from targets.calibration import Calibration, DeviceScale, Family, calibration
from targets.profile import GB, KernelCycles, TargetProfile
from targets.workload import TypedWeights, Workload

# A device of which nothing is known beyond its family, or of which everything was measured.
NO_SCALE = DeviceScale()
KvType = Literal["f32", "f16", "q8_0"]
KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
# Resident size of the runtime with the engine's libraries and no model (54 MiB) and with what a first run leaves; of
# one vocabulary entry in the engine, and in the source's tokenizer, which bundles carry and bare files lack (SmolLM2
# and a distilled one, 49,152 entries).
PROCESS_BYTES = 58 * 2**20
VOCABULARY_ENTRY_BYTES, TOKENIZER_ENTRY_BYTES = 140, 600
KV_PADDING = 256  # llama.cpp rounds the cache up to this many tokens
GPU_CONTEXT_BYTES = 300 * 2**20
COMPUTE_BASE_BYTES = 5 * 2**20
# Activations of one position that are alive at once, in units of the hidden size, for full batches (SmolLM2);
# short prompts touch about half of it.
LIVE_ACTIVATIONS = 20
# Without flash attention the scores of a whole batch are alive, and so many activations beside them (SmolLM2: 6.6 of
# 16.6 to 166.6 MiB that llama.cpp announces at 512 to 8,192 cells; the scores' copies it does not announce).
SCORED_ACTIVATIONS = 6
USUAL_HEAD = 64
SLOW_CORE_SHARE = 0.45
# Work of loading, in cycles of one core: reading one entry of the vocabulary, filling a byte of fresh memory (a copy of
# weights, the zeroed cache), mapping a byte of the file. Fitted on CPU time, 2.8 GHz x86-64, 24 loads of SmolLM2 and a
# distilled one, 58 to 271 MB, contexts of 512 and 8192, with and without mmap: median error 7 %, worst 26 %.
LOAD_ENTRY_CYCLES, LOAD_FILLED_CYCLES, LOAD_MAPPED_CYCLES = 9500.0, 2.0, 0.25
GPU_HOST_GHZ = 3.5  # the machine around a graphics card, of which its profile says nothing
# Share of the rated read rate that generation from storage reaches: faults are small, cyclic access defeats caches.
PAGING_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How the model will be run. ``depth`` tokens are in the cache when decoding starts.

    Threads of None are the profile's own choice. ``old_engine`` asks for llama.cpp as it was before 2025, which is
    how many published figures were taken. ``batch`` is the most tokens computed in one step. ``source_tokenizer`` is
    whether the source's tokenizer runs beside the engine: with bundles, not with bare GGUF files. ``context`` counts
    the tokens of all ``sequences``. Without ``flash_attention`` the scores of a batch take memory.
    """

    context: int
    depth: int = 0
    threads_decode: int | None = None
    threads_prefill: int | None = None
    kv_type: KvType = "f16"
    mmap: bool = True
    prompt_tokens: int = 512
    batch: int = 512
    old_engine: bool = False
    source_tokenizer: bool = True
    sequences: int = 1
    flash_attention: bool = True


def predict(
    workload: Workload, profile: TargetProfile, settings: RunSettings, constants: Calibration | None = None
) -> Prediction:
    """Speed, memory and fit of ``workload`` on ``profile``. ``constants`` replaces the calibration that is installed.

    Raises ``UsageError`` for settings that make no sense and ``ProfileError`` for an unknown kernel family.
    """
    for name, value, least in (
        ("context", settings.context, 1),
        ("depth", settings.depth, 0),
        ("prompt_tokens", settings.prompt_tokens, 1),
        ("batch", settings.batch, 1),
        ("threads", 1 if settings.threads_decode is None else settings.threads_decode, 1),
        ("threads", 1 if settings.threads_prefill is None else settings.threads_prefill, 1),
    ):
        if value < least:
            raise UsageError(f"{name} has to be at least {least}, not {value}")
    constants = constants or calibration()
    family = family_of(profile, constants)
    parts = ram_parts(workload, profile, settings, family)
    fits, reason = judge_fit(parts, profile, settings)
    warm_s, cold_s = load_seconds(workload, profile, settings, parts)
    if fits == "no":
        return Prediction(
            target=profile.label,
            ram_bytes=_total(parts),
            ram_parts=parts,
            prefill_tps=None,
            decode_tps=None,
            fits=fits,
            fit_reason=reason,
        )
    speed = predict_speed(workload, profile, settings, constants)
    paging_s = 0.0
    if fits == "pages" and profile.storage_read is not None:
        paging_s = workload.streamed_bytes / (profile.storage_read.value * PAGING_SHARE)
        reason += f"; decode waits {paging_s:.2g} s per token for storage"
    decode_tps = 1 / (1 / speed.decode_tps + paging_s)
    prefill_tps = 1 / (1 / speed.prefill_tps + paging_s / min(settings.prompt_tokens, settings.batch))
    return Prediction(
        target=profile.label,
        ram_bytes=_total(parts),
        ram_parts=parts,
        prefill_tps=prefill_tps,
        decode_tps=decode_tps,
        prefill_tps_band=(prefill_tps / speed.prefill_factor, prefill_tps * speed.prefill_factor),
        decode_tps_band=(decode_tps / speed.decode_factor, decode_tps * speed.decode_factor),
        load_warm_s=warm_s,
        load_cold_s=cold_s,
        fits=fits,
        fit_reason=reason,
    )


def load_seconds(
    workload: Workload, profile: TargetProfile, settings: RunSettings, parts: RamParts
) -> tuple[float | None, float | None]:
    """Seconds that the engine needs to load a model: with its file in the page cache, and from storage.

    From storage the file is read once, at the profile's rate, before or while it is used; None where the profile states
    no rate. ONNX Runtime, which plans and packs a graph, is not predicted: None and None.
    """
    if workload.format != "gguf":
        return None, None
    on_gpu = profile.kind == "gpu"
    copied = workload.file_bytes if on_gpu or not settings.mmap else 0
    filled = copied + parts.repack_bytes + (0 if on_gpu else parts.kv_bytes)
    cycles = LOAD_ENTRY_CYCLES * workload.vocabulary + LOAD_FILLED_CYCLES * filled
    cycles += LOAD_MAPPED_CYCLES * (workload.file_bytes - copied)
    warm_s = cycles / (GPU_HOST_GHZ * 1e9 if profile.cores is None else _hertz(profile))
    storage = profile.storage_read
    return warm_s, None if storage is None else warm_s + workload.file_bytes / storage.value


def load_text(prediction: Prediction) -> str:
    """The time to load for people, ``-`` where it is not predicted."""
    if prediction.load_warm_s is None:
        return "-"
    cold = "" if prediction.load_cold_s is None else f", {prediction.load_cold_s:.2g} s from storage"
    return f"{prediction.load_warm_s:.2g} s from cache{cold}"


@dataclass(frozen=True, slots=True)
class Speed:
    """Rates in tokens per second, and the factor around each that holds 80 % of the cases."""

    prefill_tps: float
    decode_tps: float
    prefill_factor: float
    decode_factor: float


def predict_speed(
    workload: Workload, profile: TargetProfile, settings: RunSettings, constants: Calibration | None = None
) -> Speed:
    """Speed alone, as if memory were no question. Raises ``ProfileError`` for an unknown kernel family."""
    constants = constants or calibration()
    family = family_of(profile, constants)
    scale = device_scale(profile, constants)
    spread = constants.spread
    workload = workload if family.gpu else multiplied(workload)
    known_decode = scale.decode_rows > 0 or profile.memory.effective is not None
    measured = profile.compute_scale is not None or profile.kernel_cycles is not None
    known_prefill = scale.prefill_rows > 0 or measured
    return Speed(
        prefill_tps=1 / prefill_seconds(workload, profile, settings, family, scale),
        decode_tps=1 / decode_seconds(workload, profile, settings, family, scale, constants.norm),
        prefill_factor=spread.prefill_known if known_prefill else spread.prefill_unknown,
        decode_factor=spread.decode_known if known_decode else spread.decode_unknown,
    )


def multiplied(workload: Workload) -> Workload:
    """A workload as a CPU computes it: ONNX Runtime has no products of float16 there, and makes float32 of weights once
    and for all when it loads."""
    if not any(item.type == "fp16" for item in workload.weights):
        return workload
    weights = [
        replace(item, type="fp32", size_bytes=4 * item.parameters) if item.type == "fp16" else item
        for item in workload.weights
    ]
    return replace(workload, weights=tuple(weights))


def family_of(profile: TargetProfile, constants: Calibration) -> Family:
    """The kernel family of a profile, with what was measured on the machine itself in place of its constants.

    Types that were not measured move with those that were: by the middle ratio of measured to the family's cycles.
    Raises ``ProfileError`` for an unknown family.
    """
    family = constants.family(profile.kernels)
    cycles = profile.kernel_cycles
    if cycles is None:
        return family
    return family.model_copy(
        update={
            "prefill": _moved(family.prefill, cycles.prefill),
            "decode": _moved(family.decode, cycles.decode),
            "layer_us": cycles.layer_us,
            "parallel_loss": cycles.parallel_loss,
        }
    )


def _moved(table: dict[str, float], measured: dict[str, float]) -> dict[str, float]:
    ratios = [value / table[kind] for kind, value in measured.items() if kind in table]
    ratio = statistics.median(ratios) if ratios else 1.0
    return {kind: value * ratio for kind, value in table.items()} | measured


def device_scale(profile: TargetProfile, constants: Calibration) -> DeviceScale:
    """How this device differs from its family by the rows that were published for it; a profile's own word wins.

    A detected host answers to the published devices that it was recognised as.
    """
    names = (profile.id, *profile.devices) if profile.available is not None else (profile.id,)
    scale = next((constants.devices[name] for name in names if name in constants.devices), NO_SCALE)
    if profile.kernel_cycles is not None:
        return NO_SCALE
    if profile.compute_scale is not None:
        scale = scale.model_copy(update={"compute": profile.compute_scale.value})
    return scale


def effective_bandwidth(profile: TargetProfile, family: Family, scale: DeviceScale) -> float:
    """Bytes per second that token generation sustains at the best thread count."""
    if profile.memory.effective is not None:
        return profile.memory.effective.value
    theoretical = profile.memory.theoretical
    rated = theoretical.value if theoretical is not None else family.per_core_gbs * GB * _fast(profile)
    return rated * family.bandwidth_share * scale.bandwidth


def decode_seconds(
    workload: Workload,
    profile: TargetProfile,
    settings: RunSettings,
    family: Family,
    scale: DeviceScale,
    norm: float,
) -> float:
    """Seconds per generated token at ``settings.depth``."""
    kv_bytes = settings.depth * workload.kv_elements_per_token * kv_element_bytes(workload, settings)
    bandwidth = effective_bandwidth(profile, family, scale)
    attention = 2.0 * workload.layers * workload.hidden * settings.depth  # multiplications
    fixed_s = workload.layers * fixed_us(profile, settings, family) * 1e-6
    if family.gpu:
        weights_s = sum(_on_gpu_seconds(item, profile, family, scale, bandwidth, norm) for item in workload.weights)
        return weights_s + kv_bytes / bandwidth + fixed_s + family.token_us * 1e-6
    threads = settings.threads_decode or int(profile.threads_decode.value)
    cores = _cores(profile, threads)
    clock = _hertz(profile) * scale.compute
    cycles = sum(
        item.parameters * _decode_cycles(item, workload, profile, family, threads) for item in workload.weights
    )
    streamed_bytes = workload.streamed_bytes + kv_bytes
    rate = bandwidth_at(profile, family, bandwidth, threads, streamed_bytes)
    known = profile.kernel_cycles
    measured = attention_cycles(profile, flash=settings.flash_attention)[1]
    if known is not None:
        cycles += row_cycles(workload.weights, workload, known.decode_row)
    if measured is None:
        cycles += attention * family.decode_of("F16")
        return _norm((streamed_bytes / rate, cycles / (clock * cores)), norm) + fixed_s
    # Attention comes after the weights of its layer, not beside them.
    attention_s = max(attention * measured / (clock * cores), kv_bytes / rate)
    return _norm((workload.streamed_bytes / rate, cycles / (clock * cores)), norm) + attention_s + fixed_s


def _on_gpu_seconds(
    item: TypedWeights, profile: TargetProfile, family: Family, scale: DeviceScale, bandwidth: float, norm: float
) -> float:
    """Seconds in which a GPU multiplies a type's weights with one vector: read, or unpacked where that takes longer."""
    streamed_s = item.size_bytes / (family.decode_of(item.type) * bandwidth)
    if not family.weight_flops or item.type in ("F32", "F16", "BF16"):
        return streamed_s
    assert profile.compute is not None
    unpacked_s = item.parameters * family.weight_flops / (profile.compute.value * scale.compute)
    return _norm((streamed_s, unpacked_s), norm)


def _decode_cycles(
    item: TypedWeights, workload: Workload, profile: TargetProfile, family: Family, threads: int
) -> float:
    """Cycles per weight of a type, between what was measured on a smaller and on a larger model of that type: by how
    the bytes of the whole workload stand to theirs, in logarithms. And between one thread and as many as were measured:
    where threads share a memory that is too slow for them, more of the arithmetic is hidden."""
    cycles, measured = family.decode_of(item.type), profile.kernel_cycles
    if measured is None:
        return cycles
    if measured.decode_weights is not None and item.type in measured.decode_large:
        low, high = measured.decode_weights
        weights = workload.streamed_bytes * item.parameters / item.size_bytes
        part = min(max(math.log(weights / low) / math.log(high / low), 0.0), 1.0)
        cycles += part * (measured.decode_large[item.type] - cycles)
    if measured.decode_threads is not None and item.type in measured.decode_single:
        single = measured.decode_single[item.type]
        cycles = single + _part_of_threads(measured, threads) * (cycles - single)
    return cycles


def fixed_us(profile: TargetProfile, settings: RunSettings, family: Family) -> float:
    """The fixed cost of a layer per generated token."""
    if profile.kernel_cycles is None:
        return family.old_layer_us if settings.old_engine else family.layer_us
    return layer_us(profile.kernel_cycles, settings.threads_decode or int(profile.threads_decode.value))


def layer_us(measured: KernelCycles, threads: int) -> float:
    """The fixed cost of a layer on a number of threads, between those that were measured."""
    if measured.layer_single_us is None:
        return measured.layer_us
    return measured.layer_single_us + _part_of_threads(measured, threads) * (
        measured.layer_us - measured.layer_single_us
    )


def _part_of_threads(measured: KernelCycles, threads: int) -> float:
    """How far ``threads`` are from one to as many as were measured, in logarithms: 0 to 1."""
    assert measured.decode_threads is not None
    return min(math.log(threads) / math.log(measured.decode_threads), 1.0)


def row_cycles(weights: Iterable[TypedWeights], workload: Workload, measured: Mapping[str, float]) -> float:
    """Cycles that the rows of all matrices cost for one token, besides their weights.

    Where a workload does not know its rows they are as long as the model is wide; types that nobody measured cost the
    middle of those that were. None of ONNX Runtime's kernels was measured.
    """
    if not measured or workload.format == "onnx":
        return 0.0
    usual = statistics.median(measured.values())
    return sum(
        (item.rows or item.parameters / workload.hidden) * measured.get(item.type, usual)
        for item in weights
        if item.type != "F32"
    )


def prefill_seconds(
    workload: Workload, profile: TargetProfile, settings: RunSettings, family: Family, scale: DeviceScale
) -> float:
    """Seconds per prompt token, averaged over the prompt. The head is computed for the last position only."""
    tokens = settings.prompt_tokens
    attention = 2.0 * workload.layers * workload.hidden * (settings.depth + tokens / 2)
    body = list(without_head(workload))
    if family.gpu:
        assert profile.compute is not None
        flops = profile.compute.value * scale.compute * workload.hidden / (workload.hidden + family.hidden_half)
        if settings.old_engine:
            flops *= family.old_prefill
        arithmetic_s = sum(2 * item.parameters / family.prefill_of(item.type) for item in body) / flops
        streamed_s = sum(item.size_bytes for item in body) / effective_bandwidth(profile, family, scale)
        return (
            arithmetic_s + 2 * attention / (family.prefill_of("F16") * flops) + streamed_s / min(tokens, settings.batch)
        )
    threads = settings.threads_prefill or int(profile.threads_prefill.value)
    known = profile.kernel_cycles
    measured = attention_cycles(profile, flash=settings.flash_attention)[0]
    cycles = sum(item.parameters * family.prefill_of(item.type) for item in body)
    cycles += row_cycles(body, workload, {} if known is None else known.prefill_row)
    cycles += attention * (family.prefill_of("F16") if measured is None else measured)
    clock = _hertz(profile) * scale.compute * (family.old_prefill if settings.old_engine else 1)
    return cycles / (clock * parallel_cores(profile, family, threads))


def attention_cycles(profile: TargetProfile, *, flash: bool) -> tuple[float | None, float | None]:
    """Cycles per multiplication of a kind of attention in prefill and decode, None where they were not measured. What
    is not known of attention without flash attention is taken to be as with it."""
    cycles = profile.kernel_cycles
    if cycles is None:
        return None, None
    if flash or cycles.plain_prefill is None or cycles.plain_decode is None:
        return cycles.attention_prefill, cycles.attention_decode
    return cycles.plain_prefill, cycles.plain_decode


def parallel_cores(profile: TargetProfile, family: Family, threads: int) -> float:
    """Cores' worth of prefill that ``threads`` threads give."""
    cores = _cores(profile, threads)
    return cores / (1 + family.parallel_loss * (cores - 1))


def kv_element_bytes(workload: Workload, settings: RunSettings) -> float:
    """Bytes of one cached number: ONNX Runtime's attention keeps what it computes with, whatever is asked for."""
    return KV_BYTES[workload.own_kv_type or ("f32" if workload.format == "onnx" else settings.kv_type)]


def bandwidth_at(
    profile: TargetProfile, family: Family, best: float, threads: int, streamed_bytes: float | None = None
) -> float:
    """Sustained bandwidth with ``threads`` threads, of ``best`` at the best count: a soft minimum with what the cores
    can draw, or the profile's own table where more threads cost speed. Where it was measured by size, what
    ``streamed_bytes`` per token get."""
    if streamed_bytes and profile.memory.streaming is not None:
        return profile.memory.streaming.rate(streamed_bytes, threads)
    table = profile.memory.by_threads
    if table:
        return best * table[min(threads, len(table)) - 1]
    stated = profile.memory.per_core
    per_core = stated.value if stated is not None else family.per_core_gbs * GB
    if per_core <= 0:
        return best
    return 1 / _norm((1 / best, 1 / (per_core * min(threads, _fast(profile) + _slow(profile)))), 4)


def head_of(workload: Workload) -> TypedWeights | None:
    """The weights among which the head, a vocabulary x hidden matrix, is: those of the type with the most bits that
    hold as many, which is where quantisation mixes put it."""
    head = workload.vocabulary * workload.hidden
    by_bits = sorted(workload.weights, key=lambda item: -item.size_bytes / max(item.parameters, 1))
    return next((item for item in by_bits if item.parameters >= head and item.type != "F32"), None)


def without_head(workload: Workload) -> Iterable[TypedWeights]:
    """The weights that prefill multiplies for every position: all but the head."""
    holder, head = head_of(workload), workload.vocabulary * workload.hidden
    for item in workload.weights:
        if item is not holder:
            yield item
        elif item.parameters > head:
            rest = item.parameters - head
            rows = max(item.rows - workload.vocabulary, 0)
            yield TypedWeights(item.type, rest, round(item.size_bytes * rest / item.parameters), rows)


def ram_parts(workload: Workload, profile: TargetProfile, settings: RunSettings, family: Family) -> RamParts:
    """Resident memory by purpose. A GPU's memory holds weights, cache and buffers; the process lives elsewhere."""
    cells = math.ceil(settings.context / KV_PADDING) * KV_PADDING
    kv_bytes = workload.kv_elements_per_token * kv_element_bytes(workload, settings) * cells
    batch = min(settings.batch, settings.context)
    live_bytes = batch * workload.hidden * LIVE_ACTIVATIONS * 4
    if not settings.flash_attention and workload.format == "gguf":
        scored = score_bytes(workload, settings.context // settings.sequences, batch)
        live_bytes = max(live_bytes, scored + 4 * batch * workload.hidden * SCORED_ACTIVATIONS)
    compute_bytes = COMPUTE_BASE_BYTES + live_bytes + workload.vocabulary * 4
    repack_bytes = 0.0 if family.gpu else _repack_bytes(workload, settings, family)
    entry_bytes = VOCABULARY_ENTRY_BYTES + (TOKENIZER_ENTRY_BYTES if settings.source_tokenizer else 0)
    return RamParts(
        weights_bytes=workload.file_bytes,
        repack_bytes=round(repack_bytes),
        kv_bytes=round(kv_bytes),
        compute_bytes=round(compute_bytes),
        process_bytes=GPU_CONTEXT_BYTES if family.gpu else PROCESS_BYTES + workload.vocabulary * entry_bytes,
    )


def score_bytes(workload: Workload, context: int, batch: int) -> int:
    """What attention keeps without flash attention: for each head, token of a batch and cell of a sequence a score and
    its copy of 16 bits, which is multiplied, and a mask."""
    pairs = min(batch, context) * math.ceil(context / KV_PADDING) * KV_PADDING
    return copied_score_bytes(workload, context, batch) + pairs * 4 * (_heads(workload) + 1)


def copied_score_bytes(workload: Workload, context: int, batch: int) -> int:
    """The copies among ``score_bytes``, which llama.cpp's announced buffers do not hold."""
    return min(batch, context) * math.ceil(context / KV_PADDING) * KV_PADDING * 2 * _heads(workload)


def _heads(workload: Workload) -> int:
    return workload.heads or max(workload.hidden // USUAL_HEAD, 1)


def _repack_bytes(workload: Workload, settings: RunSettings, family: Family) -> float:
    """What rearranged weights add to the file's own bytes.

    Mapped, the file stays and the copies come on top. Read without a map, weights are rearranged in place of the
    original, which takes more only where the arrangement does; a tied table is both looked up and multiplied, so
    llama.cpp loads it a second time as the head. ONNX Runtime keeps float32 in place of float16 (``multiplied``), and
    a tied table once more to look up.
    """
    if workload.format == "onnx":
        grown = multiplied(workload).streamed_bytes - workload.streamed_bytes
        tied = workload.lookup is None and grown
        return grown + (2 * workload.vocabulary * workload.hidden if tied else 0)
    extra = 0.0
    for item in workload.weights:
        if item.type in family.repacked:
            growth = family.repacked_growth.get(item.type, 1.0)
            extra += item.size_bytes * (growth if settings.mmap else growth - 1)
    head = head_of(workload)
    if not settings.mmap and workload.lookup is None and head is not None and head.type in family.repacked:
        extra += head.size_bytes * workload.vocabulary * workload.hidden / head.parameters
    return extra


def judge_fit(
    parts: RamParts, profile: TargetProfile, settings: RunSettings
) -> tuple[Literal["fits", "pages", "no"], str]:
    """``fits``; ``pages`` when mapped weights would be read from storage again and again; ``no``. With the numbers."""
    needed, usable = _total(parts), profile.usable_ram_bytes
    stated = f"needs {format_bytes(needed)}, usable are {format_bytes(usable)}: {profile.usable_ram_reason}"
    if needed <= usable:
        return "fits", stated
    unmappable = needed - parts.weights_bytes
    if settings.mmap and profile.kind == "cpu" and unmappable <= usable and profile.storage_read is not None:
        return "pages", f"{stated}; {format_bytes(needed - usable)} of the mapped weights do not stay in memory"
    return "no", stated


def _total(parts: RamParts) -> int:
    return parts.weights_bytes + parts.repack_bytes + parts.kv_bytes + parts.compute_bytes + parts.process_bytes


def _norm(seconds: tuple[float, float], power: float) -> float:
    largest = max(seconds)
    return float(largest * math.fsum((item / largest) ** power for item in seconds) ** (1 / power))


def _cores(profile: TargetProfile, threads: int) -> float:
    """Threads in units of fast cores: slow cores count less, siblings of one core add nothing."""
    fast, slow = _fast(profile), _slow(profile)
    return min(threads, fast) + SLOW_CORE_SHARE * min(max(threads - fast, 0), slow)


def _fast(profile: TargetProfile) -> int:
    return profile.cores.fast if profile.cores is not None else 1


def _slow(profile: TargetProfile) -> int:
    return profile.cores.slow if profile.cores is not None else 0


def _hertz(profile: TargetProfile) -> float:
    return profile.cores.fast_ghz.value * 1e9 if profile.cores is not None else 1e9
