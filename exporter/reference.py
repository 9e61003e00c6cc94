"""The unquantised model that an artefact is measured against.

With torch and transformers installed it is transformers in float32, on a GPU when torch sees one that holds it, layer
by layer where memory does not hold all of it: an implementation that shares nothing with the engine. Otherwise it is
the same checkpoint, unquantised, in the engine itself.
The manifest says which. No code from a checkpoint is ever run, and nothing is downloaded.
"""

from __future__ import annotations

import inspect
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from edgelm.bundle import TensorPlan
from edgelm.errors import CheckpointError, DoesNotFitError
from edgelm.progress import Progress
from edgelm.units import format_bytes
from exporter import ggml
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription, TensorDescription
from exporter.checkpoint import Checkpoint, weight_type
from exporter.device import DeviceChoice, exact_float32, memory_errors, resolve_device
from exporter.gguf import write_gguf
from exporter.layerwise import layers_obstacle, open_layerwise_scoring
from exporter.packages import require
from exporter.tokenizer import read_tokenizer
from exporter.transformers_model import (
    decoder_class,
    llama_from_gguf,
    load_directory,
    loading_obstacle,
    quiet_transformers,
)
from runtime.engine import Chunk, Engine, EngineOptions, Logits
from runtime.engines.llamacpp import load_engine
from runtime.engines.llamacpp_inputs import InputSquares
from targets.host import available_memory

BATCH = 128
"""Tokens per step of either model: their logits and those of the artefact are in memory at the same time."""
ReferenceChoice = Literal["auto", "transformers", "engine"]
_FLOAT32_BYTES = 4
_OVERHEAD = 1.15  # activations, caches and the allocator, over the weights


class ScoringModel(Protocol):
    """Reads tokens and tells the logits after each of them."""

    @property
    def name(self) -> str:
        """What the manifest shows."""
        ...

    @property
    def vocabulary(self) -> int:
        """Length of a row of logits."""
        ...

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def append(self, tokens: Sequence[int]) -> Logits:
        """Read tokens after those read before; logits (tokens, vocabulary), valid until the next call."""
        ...


class EngineModel:
    """An engine with ``all_logits`` as a ``ScoringModel``. The engine stays its owner's to close."""

    def __init__(self, engine: Engine, name: str = "") -> None:
        self._engine = engine
        self.name = name or engine.info.engine
        self.vocabulary = engine.info.vocabulary

    def reset(self) -> None:
        self._engine.truncate(0)

    def append(self, tokens: Sequence[int]) -> Logits:
        return self._engine.forward([Chunk(0, tokens, "all")])


class TransformersModel:
    """A transformers causal language model in float32 as a ``ScoringModel``, its keys and values cached.

    Models with short convolutions compute all tokens again every time: after the first call their state takes one token
    only (transformers 4.57; with more the logits are wrong without a word). So do models that give no cache back (dense
    Granite 4 there).
    """

    def __init__(self, model: Any, version: str) -> None:
        self.model = model
        self._cached = not hasattr(model.config.get_text_config(), "conv_L_cache")
        self._cache_name = cache_name(model)
        self._cache: Any = None
        self._held: list[int] = []
        self.name = reference_name(model, version)
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    def reset(self) -> None:
        self._cache = None
        self._held = []

    def append(self, tokens: Sequence[int]) -> Logits:
        import torch

        self._held += tokens
        with torch.inference_mode():
            ids = torch.tensor([list(tokens) if self._cached else self._held], device=self.model.device)
            output = self.model(ids, use_cache=self._cached, **{self._cache_name: self._cache})
        self._cache = output.get(self._cache_name) if self._cached else None
        self._cached = self._cache is not None
        logits: Logits = output.logits[0, -len(tokens) :].float().cpu().numpy()
        return logits


