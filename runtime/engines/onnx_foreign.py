"""ONNX decoders that others exported: an optimum export with KV cache, a folder of onnxruntime-genai's layout.

Both know ``input_ids``, ``attention_mask`` and perhaps ``position_ids``, ``past_key_values.N.key`` and ``.value``, and
answer with ``logits`` of all positions and the grown caches ``present.N.*``, which are handed back with the next
tokens. What the caches hold is copied at every step, and each sequence is computed alone: such files run and can be
measured, those that EdgeLM exports run fast. Any other input is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import BundleError, EngineError, UsageError
from runtime.engine import Chunk, EngineInfo, EngineInterruptedError, EngineOptions, Logits, check_chunks
from runtime.onnx_header import FLOAT, INT64, OnnxModel, OnnxValue

Floats = npt.NDArray[np.float32]
_STEP = 128
DEFAULT_CONTEXT = 4096
_PAST = re.compile(r"past_key_values\.([0-9]{1,4})\.(key|value)")
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
_CONFIG_LIMIT_BYTES = 2**24
_CONTEXT_KEYS = ("context_length", "max_position_embeddings", "n_positions")


@dataclass(frozen=True, slots=True)
class ForeignGraph:
    """What a graph takes. ``heads`` per layer; ``context_trained`` None: nothing beside the file tells."""

    token_inputs: tuple[str, ...]
    heads: tuple[int, ...]
    head_size: int
    vocabulary: int
    context_trained: int | None
    parameters: int
    weights_bytes: int


def understand(path: Path, model: OnnxModel) -> ForeignGraph:
    """What the inputs and outputs of a graph mean. Raises ``BundleError`` naming those that are not understood."""
    inputs = {value.name: value for value in model.inputs}
    odd = [name for name in inputs if name not in _TOKEN_INPUTS and not _PAST.fullmatch(name)]
    layers = len([name for name in inputs if name.startswith("past_key_values.") and name.endswith(".key")])
    if odd or not layers or not {"input_ids", "attention_mask"} <= set(inputs):
        what = f"it has the inputs {', '.join(odd)[:300]}" if odd else "it keeps no cache of keys and values"
        raise BundleError(
            f"{path} is no decoder that EdgeLM can run: {what}; its inputs are {', '.join(inputs)[:300]}",
            hint="what is understood: input_ids, attention_mask, position_ids, past_key_values.N.key and .value; or "
            "export the checkpoint with: edgelm export SOURCE --format onnx",
        )
    outputs = {value.name: value for value in model.outputs}
    caches = [_cache(path, inputs, outputs, index) for index in range(layers)]
    for name in _TOKEN_INPUTS:
        if name in inputs and (inputs[name].type != INT64 or len(inputs[name].shape or ()) != 2):
            raise BundleError(f"{path}: its input {name} is not a batch of int64 numbers")
    vocabulary = _vocabulary(path, outputs)
    sizes = {size for _, size in caches}
    if len(sizes) != 1:
        raise BundleError(f"{path}: its caches have heads of {sorted(sizes)}, one size is understood")
    places = {item.external or item.name: item for item in model.initializers}
    return ForeignGraph(
        token_inputs=tuple(name for name in _TOKEN_INPUTS if name in inputs),
        heads=tuple(heads for heads, _ in caches),
        head_size=sizes.pop(),
        vocabulary=vocabulary,
        context_trained=_trained(path.parent),
        parameters=sum(prod(item.shape) for item in places.values() if len(item.shape) > 1),
        weights_bytes=sum(item.size_bytes for item in places.values()),
    )


def _cache(
    path: Path, inputs: Mapping[str, OnnxValue], outputs: Mapping[str, OnnxValue], index: int
) -> tuple[int, int]:
    """Heads and head size of a layer's cache."""
    for part in ("key", "value"):
        value = inputs.get(f"past_key_values.{index}.{part}")
        if value is None or f"present.{index}.{part}" not in outputs:
            raise BundleError(f"{path}: past_key_values.{index}.{part} or its present.{index}.{part} is missing")
        if value.type != FLOAT:
            raise BundleError(f"{path}: its cache {value.name} is not float32, which is what CPUs compute with")
    shape = inputs[f"past_key_values.{index}.key"].shape or ()
    heads, size = (shape[1], shape[3]) if len(shape) == 4 else (None, None)
    if not isinstance(heads, int) or not isinstance(size, int) or not (0 < heads < 2**16 and 0 < size < 2**16):
        raise BundleError(f"{path}: past_key_values.{index}.key does not state its heads and their size")
    return heads, size


def _vocabulary(path: Path, outputs: Mapping[str, OnnxValue]) -> int:
    logits = outputs.get("logits")
    words = logits.shape[-1] if logits is not None and logits.shape else None
    if isinstance(words, int) and 0 < words < 2**31:
        return words
    for table in _configs(path.parent):
        count = table.get("vocab_size")
        if isinstance(count, int) and 0 < count < 2**31:
            return count
    raise BundleError(f"{path} has no output logits that states how many words there are")


def _trained(directory: Path) -> int | None:
    for table in _configs(directory):
        for key in _CONTEXT_KEYS:
            if isinstance(table.get(key), int) and 0 < table[key] < 2**31:
                return int(table[key])
    return None


