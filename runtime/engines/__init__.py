"""Implementations of the seams ``runtime.engine.Engine`` and ``runtime.encoder.Encoder``, one module each."""

from __future__ import annotations

from pathlib import Path

from edgelm.errors import UsageError
from runtime.encoder import Encoder, EncoderOptions
from runtime.engine import Engine, EngineOptions


def load_engine(path: Path, options: EngineOptions) -> Engine:
    """Load a model file with the engine of its format: ONNX Runtime for ``.onnx``, llama.cpp for everything else.

    Raises what the engine's own ``load_engine`` raises: ``BundleError``, ``UsageError`` and ``EngineError``.
    """
    if path.suffix == ".onnx":
        from runtime.engines import onnx

        return onnx.load_any_engine(path, options)
    if options.providers:
        raise UsageError(
            f"{path.name} is run by llama.cpp, which has no provider {options.providers[0]}",
            hint="providers are ONNX Runtime's: export with --format onnx",
        )
    from runtime.engines import llamacpp

    return llamacpp.load_engine(path, options)


def load_library(path: Path) -> None:
    """Load the library of the engine that a model file needs, and no model: its memory is not the model's.

    Raises ``EngineError``.
    """
    if path.suffix == ".onnx":
        from runtime.engines import onnx_session

        onnx_session.load_library()
        return
    from runtime.engines import llamacpp

    llamacpp.load_library()


def load_encoder(path: Path, options: EncoderOptions) -> Encoder:
    """Load a model file of an encoder with the engine of its format.

    Raises what the engine's own ``load_encoder`` raises: ``BundleError``, ``UsageError`` and ``EngineError``.
    """
    if path.suffix == ".onnx":
        from runtime.engines import onnx_encoder

        return onnx_encoder.load_encoder(path, options)
    from runtime.engines import llamacpp_encoder

    return llamacpp_encoder.load_encoder(path, options)