def cache_name(model: Any) -> str:
    """What a transformers model calls keys and values, given and returned: transformers 5 has another name for them."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def reference_name(model: Any, version: str) -> str:
    """What the manifest calls a transformers model, the GPU that it is on included."""
    if model.device.type != "cuda":
        return f"transformers {version} float32"
    import torch

    return f"transformers {version} float32 on {torch.cuda.get_device_name(model.device)}"


@contextmanager
def open_reference(
    checkpoint: Checkpoint,
    context: int,
    choice: ReferenceChoice,
    progress: Progress,
    *,
    device: DeviceChoice = "auto",
    windows: Sequence[Sequence[int]] = (),
) -> Iterator[ScoringModel]:
    """The reference for a checkpoint with room for ``context`` tokens.

    ``auto`` takes transformers when it is installed and knows the model. Where its float32 weights do not fit into
    memory it computes ``windows`` layer by layer; that needs to know all that will be read. ``device`` is where
    transformers computes. Raises ``CheckpointError`` when an explicit choice is impossible, ``DoesNotFitError`` when
    memory or disk is too small, and what ``resolve_device`` raises.
    """
    description = describe(checkpoint, "onnx")  # what the model is, not what llama.cpp can hold
    if choice != "engine":
        obstacle = _transformers_obstacle(checkpoint, description)
        if obstacle is None:
            with _computing(description, device) as place:
                yield _open_transformers(checkpoint, description, place, progress)
            return
        if windows and layers_obstacle(checkpoint, description, available_memory()) is None:
            with open_layerwise_scoring(checkpoint, windows, progress, device=device) as model:
                yield model
            return
        if choice == "transformers" or device == "cuda":
            raise CheckpointError(f"transformers cannot be the reference: {obstacle}")
    with _open_engine(checkpoint, describe(checkpoint), context, progress) as in_engine:
        yield in_engine


# --- transformers


@contextmanager
def _computing(description: ModelDescription, device: DeviceChoice) -> Iterator[str]:
    """Where torch computes a model inside: quietly, in float32 that no GPU shortens, its lack of memory an error of
    ours. Raises what ``resolve_device`` raises."""
    with quiet_transformers(), exact_float32():
        place = str(resolve_device(device, _float32_bytes(description) * _OVERHEAD).value)
        if place == "cpu":
            yield place
            return
        with memory_errors("this model on the GPU", "use --device cpu"):
            yield place


@contextmanager
def open_transformers(checkpoint: Checkpoint, progress: Progress, *, device: DeviceChoice = "auto") -> Iterator[Any]:
    """The checkpoint as a transformers model in float32, for whoever needs to look inside while it computes.

    Raises ``MissingDependencyError`` or ``CheckpointError`` when transformers cannot compute it here, and what
    ``resolve_device`` raises.
    """
    description = describe(checkpoint, "onnx")
    require("torch", "transformers")
    obstacle = _transformers_obstacle(checkpoint, description)
    if obstacle is not None:
        raise CheckpointError(f"transformers cannot compute {checkpoint.source.location}: {obstacle}")
    with _computing(description, device) as place:
        yield _load_transformers(checkpoint, description, place, progress)


@contextmanager
def open_transformers_encoder(
    checkpoint: Checkpoint, progress: Progress, *, device: DeviceChoice = "auto"
) -> Iterator[tuple[str, Any]]:
    """What the manifest calls it, and a checkpoint of an encoder as a transformers model in float32 without head.

    Raises ``CheckpointError`` when transformers cannot compute it here, and what ``resolve_device`` raises.
    """
    obstacle = transformers_obstacle(checkpoint)
    if obstacle is not None:
        raise CheckpointError(f"transformers cannot be the reference: {obstacle}")
    with _computing(describe(checkpoint, "onnx"), device) as place:
        import transformers

        with progress.stage("loading the reference", 1) as stage:
            model = load_directory(checkpoint.source.path, transformers.AutoModel).eval().to(place)
            stage.advance()
        yield reference_name(model, transformers.__version__), model


def transformers_obstacle(checkpoint: Checkpoint) -> str | None:
    """Why transformers cannot compute a checkpoint here, None when it can."""
    return _transformers_obstacle(checkpoint, describe(checkpoint, "onnx"))


def _transformers_obstacle(checkpoint: Checkpoint, description: ModelDescription) -> str | None:
    """Why transformers cannot compute this checkpoint here, None when it can."""
    obstacle = loading_obstacle(checkpoint, description)
    if obstacle is not None:
        return obstacle
    needed_bytes, available = _float32_bytes(description) * _OVERHEAD, available_memory()
    if needed_bytes > int(available.value):
        return f"it needs {format_bytes(needed_bytes)} of memory, there are {format_bytes(int(available.value))}"
    return None


def _open_transformers(
    checkpoint: Checkpoint, description: ModelDescription, place: str, progress: Progress
) -> TransformersModel:
    import transformers

    return TransformersModel(_load_transformers(checkpoint, description, place, progress), transformers.__version__)


def _load_transformers(checkpoint: Checkpoint, description: ModelDescription, place: str, progress: Progress) -> Any:
    with progress.stage("loading the reference", 1) as stage:
        if checkpoint.source.kind == "gguf":
            model = llama_from_gguf(checkpoint, description)
        else:
            model = load_directory(checkpoint.source.path, decoder_class(checkpoint.architecture))
        model.eval().to(place)
        stage.advance()
    return model


# --- the engine


@contextmanager
def unquantised_file(
    checkpoint: Checkpoint, description: ModelDescription, progress: Progress
) -> Iterator[tuple[Path, str]]:
    """The checkpoint unquantised as a temporary GGUF and the name of its types: F32 when that fits, else the source's.

    Raises ``DoesNotFitError``.
    """
    with tempfile.TemporaryDirectory(prefix="edgelm-reference-") as directory:
        plans, kind = _reference_plans(checkpoint, description, Path(directory))
        path = Path(directory) / "reference.gguf"
        metadata = {
            **description.metadata,
            "general.file_type": 0,
            **read_tokenizer(checkpoint).gguf_metadata,
        }
        write_gguf(path, checkpoint, description.tensors, plans, metadata, progress=progress)
        yield path, kind


@contextmanager
def _open_engine(
    checkpoint: Checkpoint, description: ModelDescription, context: int, progress: Progress
) -> Iterator[ScoringModel]:
    with _engine_and_type(checkpoint, description, context, None, progress) as (engine, kind):
        yield EngineModel(engine, f"{engine.info.engine} {kind}")


@contextmanager
def open_observed_engine(
    checkpoint: Checkpoint, context: int, observer: InputSquares, progress: Progress
) -> Iterator[Engine]:
    """The unquantised model in the engine, its matrices' inputs seen by ``observer``. Raises ``DoesNotFitError``."""
    with _engine_and_type(checkpoint, describe(checkpoint), context, observer, progress) as (engine, _):
        yield engine


