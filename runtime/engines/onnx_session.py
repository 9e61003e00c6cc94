"""ONNX Runtime sessions: the library, threads, and what it raises. Shared by all engines over it.

Knows no graphs. Importing this module does not load the library.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.errors import EngineError
from runtime.engines import onnx_providers
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
    return SessionThreads(count, choose_waiting(count, sleeps=True))


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


def open_session(runtime: Any, path: Path, threads: SessionThreads, asked: Sequence[str] = ()) -> Any:
    """A session for a file that was validated, on the providers that are ``asked`` for, the CPU when none is.

    Raises ``EngineError``, and ``UsageError`` for a provider that is not installed.
    """
    providers = onnx_providers.resolve(runtime, asked)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads.count
    settings.inter_op_num_threads = 1
    settings.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = 4  # what goes wrong is raised; stderr is not ours to write to
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads.waiting.kind == "spin" else "0")
    # Packed weights are allocated once and never freed: an arena would round each of them up and keep the slack.
    settings.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if asked:
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if onnx_providers.CPU not in providers:
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        # Without this the library answers a failure by a session on other providers, and a word on stdout.
        session = runtime.InferenceSession(
            str(path), settings, providers=onnx_providers.with_options(providers, threads.count), enable_fallback=0
        )
    except runtime_errors(runtime) as error:
        raise EngineError(
            f"ONNX Runtime cannot load {path}: {first_line(error)}", hint=_hint(runtime, providers, error)
        ) from error
    missing = [name for name in providers if name not in session.get_providers()]
    if missing:
        short = onnx_providers.short_name(missing[0])
        raise EngineError(
            f"{short} is installed but does not start here: ONNX Runtime left it out",
            hint="its driver or libraries are missing or of another version",
        )
    return session


def _hint(runtime: Any, providers: Sequence[str], error: Exception) -> str:
    if "fallback to CPU EP" in str(error):
        return "name cpu behind the provider, so that the CPU computes what it cannot"
    if providers != (onnx_providers.CPU,):
        return "the provider cannot take this graph or does not start here: use another, or export with another --quant"
    return f"the graph needs operator sets that onnxruntime {runtime.__version__} may lack; upgrade it"


def describe(session: Any, threads: SessionThreads, asked: Sequence[str]) -> str:
    """Providers, threads and how they wait, in one line."""
    told = ", ".join(session.get_providers()[:1]) if not asked else onnx_providers.shares(session)
    return f"{told}, {threads.count} threads, {threads.waiting.reason}"


def first_line(error: Exception) -> str:
    """What an error says first, or its kind."""
    return str(error).strip().splitlines()[0][:500] if str(error).strip() else type(error).__name__
