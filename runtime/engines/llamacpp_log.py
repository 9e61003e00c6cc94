"""What llama.cpp says while it works: the latest warnings and errors, and the sizes of the buffers that it announces.

Knows the library's log levels and wording, no models.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

from runtime.engines.llamacpp_devices import buffer_name
from targets.vram import Device

_LOG_WARN, _LOG_ERROR, _LOG_CONTINUE = 3, 4, 5  # enum ggml_log_level

# Buffers that llama.cpp announces while loading: "load_tensors:   CPU_REPACK model buffer size =    56.95 MiB".
_BUFFER = re.compile(r"(\w+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB")


class EngineLog:
    """Keeps llama.cpp's latest warnings and errors instead of letting it write to stderr, and the sizes of buffers."""

    def __init__(self) -> None:
        self.buffers: dict[str, int] = {}
        self.device: Device | None = None  # the GPU whose buffers are not in RAM
        self._lines: deque[tuple[int, str]] = deque(maxlen=24)
        self._level = 0
        self.callback: Any = None

    def receive(self, level: int, text: bytes, _data: object) -> None:
        if level != _LOG_CONTINUE:
            self._level = level
        if self._level not in (_LOG_WARN, _LOG_ERROR):
            self._note_buffer(text)
            return
        line = text.decode("utf-8", "replace").rstrip("\n")
        if level == _LOG_CONTINUE and self._lines:
            self._lines[-1] = (self._level, self._lines[-1][1] + line)
        elif line.strip():
            self._lines.append((self._level, line.strip()))

    def _note_buffer(self, text: bytes) -> None:
        match = _BUFFER.search(text.decode("utf-8", "replace")) if b"buffer size" in text else None
        if match is None:
            return
        place, purpose, mib = match[1], match[2], float(match[3])
        on_device = buffer_name(place, purpose, self.device)
        if on_device is not None:
            name = on_device
        elif purpose == "model":
            name = "weights_mapped" if place.endswith("_Mapped") else "weights_copied"
        else:
            name = {"KV": "kv", "compute": "compute", "output": "compute"}[purpose]
        self.buffers[name] = self.buffers.get(name, 0) + int(mib * 2**20)

    def take(self) -> str:
        """The collected errors in one line, oldest first, or the warnings when there are none; then starts anew."""
        worst = max((level for level, _ in self._lines), default=0)
        text = "; ".join(line for level, line in self._lines if level == worst)
        self._lines.clear()
        return text