@contextmanager
def _engine_and_type(
    checkpoint: Checkpoint,
    description: ModelDescription,
    context: int,
    observer: InputSquares | None,
    progress: Progress,
) -> Iterator[tuple[Engine, str]]:
    with unquantised_file(checkpoint, description, progress) as (path, kind):
        options = EngineOptions(context=context, batch=BATCH, kv_type="f32", all_logits=True, flash_attention="on")
        engine = load_engine(path, options, observer)
        try:
            yield engine, kind
        finally:
            engine.close()


def _reference_plans(
    checkpoint: Checkpoint, description: ModelDescription, directory: Path
) -> tuple[list[TensorPlan], str]:
    """Storage of every tensor and its name: ``F32``, or the source's types when F32 fits neither memory nor disk."""
    free_bytes = min(int(available_memory().value), shutil.disk_usage(directory).free)
    own = {item.name: _own_type(checkpoint, item) for item in description.tensors}
    largest = max(description.tensors, key=lambda item: math.prod(item.shape))
    for types, kind in ((dict.fromkeys(own, "F32"), "F32"), (own, own[largest.name])):
        plans = [
            TensorPlan(
                name=item.name,
                source_name=item.source_name,
                shape=item.shape,
                type=types[item.name],
                size_bytes=ggml.TYPES[types[item.name]].row_bytes(item.shape[-1]) * math.prod(item.shape[:-1]),
                reason="unquantised reference",
            )
            for item in description.tensors
        ]
        needed_bytes = sum(plan.size_bytes for plan in plans) * _OVERHEAD
        if needed_bytes <= free_bytes:
            return plans, kind
    raise DoesNotFitError(
        f"the unquantised reference needs {format_bytes(needed_bytes)} of memory and disk, "
        f"{format_bytes(free_bytes)} are free",
        hint="prove it on a larger machine, or export with --no-verify",
    )


def _own_type(checkpoint: Checkpoint, item: TensorDescription) -> str:
    if item.values is not None or len(item.shape) < 2:
        return "F32"  # llama.cpp wants vectors in F32
    return weight_type(checkpoint.tensors[item.source_name])


def _float32_bytes(description: ModelDescription) -> int:
    return _FLOAT32_BYTES * sum(math.prod(item.shape) for item in description.tensors)


# --- for what else looks inside


def torch_obstacle(checkpoint: Checkpoint) -> str | None:
    """Why ``open_torch_model`` cannot open a checkpoint here, None when it can."""
    return transformers_obstacle(checkpoint)


@contextmanager
def open_torch_model(checkpoint: Checkpoint, progress: Progress, *, device: DeviceChoice = "auto") -> Iterator[Any]:
    """The unquantised model as transformers has it, in float32.

    Raises ``MissingDependencyError`` and ``CheckpointError`` when it cannot be had, and what ``resolve_device`` raises.
    """
    require("torch", "transformers")
    obstacle = torch_obstacle(checkpoint)
    if obstacle is not None:
        raise CheckpointError(f"transformers cannot compute this model: {obstacle}")
    description = describe(checkpoint, "onnx")
    with _computing(description, device) as place:
        yield _load_transformers(checkpoint, description, place, progress)
