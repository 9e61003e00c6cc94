"""ONNX Runtime sessions: the library, threads, and what it raises. Shared by all engines over it.

Knows no graphs. Importing this module does not load the library.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.errors import EngineError
from runtime.waiting import Waiting, choose_waiting
from targets.host import default_threads


@dataclass(frozen=True, slots=True)
class SessionThreads:
    """Threads and how they wait for one another."""

    count: int
    waiting: Waiting


def choose_threads(asked: int) -> SessionThreads:
    """Threads of a session, ``asked`` or as the host has cores (0), and how they wait as the machine is now."""
    count = asked or int(default_threads()[0].value)
    return SessionThreads(count, choose_waiting(count))


def load_library() -> Any:
    """The ``onnxruntime`` module. Raises ``EngineError``."""
    try:
        return importlib.import_module("onnxruntime")
    except (ImportError, OSError) as error:
        raise EngineError(f"onnxruntime cannot be imported: {error}", hint="pip install onnxruntime") from error


def runtime_errors(runtime: Any) -> tuple[type[Exception], ...]:
    """Everything that a session raises: ONNX Runtime has a class of exceptions per status, without a common base."""
    state = runtime.capi.onnxruntime_pybind11_state
    own = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError, MemoryError, ValueError)


def open_session(runtime: Any, path: Path, threads: SessionThreads) -> Any:
    """A session on the CPU for a file that was validated. Raises ``EngineError``."""
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads.count
    settings.inter_op_num_threads = 1
    settings.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = 4  # what goes wrong is raised; stderr is not ours to write to
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads.waiting.kind == "spin" else "0")
    # Packed weights are allocated once and never freed: an arena would round each of them up and keep the slack.
    settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    try:
        return runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except runtime_errors(runtime) as error:
        raise EngineError(
            f"ONNX Runtime cannot load {path}: {first_line(error)}",
            hint=f"the graph needs operator sets that onnxruntime {runtime.__version__} may lack; upgrade it",
        ) from error


def first_line(error: Exception) -> str:
    """What an error says first, or its kind."""
    return str(error).strip().splitlines()[0][:500] if str(error).strip() else type(error).__name__
