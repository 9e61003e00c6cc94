"""Implementations of the ``runtime.engine.Engine`` seam, one module each."""

from __future__ import annotations

from pathlib import Path

from runtime.engine import Engine, EngineOptions


def load_engine(path: Path, options: EngineOptions) -> Engine:
    """Load a model file with the engine of its format: ONNX Runtime for ``.onnx``, llama.cpp for everything else.

    Raises what the engine's own ``load_engine`` raises: ``BundleError``, ``UsageError`` and ``EngineError``.
    """
    if path.suffix == ".onnx":
        from runtime.engines import onnx

        return onnx.load_engine(path, options)
    from runtime.engines import llamacpp

    return llamacpp.load_engine(path, options)


def load_library(path: Path) -> None:
    """Load the library of the engine that a model file needs, and no model: its memory is not the model's.

    Raises ``EngineError``.
    """
    if path.suffix == ".onnx":
        from runtime.engines import onnx

        onnx.load_library()
        return
    from runtime.engines import llamacpp

    llamacpp.load_library()
