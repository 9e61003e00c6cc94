"""Execution providers of ONNX Runtime: which are installed, which one a user means, and what each of them computes.

Nothing falls back in silence: a provider that is not there is an error, and so is a node that it cannot compute, unless
the user named ``cpu`` as well. Knows no graphs and no engines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgelm.errors import EngineError, UsageError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
ATTENTION = "GroupQueryAttention"
_SUFFIX = "ExecutionProvider"
_RAM = frozenset({"Cpu", "CudaPinned"})  # names of memory that the CPU reads
_REMOTE = frozenset({"AzureExecutionProvider"})  # calls a service: nothing that computes a model here
# What brings a provider, by ONNX Runtime's documentation of its execution providers.
_PACKAGES = MappingProxyType(
    {
        "CUDA": "onnxruntime-gpu",
        "TensorRT": "onnxruntime-gpu",
        "OpenVINO": "onnxruntime-openvino",
        "Dml": "onnxruntime-directml (Windows)",
        "QNN": "onnxruntime-qnn (Windows on ARM)",
        "CoreML": "onnxruntime (macOS)",
    }
)


def short_name(provider: str) -> str:
    """``OpenVINO`` of ``OpenVINOExecutionProvider``."""
    return provider.removesuffix(_SUFFIX)


def installed(runtime: Any) -> tuple[str, ...]:
    """Full names of the providers that the installed ONNX Runtime has, in its own order."""
    return tuple(name for name in runtime.get_available_providers() if name not in _REMOTE)


def resolve(runtime: Any, asked: Sequence[str]) -> tuple[str, ...]:
    """Full names of the providers that are ``asked`` for (``cuda`` or ``CUDAExecutionProvider``), in that order.

    Nothing asked for is the CPU. Raises ``UsageError`` for a name that is not installed, or given twice.
    """
    known = {short_name(name).lower(): name for name in installed(runtime)}
    found = []
    for name in asked or ("cpu",):
        full = known.get(name.strip().lower().removesuffix(_SUFFIX.lower()))
        if full is None:
            brings = ", ".join(f"{short.lower()}: {package}" for short, package in _PACKAGES.items())
            raise UsageError(
                f"ONNX Runtime {runtime.__version__} has no provider '{name}' here, but {', '.join(sorted(known))}",
                hint=f"install, in place of onnxruntime, the package that brings it ({brings})",
            )
        found.append(full)
    if len(set(found)) != len(found):
        raise UsageError(f"a provider is named twice: {', '.join(asked)}")
    if CPU in found[:-1]:
        raise UsageError("cpu computes everything, so that no provider behind it would", hint="name cpu last")
    return tuple(found)


def with_options(providers: Sequence[str], threads: int) -> list[tuple[str, dict[str, str]]]:
    """Providers as a session takes them. OpenVINO has threads of its own, and counts them by itself unless told."""
    options = {"OpenVINOExecutionProvider": {"num_of_threads": str(threads)}}
    return [(name, options.get(name, {})) for name in providers]


def device_inputs(session: Any) -> frozenset[str]:
    """Inputs that are read from memory of a device: binding copies them there, so that they are bound at every run."""
    pairs = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    return frozenset(value.name for value, memory in pairs if memory.name not in _RAM)


def check_providers(runtime: Any, asked: Sequence[str], path: Path, *, half: bool) -> None:
    """Raises ``UsageError`` when CUDA alone is to compute a float32 graph.

    ONNX Runtime's CUDA attention has kernels for float16 and bfloat16 only; with ``cpu`` behind it the CPU computes
    attention.
    """
    found = resolve(runtime, asked)
    if CUDA in found and CPU not in found and not half:
        raise UsageError(
            f"{path} computes with float32, for which ONNX Runtime's CUDA has no attention",
            hint="export with --quant fp16 or int4-fp16, or name cpu behind it to let the CPU compute attention",
        )


def attention_device(session: Any) -> str | None:
    """The device whose memory the cache has to lie in, None for RAM: where attention is computed.

    Past and present of the cache are the same memory. CUDA's attention appends there in place as the CPU's does
    (ONNX Runtime, docs/ContribOperators.md: past and present may be the same tensor). Others are not known to, and
    their answers would be wrong without a word. Raises ``EngineError`` when one of them computes attention.
    """
    device: str | None = None
    for name, count in _kinds(session).items():
        if not count[ATTENTION] or name == CPU:
            continue
        if name != CUDA:
            raise EngineError(
                f"{short_name(name)} would compute {ATTENTION}, and is not known to keep the cache in place",
                hint="use another provider",
            )
        device = "cuda"
    kinds = [count[ATTENTION] for count in _kinds(session).values()]
    if device is not None and sum(map(bool, kinds)) > 1:
        raise EngineError(
            f"CUDA computes {ATTENTION} of some layers only, and the cache has to lie in one place",
            hint="use --provider cpu",
        )
    return device


def _kinds(session: Any) -> dict[str, Counter[str]]:
    """Kinds of nodes by provider; empty where ONNX Runtime is older than 1.24 and does not tell."""
    kinds: dict[str, Counter[str]] = {}
    if hasattr(session, "get_provider_graph_assignment_info"):
        for subgraph in session.get_provider_graph_assignment_info():
            count = kinds.setdefault(subgraph.ep_name, Counter())
            count.update(node.op_type for node in subgraph.get_nodes())
    return kinds


def shares(session: Any) -> str:
    """Which provider computes how many nodes of a session that recorded it, and which kinds are left to the CPU."""
    kinds = _kinds(session)
    if not kinds:
        return ", ".join(session.get_providers())
    total = sum(count.total() for count in kinds.values())
    told = [f"{short_name(name)} {count.total()} of {total} nodes" for name, count in kinds.items()]
    left = kinds.get(CPU)
    if left and len(kinds) > 1:
        told.append("on the CPU " + ", ".join(f"{kind} ({count})" for kind, count in left.most_common(6)))
    return "; ".join(told)
