"""What a loaded model holds in a GPU's memory: by purpose as the engine announced it, and as the driver counts it.

The driver's view is asked of the device itself, before and after loading, and of ``nvidia-smi`` for this process alone,
where there is one. Knows neither models nor what should fit.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from edgelm.report import DeviceRecord, VramRecord
from runtime.engine import EngineInfo

_QUERY = ("--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
_TIMEOUT_S = 10.0


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
