"""The devices that a build of llama.cpp computes on, and telling it which one to use.

Asked of ggml's registry through ctypes: CPU builds answer with one CPU. Knows neither models nor what fits
(``targets.vram``). Asking a CUDA device for its memory makes the driver's context, which takes a moment once.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgelm.errors import EngineError
from targets.vram import Device, DeviceKind

_KINDS: tuple[DeviceKind, ...] = ("cpu", "gpu", "igpu", "accel")  # enum ggml_backend_dev_type
_CPU_BACKENDS = {b"CPU", b"BLAS", b"AMX", b"KleidiAI", b"ZenDNN"}  # registries that bring no GPU
_PLACES = {"model": "weights", "KV": "kv", "compute": "compute"}


@lru_cache(maxsize=1)
def _ggml(llama: str) -> tuple[Any, Any]:
    """ggml's registry and its core, which lie beside libllama and are loaded with it."""
    path = Path(llama)
    registry = ctypes.CDLL(str(path.with_name(path.name.replace("llama", "ggml"))))
    core = ctypes.CDLL(str(path.with_name(path.name.replace("llama", "ggml-base"))))
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    registry.ggml_backend_dev_get.restype = ctypes.c_void_p
    registry.ggml_backend_dev_get.argtypes = (ctypes.c_size_t,)
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description", "ggml_backend_reg_name"):
        getattr(core, name).restype = ctypes.c_char_p
        getattr(core, name).argtypes = (ctypes.c_void_p,)
    core.ggml_backend_dev_type.restype = ctypes.c_int
    core.ggml_backend_dev_type.argtypes = (ctypes.c_void_p,)
    core.ggml_backend_dev_backend_reg.restype = ctypes.c_void_p
    core.ggml_backend_dev_backend_reg.argtypes = (ctypes.c_void_p,)
    registry.ggml_backend_reg_count.restype = ctypes.c_size_t
    registry.ggml_backend_reg_get.restype = ctypes.c_void_p
    registry.ggml_backend_reg_get.argtypes = (ctypes.c_size_t,)
    size = ctypes.POINTER(ctypes.c_size_t)
    core.ggml_backend_dev_memory.restype = None
    core.ggml_backend_dev_memory.argtypes = (ctypes.c_void_p, size, size)
    return registry, core


def find_devices(library: Any) -> tuple[Device, ...]:
    """All devices of this build, in llama.cpp's order, with the memory that is free now. ``library`` is the
    ``llama_cpp.llama_cpp`` module."""
    registry, core = _ggml(library._lib._name)
    return tuple(_device(core, handle) for handle in _handles(registry))


def device_now(library: Any, device: Device | None) -> Device | None:
    """A device with the memory that is free there now; None when it is None or gone."""
    if device is None:
        return None
    return next((found for found in find_devices(library) if found.name == device.name), None)


def can_offload(library: Any) -> bool:
    """Whether this build can use a GPU at all, present or not."""
    registry, core = _ggml(library._lib._name)
    names = {core.ggml_backend_reg_name(registry.ggml_backend_reg_get(index)) for index in _registered(registry)}
    return bool(library.llama_supports_gpu_offload()) or bool(names - _CPU_BACKENDS)


def _registered(registry: Any) -> range:
    return range(registry.ggml_backend_reg_count())


def _handles(registry: Any) -> list[int]:
    return [registry.ggml_backend_dev_get(index) for index in range(registry.ggml_backend_dev_count())]


def _device(core: Any, handle: int) -> Device:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    core.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    kind = core.ggml_backend_dev_type(handle)
    return Device(
        name=core.ggml_backend_dev_name(handle).decode("utf-8", "replace"),
        description=core.ggml_backend_dev_description(handle).decode("utf-8", "replace"),
        backend=core.ggml_backend_reg_name(core.ggml_backend_dev_backend_reg(handle)).decode("utf-8", "replace"),
        kind=_KINDS[kind] if 0 <= kind < len(_KINDS) else "accel",
        free_bytes=free.value,
        total_bytes=total.value,
    )


def place_layers(library: Any, parameters: Any, device: Device | None, gpu_layers: int) -> Any:
    """Let a model be loaded with ``gpu_layers`` on ``device`` and the rest with the CPU, or all with the CPU.

    Without this a build for GPUs puts everything on all of them. Returns what has to live until the model is loaded.
    Raises ``EngineError`` for a device that is gone.
    """
    registry, core = _ggml(library._lib._name)
    wanted = None if device is None else device.name.encode()
    chosen = [handle for handle in _handles(registry) if core.ggml_backend_dev_name(handle) == wanted]
    if device is not None and not chosen:
        raise EngineError(f"the GPU {device.name} is no longer there", hint="use --gpu-layers auto")
    # A list that ends at once means no GPU at all: not for layers, and not for long prompts of the CPU's layers either.
    listed = (ctypes.c_void_p * (len(chosen) + 1))(*chosen, None)
    parameters.devices = ctypes.cast(listed, ctypes.c_void_p)
    parameters.n_gpu_layers = gpu_layers if chosen else 0
    parameters.split_mode = library.LLAMA_SPLIT_MODE_LAYER
    return listed


def buffer_name(place: str, purpose: str, device: Device | None) -> str | None:
    """Under which name a buffer counts that llama.cpp announces, when it lies in the memory of ``device``.

    ``place`` is the name of the buffer's type: a device's own, ``CUDA0`` or ``MTL0_Private``; ``CUDA_Host`` is RAM.
    """
    if device is None or purpose not in _PLACES or not (place == device.name or place.startswith(f"{device.name}_")):
        return None
    return f"vram_{_PLACES[purpose]}"
