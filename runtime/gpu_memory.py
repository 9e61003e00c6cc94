"""What a loaded model holds in a GPU's memory: by purpose as the engine announced it, and as the driver counts it.

The driver's view is asked of the device itself, before and after loading, and of ``nvidia-smi`` for this process alone,
where there is one. For a running server: what is planned, announced and free while it runs. Knows neither models nor
what should fit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from edgelm.report import DeviceRecord, VramRecord
from runtime.engine import EngineInfo
from targets.vram import Device, OffloadPlan

_QUERY = ("--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
_TIMEOUT_S = 10.0
_KEPT = ("vram_weights", "vram_kv", "vram_compute")


@dataclass(frozen=True, slots=True)
class VramUse:
    """What one model has on a GPU while it runs. Sizes in bytes.

    ``planned_bytes`` are the plan's, ``announced_bytes`` those of the buffers that the engine made. ``free_bytes``
    and ``total_bytes`` are the device's own word now, None where it tells no sizes or does not answer.
    """

    model: str
    device: str
    description: str
    gpu_layers: int
    layers: int
    planned_bytes: int
    announced_bytes: int
    free_bytes: int | None
    total_bytes: int | None

    @property
    def used_bytes(self) -> int | None:
        """What all programs together have taken of the device's memory."""
        if self.free_bytes is None or self.total_bytes is None:
            return None
        return self.total_bytes - self.free_bytes


def vram_use(
    model: str, offload: OffloadPlan | None, buffers: Mapping[str, int], now: Device | None
) -> tuple[VramUse, ...]:
    """What a model has on its GPU, ``now`` as that is at the moment; nothing where the CPU computes all."""
    if offload is None or offload.device is None:
        return ()
    told = now is not None and now.total_bytes > 0
    return (
        VramUse(
            model=model,
            device=offload.device.name,
            description=offload.device.description,
            gpu_layers=offload.gpu_layers,
            layers=offload.most,
            planned_bytes=offload.parts.total_bytes,
            announced_bytes=sum(buffers.get(name, 0) for name in _KEPT),
            free_bytes=now.free_bytes if now is not None and told else None,
            total_bytes=now.total_bytes if now is not None and told else None,
        ),
    )


def device_records(info: EngineInfo) -> tuple[DeviceRecord, ...]:
    """The devices that the engine's build sees, as a report keeps them."""
    return tuple(
        DeviceRecord(
            name=device.name,
            description=device.description,
            backend=device.backend,
            kind=device.kind,
            total_bytes=device.total_bytes,
        )
        for device in info.devices
    )


def vram_record(info: EngineInfo) -> VramRecord | None:
    """What the engine holds on its GPU now, None where nothing is there."""
    plan = info.offload
    if plan is None or plan.device is None:
        return None
    before = plan.device
    after = next((device for device in info.devices if device.name == before.name), before)
    return VramRecord(
        device=before.name,
        weights_bytes=info.buffers.get("vram_weights", 0),
        kv_bytes=info.buffers.get("vram_kv", 0),
        compute_bytes=info.buffers.get("vram_compute", 0),
        predicted_bytes=plan.parts.total_bytes,
        total_bytes=before.total_bytes,
        free_before_bytes=before.free_bytes,
        free_loaded_bytes=after.free_bytes,
        process_bytes=process_vram_bytes(os.getpid()),
    )


def process_vram_bytes(pid: int) -> int | None:
    """GPU memory of one process as NVIDIA's driver counts it; None where ``nvidia-smi`` is missing or does not list it
    (in a container it may know the process by another number)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        told = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_process_bytes(told.stdout, pid) if told.returncode == 0 else None


def parse_process_bytes(text: str, pid: int) -> int | None:
    """Bytes of ``pid`` over all GPUs in lines of ``pid, MiB``; None when it is not listed or no size is told."""
    sizes = []
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == 2 and words[0] == str(pid) and words[1].isdecimal():
            sizes.append(int(words[1]) * 2**20)
    return sum(sizes) if sizes else None
