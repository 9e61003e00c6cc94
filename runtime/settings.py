"""How to run a model on the machine at hand: threads, context, type of the cache, mapping, batch, each with its reason.

Follows a target profile and the memory that is free now. What was asked for is kept; what was not gives way when memory
is short, cheapest loss first: a smaller batch, the engine in the server's own process, weights copied instead of
mapped, an 8-bit cache, a shorter context. A model that fits in no way is refused before anything is loaded: mapped
weights that do not fit would be read from the card again for every token, copied ones would swap. Predicts with
``targets.predict``; loads and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from edgelm.bundle import Bundle, Choice
from edgelm.errors import BundleError, DoesNotFitError, UsageError
from edgelm.units import format_bytes
from runtime.attention import OFF, ON, choose_attention, measured_attention
from runtime.engine import EngineOptions, FlashAttention, KvType
from runtime.gguf_header import GGUFHeader, read_gguf_header, workload_from_gguf
from runtime.model import artifact_of, memory_for_model, planned_context
from runtime.offload import layered_model
from runtime.speculative import DRAFTED_STREAMS
from targets.calibration import Family, calibration
from targets.host import default_threads
from targets.predict import RunSettings, family_of, ram_parts, score_bytes
from targets.profile import TargetProfile, load_profile
from targets.workload import Workload, workload_from_plan

AUTO = "auto"
LEAST_CONTEXT = 512
"""A context is not shortened below this: a chat template and one turn would not fit."""
_STEP = 256  # llama.cpp rounds a sequence's cache up to this
_SMALL_BATCH = 128
SPARE_SHARE = 0.05  # left free: predictions are off by up to 2 %, and the system has to go on living
_Q8_BLOCK = 32
SERVER_BYTES = 50 * 2**20
"""What a server takes beside the process of its engine: SmolLM2 is served in 174 MB by two processes, in 122 by one
(proportional set sizes)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user fixed. Zero or None means: decide.

    ``process`` tells where the engine may run: in one of its own beside the server (``any``: decide), or only in this
    one (``own``), as all commands but ``serve`` do. ``lookup``, ``draft``, ``providers``, ``host_repack`` and
    ``flash_attention`` are those of ``EngineOptions``; a drafting model's memory counts.
    """

    context: int = 0
    sequences: int = 1
    threads_decode: int = 0
    threads_prefill: int = 0
    kv_type: KvType | None = None
    process: Literal["any", "own"] = "own"
    lookup: bool = False
    draft: str = ""
    providers: tuple[str, ...] = ()
    host_repack: bool | None = None
    flash_attention: FlashAttention = "auto"

    @classmethod
    def of(cls, options: EngineOptions, process: Literal["any", "own"] = "own", *, fixed_type: bool) -> Asked:
        """What a command was given as options of an engine; ``fixed_type`` tells whether the cache's type was."""
        return cls(
            options.context,
            options.sequences,
            options.threads_decode,
            options.threads_prefill,
            kv_type=options.kv_type if fixed_type else None,
            process=process,
            lookup=options.lookup,
            draft=options.draft,
            providers=options.providers,
            host_repack=options.host_repack,
            flash_attention=options.flash_attention,
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """``options`` for the engine, whether it runs ``in_process``; ``reasons`` in the order in which they are worth
    reading."""

    options: EngineOptions
    in_process: bool
    reasons: MappingProxyType[str, Choice]

    def lines(self) -> dict[str, str]:
        """``setting -> value: reason``, for people."""
        return {name: f"{choice.value}: {choice.reason}" for name, choice in self.reasons.items()}


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to hold the model."""

    options: EngineOptions
    in_process: bool


@dataclass(frozen=True, slots=True)
class _Model:
    """What decides about memory. ``q8_cache`` tells whether the engine can keep this model's cache in 8 bits,
    ``layer_bytes`` are the weights of all layers of a GGUF model, ``draft`` is the model that drafts for it."""

    name: str
    workload: Workload
    context: int
    context_reason: str
    q8_cache: bool
    family: Family
    profile: TargetProfile
    layer_bytes: int = 0
    draft: _Model | None = None

    def needs(self, way: _Way) -> int:
        """Resident bytes that are predicted for a way."""
        options = way.options
        cells = -(-options.context // _STEP) * _STEP * options.sequences
        settings = RunSettings(
            context=cells,
            kv_type=options.kv_type,
            mmap=options.mmap,
            batch=options.batch,
            sequences=options.sequences,
            flash_attention=self.attention(options).value == ON,
        )
        parts = ram_parts(self.workload, self.profile, settings, self.family)
        held: dict[str, int] = parts.model_dump()
        if options.host_repack and options.mmap:  # of any type, as ``check_memory`` counts them
            held["repack_bytes"] = max(held["repack_bytes"], self.layer_bytes)
        drafting = 0 if self.draft is None else self.draft.needs(_drafting(way))
        return sum(held.values()) + drafting + (0 if way.in_process else SERVER_BYTES)

    def attention(self, options: EngineOptions) -> Choice:
        """The kind of attention that options mean for this model; ONNX Runtime has one."""
        if self.workload.format == "onnx":
            return Choice(value=ON, reason="ONNX Runtime's own")
        scores = score_bytes(self.workload, options.context, options.batch)
        return choose_attention(options, on_gpu=False, scores_bytes=scores)


def _drafting(way: _Way) -> _Way:
    """How the drafting model is held beside the other; a process counts twice, which errs on the safe side."""
    options = replace(way.options, sequences=min(way.options.sequences, DRAFTED_STREAMS), kv_type="f16")
    return _Way(options, in_process=True)


def choose_settings(path: Path, target: str, asked: Asked) -> Settings:
    """Settings for the model at ``path`` (a bundle or ``.gguf``).

    ``target`` is ``auto`` for this machine, or what ``load_profile`` takes: its threads and memory count where they are
    tighter than this machine's. Raises ``DoesNotFitError``, ``UsageError`` for a target that is no CPU, and what
    opening the model and the profile raises.
    """
    profile = _cpu_profile(target)
    decode, prefill = _threads(profile, asked)
    model = _open(path, profile, asked)
    if asked.kv_type is not None or asked.flash_attention == OFF:
        model = replace(model, q8_cache=False)
    free = memory_for_model()
    if profile.available is None and profile.usable_ram_bytes < int(free.value):
        free = Choice(value=profile.usable_ram_bytes, reason=profile.usable_ram_reason)
    options = EngineOptions(
        context=model.context,
        sequences=asked.sequences,
        threads_decode=int(decode.value),
        threads_prefill=int(prefill.value if model.workload.format == "gguf" else decode.value),
        kv_type=asked.kv_type or "f16",
        lookup=asked.lookup,
        draft=asked.draft,
        providers=asked.providers or (profile.onnx_providers if model.workload.format == "onnx" else ()),
        host_repack=asked.host_repack,
        flash_attention=asked.flash_attention,
        faster_attention=measured_attention(profile),
    )
    first = _Way(options, in_process=asked.process == "own")
    way = _fitting(model, first, free, shorten=asked.context == 0)
    reasons = _reasons(model, way, free, decode, prefill)
    if asked.kv_type is not None:
        reasons["kv_type"] = Choice(value=asked.kv_type, reason="asked for")
    if way.options.flash_attention != asked.flash_attention:
        reasons["flash_attention"] = Choice(value=ON, reason=f"memory is short ({free.reason})")
    if options.providers:
        why = "asked for" if asked.providers else f"the list of {profile.id}"
        reasons["providers"] = Choice(value=", ".join(options.providers), reason=why)
    if asked.process == "any":
        why = f"memory is short ({free.reason})" if way.in_process else "its crash would not end the server"
        reasons["engine"] = Choice(value="in the server's process" if way.in_process else "a process", reason=why)
    return Settings(way.options, way.in_process, MappingProxyType(reasons))


def predicted_bytes(path: Path, options: EngineOptions, *, in_process: bool) -> int:
    """Resident bytes that serving the model at ``path`` with ``options`` is predicted to take on this machine.

    A context of 0 is the plan's. An encoder computes whole texts at once, so that its batch counts as its context.
    Raises what opening the model raises.
    """
    profile = _cpu_profile(AUTO)
    model = _open(path, profile, Asked(options.context, draft=options.draft))
    way = _Way(replace(options, context=model.context), in_process)
    return model.needs(way)


def choose_encoder_threads(target: str) -> Choice:
    """Threads for a model that makes vectors, which is arithmetic like prefill. Raises as ``choose_settings``."""
    return _threads(_cpu_profile(target), Asked())[1]


def _cpu_profile(target: str) -> TargetProfile:
    profile = load_profile("host" if target == AUTO else target)
    if profile.kind != "cpu":
        raise UsageError(f"{profile.label} is a GPU; models are served by the CPU", hint="use --target auto")
    return profile


def _threads(profile: TargetProfile, asked: Asked) -> tuple[Choice, Choice]:
    """What was asked for, else the tighter one of the profile's advice and of what this machine allows."""
    chosen = []
    here = default_threads()
    wanted = (asked.threads_decode, asked.threads_prefill)
    for count, advised, allowed in zip(wanted, (profile.threads_decode, profile.threads_prefill), here, strict=True):
        fewest = min(advised, allowed, key=lambda choice: int(choice.value))
        chosen.append(Choice(value=count, reason="asked for") if count else fewest)
    return chosen[0], chosen[1]


def _open(path: Path, profile: TargetProfile, asked: Asked) -> _Model:
    """Read headers only."""
    artifact, bundle = artifact_of(path, check_hashes=False)
    if artifact.suffix == ".onnx":
        workload, header = _onnx_workload(artifact, bundle), None
    else:
        header = read_gguf_header(artifact)
        workload = workload_from_gguf(header)
    if asked.context:
        context, reason = asked.context, "asked for"
    else:
        context, reason = planned_context(header, bundle)
    return _Model(
        name=bundle.manifest.name if bundle else artifact.name,
        workload=workload,
        context=context,
        context_reason=reason,
        q8_cache=header is not None and _takes_q8_cache(header),
        family=family_of(profile, calibration()),
        profile=profile,
        layer_bytes=0 if header is None else sum(layered_model(header, "").layers),
        draft=_open(Path(asked.draft), profile, Asked(context)) if asked.draft else None,
    )


def _onnx_workload(artifact: Path, bundle: Bundle | None) -> Workload:
    workload = workload_from_plan(bundle.manifest.plan) if bundle else None
    if workload is None:
        raise BundleError(
            f"{artifact} comes with no plan that tells its size", hint="give the bundle directory that it belongs to"
        )
    return workload


def _takes_q8_cache(header: GGUFHeader) -> bool:
    """Whether rows of keys and values are whole blocks of 32, which ggml's q8_0 needs."""
    architecture = header.metadata.get("general.architecture")
    hidden = header.metadata.get(f"{architecture}.embedding_length")
    heads = header.metadata.get(f"{architecture}.attention.head_count")
    usual = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else 0
    lengths = [header.metadata.get(f"{architecture}.attention.{part}_length", usual) for part in ("key", "value")]
    return all(isinstance(length, int) and length > 0 and length % _Q8_BLOCK == 0 for length in lengths)


def _ways(model: _Model, first: _Way) -> Iterator[_Way]:
    """``first`` with one thing more given up each time, the context kept."""
    yield first
    options = replace(first.options, batch=min(first.options.batch, _SMALL_BATCH))
    yield _Way(options, first.in_process)
    if options.flash_attention == "auto" and model.attention(options).value == OFF:
        options = replace(options, flash_attention=ON)
        yield _Way(options, first.in_process)
    yield _Way(options, in_process=True)
    if model.workload.format == "onnx":
        return  # its cache is what it computes with, and its weights are the engine's own business
    yield _Way(replace(options, mmap=False), in_process=True)
    if model.q8_cache:
        options = replace(options, kv_type="q8_0")
        yield _Way(options, in_process=True)
        yield _Way(replace(options, mmap=False), in_process=True)


def _with_context(way: _Way, context: int) -> _Way:
    return replace(way, options=replace(way.options, context=context))


def _fitting(model: _Model, first: _Way, free: Choice, *, shorten: bool) -> _Way:
    """The first way that fits, at a shorter context if need be. Raises ``DoesNotFitError``."""
    budget = int(int(free.value) * (1 - SPARE_SHARE))
    for way in _ways(model, first):
        if model.needs(way) <= budget:
            return way
    smallest = min(_ways(model, first), key=model.needs)
    wanted = first.options.context
    context = (wanted - 1) // _STEP * _STEP
    while context >= LEAST_CONTEXT and model.needs(_with_context(smallest, context)) > budget:
        context -= _STEP
    if shorten and context >= LEAST_CONTEXT:
        return _with_context(smallest, context)
    least = min(wanted, LEAST_CONTEXT) if shorten else wanted
    needed, sequences = model.needs(_with_context(smallest, least)), first.options.sequences
    raise DoesNotFitError(
        f"{model.name} needs {format_bytes(needed)} for a context of {least} tokens"
        + (f" x {sequences}" if sequences > 1 else "")
        + f", {format_bytes(budget)} can be used: {free.reason}",
        hint=f"use --context {context}"
        if context >= LEAST_CONTEXT
        else "use a smaller model or quantisation, or free memory",
    )


def _reasons(model: _Model, way: _Way, free: Choice, decode: Choice, prefill: Choice) -> dict[str, Choice]:
    options, full = way.options, _with_context(way, model.context)
    short = f"memory is short ({free.reason})"
    context = model.context_reason
    if options.context < model.context:
        context = f"{model.context} would need {format_bytes(model.needs(full))} and {short}"
    reasons = {
        "memory": Choice(value=format_bytes(model.needs(way)), reason=f"predicted; {free.reason}"),
        "context": Choice(value=options.context, reason=context),
        "kv_type": Choice(value=options.kv_type, reason=short if options.kv_type == "q8_0" else "as exact as needed"),
        "batch": Choice(
            value=options.batch, reason=short if options.batch == _SMALL_BATCH else "buffers of this size fit"
        ),
        "threads_decode": decode,
        "threads_prefill": prefill,
    }
    own = model.workload.own_kv_type
    if own is not None:
        reasons["kv_type"] = Choice(value=own, reason="what ONNX Runtime's attention keeps")
        reasons["threads_prefill"] = Choice(value=decode.value, reason="ONNX Runtime has one pool of threads")
        return reasons
    reasons["flash_attention"] = model.attention(options)
    mapped = "loads at once, and nothing is copied but what the kernels rearrange"
    copied = f"the kernels rearrange weights, mapped ones would be there twice and {short}"
    reasons["mmap"] = Choice(
        value="on" if options.mmap else "off",
        reason=mapped if options.mmap else copied,
    )
    return reasons
