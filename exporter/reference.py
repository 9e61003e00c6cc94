"""The unquantised model that an artefact is measured against.

With torch and transformers installed it is transformers in float32, on a GPU when torch sees one that holds it, an
implementation that shares nothing with the engine; otherwise the same checkpoint, unquantised, in the engine itself.
The manifest says which. No code from a checkpoint is ever run, and nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from edgelm.bundle import TensorPlan
from edgelm.errors import CheckpointError, DoesNotFitError, MissingDependencyError
from edgelm.progress import Progress
from edgelm.units import format_bytes
from exporter import ggml
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription, TensorDescription
from exporter.checkpoint import Checkpoint, weight_type
from exporter.device import DeviceChoice, exact_float32, memory_errors, resolve_device
from exporter.ggml import Floats
from exporter.gguf import write_gguf
from exporter.tokenizer import read_tokenizer
from runtime.engine import Chunk, Engine, EngineOptions, Logits
from runtime.engines.llamacpp import load_engine
from runtime.engines.llamacpp_inputs import InputSquares
from targets.host import available_memory, default_threads

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
) -> Iterator[ScoringModel]:
    """The reference for a checkpoint with room for ``context`` tokens.

    ``auto`` takes transformers when it is installed, knows the model and its float32 weights fit into memory.
    ``device`` is where transformers computes. Raises ``CheckpointError`` when an explicit choice is impossible,
    ``DoesNotFitError`` when memory or disk is too small, and what ``resolve_device`` raises.
    """
    description = describe(checkpoint, "onnx")  # what the model is, not what llama.cpp can hold
    if choice != "engine":
        obstacle = _transformers_obstacle(checkpoint, description)
        if obstacle is None:
            with _computing(description, device) as place:
                yield _open_transformers(checkpoint, description, place, progress)
            return
        if choice == "transformers" or device == "cuda":
            raise CheckpointError(f"transformers cannot be the reference: {obstacle}")
    with _open_engine(checkpoint, describe(checkpoint), context, progress) as model:
        yield model


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
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers")):
        raise MissingDependencyError("torch and transformers are not installed", hint='pip install "edgelm[export]"')
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
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    needed_bytes, available = _float32_bytes(description) * _OVERHEAD, available_memory()
    if needed_bytes > int(available.value):
        return f"it needs {format_bytes(needed_bytes)} of memory, there are {format_bytes(int(available.value))}"
    if description.dimensions.differing:
        return "its layers differ in width, which transformers cannot load"
    if checkpoint.source.kind == "huggingface":
        part = checkpoint.config.get("text_config")
        for kind in (checkpoint.architecture, part.get("model_type") if isinstance(part, Mapping) else None):
            if isinstance(kind, str) and not _knows(kind):
                return f"the installed version does not know models of type '{kind}'"
    if checkpoint.source.kind == "gguf":
        unknown = [item.name for item in description.tensors if _transformers_name(item.name) is None]
        if description.architecture != "llama" or unknown:
            return f"a GGUF file with {unknown[0] if unknown else description.architecture} is not translated for it"
    return None


def _knows(model_type: str) -> bool:
    with quiet_transformers():
        from transformers import CONFIG_MAPPING

        return model_type in CONFIG_MAPPING


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """As many threads as the host allows, no progress bars and no notes on stderr; all as before afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both warn about their own imports; none of it is the user's
        import torch
        import transformers
    logging = transformers.utils.logging
    threads, verbosity, bars = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    torch.set_num_threads(int(default_threads()[1].value))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _open_transformers(
    checkpoint: Checkpoint, description: ModelDescription, place: str, progress: Progress
) -> TransformersModel:
    import transformers

    return TransformersModel(_load_transformers(checkpoint, description, place, progress), transformers.__version__)


def _load_transformers(checkpoint: Checkpoint, description: ModelDescription, place: str, progress: Progress) -> Any:
    with progress.stage("loading the reference", 1) as stage:
        if checkpoint.source.kind == "gguf":
            model = _llama_from_gguf(checkpoint, description)
        else:
            model = load_directory(checkpoint.source.path, decoder_class(checkpoint.architecture))
        model.eval().to(place)
        stage.advance()
    return model