def foreign_context(directory: Path) -> int:
    """The context to open a model with when none was asked for: the trained one, at most ``DEFAULT_CONTEXT``."""
    return min(_trained(directory) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def _configs(directory: Path) -> list[dict[str, Any]]:
    """The tables of genai_config.json and config.json beside a graph, as far as they are there."""
    found = []
    for name in ("genai_config.json", "config.json"):
        path = directory / name
        if path.is_file() and path.stat().st_size <= _CONFIG_LIMIT_BYTES:
            try:
                table = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise BundleError(f"{path} is no JSON: {error}") from error
            table = table.get("model", table) if isinstance(table, dict) else {}
            found.append(table if isinstance(table, dict) else {})
    return found


def end_tokens(directory: Path) -> frozenset[int]:
    """Ids that end an answer, from the configurations beside a graph."""
    ids: list[Any] = []
    for table in _configs(directory):
        value = table.get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
    return frozenset(item for item in ids if isinstance(item, int) and item >= 0)


def check_foreign_options(options: EngineOptions, graph: ForeignGraph, path: Path) -> None:
    """Refuse a context that the model was not trained for. Raises ``UsageError``."""
    if graph.context_trained is not None and options.context > graph.context_trained:
        raise UsageError(f"--context {options.context} is more than the {graph.context_trained} that {path.name} takes")


class ForeignOnnxEngine:
    """``runtime.engine.Engine`` over a session whose caches grow. Not thread-safe, except for ``interrupt``."""

    def __init__(
        self,
        session: Any,
        run_options: Any,
        errors: tuple[type[Exception], ...],
        info: EngineInfo,
        graph: ForeignGraph,
        options: EngineOptions,
    ) -> None:
        self.session: Any = session
        self._run_options, self._errors = run_options, errors
        self._info, self._graph = info, graph
        self._caches: list[list[Floats]] = [self._empty() for _ in range(info.sequences)]
        self._names = [f"{layer}.{part}" for layer in range(len(graph.heads)) for part in ("key", "value")]
        self._options = options
        self._interrupted = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    def _empty(self) -> list[Floats]:
        size = self._graph.head_size
        return [np.zeros((1, heads, 0, size), np.float32) for heads in self._graph.heads for _ in "kv"]

    def forward(self, chunks: Sequence[Chunk]) -> Logits:
        """See ``Engine.forward``. Chunks are computed in turn."""
        if self.session is None:
            raise EngineError("the engine is closed")
        check_chunks(self, chunks, self._options)
        self._interrupted = self._run_options.terminate = False
        before = {chunk.sequence: self._caches[chunk.sequence] for chunk in chunks}
        rows = [np.empty((0, self._info.vocabulary), np.float32)]
        try:
            for chunk in chunks:
                found = self._append(chunk)
                rows.append({"none": found[:0], "last": found[-1:], "all": found}[chunk.logits])
        except self._errors as error:
            interrupted = self._interrupted
            for sequence, caches in before.items():
                self._caches[sequence] = caches if interrupted else self._empty()
            if interrupted:
                raise EngineInterruptedError("the computation was interrupted") from error
            raise EngineError(f"ONNX Runtime failed to compute: {str(error).strip()[:500]}") from error
        return np.concatenate(rows)

    def _append(self, chunk: Chunk) -> Floats:
        """Logits of the tokens of a chunk, of the last step only where not all are wanted."""
        tokens = np.asarray(chunk.tokens, np.int64)[None, :]
        kept: list[Floats] = []
        for start in range(0, tokens.shape[1], _STEP):
            piece = tokens[:, start : start + _STEP]
            held = self.length(chunk.sequence)
            total = held + piece.shape[1]
            values = {
                "input_ids": piece,
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(held, total, dtype=np.int64)[None, :],
            }
            feed = {name: values[name] for name in self._graph.token_inputs}
            feed |= {
                f"past_key_values.{name}": cache
                for name, cache in zip(self._names, self._caches[chunk.sequence], strict=True)
            }
            wanted = ["logits", *(f"present.{name}" for name in self._names)]
            logits, *caches = self.session.run(wanted, feed, self._run_options)
            if any(cache.shape[2] != total for cache in caches):
                raise EngineError(f"the graph answered with caches of {caches[0].shape[2]} tokens instead of {total}")
            self._caches[chunk.sequence] = caches
            kept = [*kept, logits[0]] if chunk.logits == "all" else [logits[0]]
        return np.concatenate(kept)

    def length(self, sequence: int = 0) -> int:
        if not 0 <= sequence < len(self._caches):
            raise EngineError(f"there is no sequence {sequence}: the engine keeps {len(self._caches)}")
        return int(self._caches[sequence][0].shape[2])

    def truncate(self, length: int, sequence: int = 0) -> None:
        held = self.length(sequence)
        if not 0 <= length <= held:
            raise EngineError(f"cannot truncate sequence {sequence} of {held} tokens to {length}")
        if length < held:
            self._caches[sequence] = [np.ascontiguousarray(cache[:, :, :length]) for cache in self._caches[sequence]]

    def interrupt(self) -> None:
        """See ``Engine.interrupt``. Takes effect before the next operator of the graph."""
        self._interrupted = True
        self._run_options.terminate = True

    def close(self) -> None:
        self._caches = []
        self.session = None