def decoder_class(model_type: str) -> Any:
    """The class of transformers that loads decoders of a type, some of which also see."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText


def load_directory(directory: Path, kind: Any) -> Any:
    """A model in float32 by a class of transformers: no code of the checkpoint, no pickles, no network.

    Raises ``CheckpointError`` when transformers cannot load it.
    """
    import torch

    try:
        return kind.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load {directory}: {str(error).splitlines()[0]}") from error


# Names in a GGUF of the llama family -> names in transformers, without layer and suffix.
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAME = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.weight")


def _transformers_name(name: str) -> str | None:
    match = _GGUF_NAME.fullmatch(name)
    if match is None:
        return None
    layer, role = match.groups()
    if layer is None:
        return f"{_GLOBAL_NAMES[role]}.weight" if role in _GLOBAL_NAMES else None
    return f"model.layers.{layer}.{_LAYER_NAMES[role]}.weight" if role in _LAYER_NAMES else None


def _llama_from_gguf(checkpoint: Checkpoint, description: ModelDescription) -> Any:
    """The weights of a llama GGUF, dequantised one by one into transformers' own Llama."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(_llama_config(description))
    dimensions = description.dimensions
    names = {name: _transformers_name(name) for name in checkpoint.tensors}
    state = {}
    for name, target in names.items():
        values = checkpoint.load(name)
        if ".attn_q." in name or ".attn_k." in name:
            values = _halves(values, dimensions.head_size)
        state[target] = torch.from_numpy(values)
    if dimensions.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()  # assigned one by one, a tied table would be two parameters, and twice in a GPU's memory
    # Not part of the weights, so still without values: the frequencies, which follow from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def _llama_config(description: ModelDescription) -> Any:
    from transformers import LlamaConfig

    dimensions, metadata = description.dimensions, description.metadata
    return LlamaConfig(
        vocab_size=dimensions.vocabulary,
        hidden_size=dimensions.hidden,
        intermediate_size=dimensions.feed_forward,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.kv_heads,
        head_dim=dimensions.head_size,
        max_position_embeddings=dimensions.context_trained,
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
        tie_word_embeddings=dimensions.tied,
        attn_implementation="eager",
    )


def _halves(rows: Floats, head_size: int) -> Floats:
    """Undo the order of rows in a llama GGUF, where rotation partners are neighbours: two halves per head instead."""
    pairs = rows.reshape(-1, head_size // 2, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


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
        options = EngineOptions(context=context, batch=BATCH, kv_type="f32", all_logits=True)
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


def transformers_name(name: str) -> str | None:
    """The name in transformers of a tensor of a llama GGUF, None when it has none there."""
    return _transformers_name(name)


def module_of(model: Any, checkpoint: Checkpoint, tensor: TensorDescription) -> Any:
    """The module of a transformers model that multiplies by a tensor of the artefact.

    It is called as in the checkpoint, perhaps below another prefix: beside its embedding, so that what a model sees
    with is not taken for what it speaks with. Raises ``CheckpointError``.
    """
    name = tensor.source_name
    if checkpoint.source.kind == "gguf":
        name = transformers_name(tensor.name) or name
    modules, table = dict(model.named_modules()), model.get_input_embeddings()
    beside = next((path for path, module in modules.items() if module is table), "").rpartition(".")[0]
    parts = name.removesuffix(".weight").split(".")
    for start in range(len(parts)):
        path = ".".join(parts[start:])
        for candidate in (path, f"{beside}.{path}"):
            if candidate in modules:
                return modules[candidate]
    raise CheckpointError(f"transformers has no module {'.'.join(parts)}: what {tensor.name} reads cannot be measured")


def torch_obstacle(checkpoint: Checkpoint) -> str | None:
    """Why ``open_torch_model`` cannot open a checkpoint here, None when it can."""
    return transformers_obstacle(checkpoint)


@contextmanager
def open_torch_model(checkpoint: Checkpoint, progress: Progress, *, device: DeviceChoice = "auto") -> Iterator[Any]:
    """The unquantised model as transformers has it, in float32.

    Raises ``CheckpointError`` when it cannot be had, and what ``resolve_device`` raises.
    """
    obstacle = torch_obstacle(checkpoint)
    if obstacle is not None:
        raise CheckpointError(f"transformers cannot compute this model: {obstacle}")
    description = describe(checkpoint, "onnx")
    with _computing(description, device) as place:
        yield _load_transformers(checkpoint, description, place, progress)
