"""A decoder that is computed with the float32 weights of one layer in memory at a time.

transformers builds the model without weights and computes every part of it; weights come from the checkpoint when a
part is needed and go when it is done. All windows of a text go through one layer before the next one is read. What is
computed is what the whole model computes, bit by bit, so models that fit into memory need none of this. Needs torch and
transformers; knows neither statistics nor types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from edgelm.bundle import Choice
from edgelm.errors import CheckpointError
from edgelm.progress import Progress
from edgelm.units import format_bytes
from exporter.architectures import describe
from exporter.architectures.base import ModelDescription
from exporter.checkpoint import Checkpoint
from exporter.device import DeviceChoice, exact_float32, memory_errors, resolve_device
from exporter.transformers_model import (
    decoder_class,
    decoder_layers,
    llama_config,
    load_weight,
    loading_obstacle,
    quiet_transformers,
    text_prefix,
    transformers_name,
)
from runtime.engine import Logits


@dataclass(frozen=True)
class Sizes:
    """Bytes of the largest layer and of the larger of embedding and head, in float32."""

    layer_bytes: int
    table_bytes: int


_PROGRAM_BYTES = 2 * 10**9  # torch, transformers, and the engine that the logits are compared with


class _Stop(Exception):  # noqa: N818  (not an error: what was looked for has been seen)
    pass


@dataclass
class _Call:
    """How the model calls a layer, beside its hidden states."""

    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Weight:
    """A parameter: every place that holds it (a tied head holds the embedding's), and its tensor in the checkpoint."""

    path: str
    places: tuple[tuple[Any, str], ...]
    source: str


class LayerwiseModel:
    """A transformers model whose weights come and go. Hidden states are (1, tokens, columns), windows of one length.

    Gradients follow torch's own switch: inside ``torch.no_grad`` nothing is kept for them.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, description: ModelDescription, place: str) -> None:
        self.model, self.place = model, place
        self._checkpoint, self._head_size = checkpoint, description.dimensions.head_size
        self._weights = _weights(model, checkpoint, description)
        self.layers = list(decoder_layers(model))
        self.table, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self._calls = [_Call() for _ in self.layers]
        self._in_tuple = False
        outside = {id(module) for part in (*self.layers, self.table, self.head) for module in part.modules()}
        self._small = [
            weight for weight in self._weights if not any(id(owner) in outside for owner, _ in weight.places)
        ]

    @property
    def sizes(self) -> Sizes:
        """What has to be in memory at least."""
        layers = [self._size_bytes(self._of(layer)) for layer in self.layers]
        return Sizes(max(layers), max(self._size_bytes(self._of(part)) for part in (self.table, self.head)))

    @contextmanager
    def hold(self, part: Any) -> Iterator[None]:
        """The weights of a module are there inside."""
        with self._held(self._of(part)):
            yield

    @contextmanager
    def hold_small(self) -> Iterator[None]:
        """What belongs neither to a layer nor to embedding and head is there inside: norms, learned positions."""
        with self._held(self._small):
            yield

    def ids(self, window: Sequence[int]) -> Any:
        """Token ids (1, tokens) where the model computes."""
        import torch

        return torch.tensor([list(window)], device=self.place)

    def look(self, embedded: Any) -> None:
        """See how the model calls its layers for windows of this length; nothing but the first layer is computed."""
        import torch

        seen: list[Any] = []

        def note_answer(_module: Any, _arguments: Any, answer: Any) -> None:
            seen.append(answer)
            raise _Stop

        with torch.no_grad(), self.hold(self.layers[0]):
            self._run(embedded, [self.layers[0].register_forward_hook(note_answer)])
        self._in_tuple = isinstance(seen[0], tuple)

        def noting(call: _Call) -> Callable[[Any, Any, Any], None]:
            def note(_module: Any, arguments: Any, named: Any) -> None:
                call.arguments = tuple(arguments[1:])
                call.named = {name: value for name, value in named.items() if name != "hidden_states"}

            return note

        pairs = zip(self.layers, self._calls, strict=True)
        hooks = [layer.register_forward_pre_hook(noting(call), with_kwargs=True) for layer, call in pairs]
        with torch.no_grad(), self._answering(embedded):
            self._run(embedded, [*hooks, self.head.register_forward_pre_hook(_stop)])

    def enter(self, embedded: Any) -> Any:
        """What the first layer reads of embedded tokens (1, tokens, columns)."""
        seen: list[Any] = []

        def keep(_module: Any, arguments: Any, named: Any) -> None:
            seen.append(arguments[0] if arguments else named["hidden_states"])
            raise _Stop

        self._run(embedded, [self.layers[0].register_forward_pre_hook(keep, with_kwargs=True)])
        return seen[0]

    def apply(self, index: int, state: Any) -> Any:
        """What a layer that is held makes of hidden states. ``look`` came before."""
        call = self._calls[index]
        answer = self.layers[index](state, *call.arguments, **call.named)
        return answer[0] if self._in_tuple else answer

    def leave(self, state: Any) -> Any:
        """Logits (1, tokens, vocabulary) of what the last layer gave; the head is held."""
        with self._answering(state):
            return self.model(inputs_embeds=state.detach(), use_cache=False).logits

    def through(self, windows: Sequence[Sequence[int]], progress: Progress) -> list[Any]:
        """What the last layer gives for every window of token ids (1, tokens, columns), without gradients."""
        import torch

        states: list[Any] = [None] * len(windows)
        lengths = sorted({len(window) for window in windows})
        total = len(lengths) * len(self.layers)
        with torch.no_grad(), progress.stage("computing the reference", total, unit="layers") as stage:
            for length in lengths:
                places = [index for index, window in enumerate(windows) if len(window) == length]
                with self.hold(self.table):
                    embedded = [self.table(self.ids(windows[index])) for index in places]
                self.look(embedded[0])
                found = [self.enter(item) for item in embedded]
                for index, layer in enumerate(self.layers):
                    with self.hold(layer):
                        found = [self.apply(index, state) for state in found]
                    stage.advance()
                for index, state in zip(places, found, strict=True):
                    states[index] = state
        return states

    def _run(self, embedded: Any, hooks: Sequence[Any]) -> None:
        try:
            self.model(inputs_embeds=embedded, use_cache=False)
        except _Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _answering(self, state: Any) -> Iterator[None]:
        """No layer computes inside: each answers with the same hidden states."""
        answer = (state,) if self._in_tuple else state
        for layer in self.layers:
            layer.forward = lambda *_, **__: answer
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own shows again

    def _of(self, part: Any) -> list[_Weight]:
        owners = {id(module) for module in part.modules()}
        return [weight for weight in self._weights if any(id(owner) in owners for owner, _ in weight.places)]

    def _size_bytes(self, weights: Sequence[_Weight]) -> int:
        return sum(4 * math.prod(self._checkpoint.tensors[weight.source].shape) for weight in weights)

    @contextmanager
    def _held(self, weights: Sequence[_Weight]) -> Iterator[None]:
        import torch

        empty = [owner._parameters[name] for owner, name in (weight.places[0] for weight in weights)]
        try:
            for weight in weights:
                values = torch.from_numpy(load_weight(self._checkpoint, weight.source, self._head_size))
                _put(weight, torch.nn.Parameter(values.to(self.place), requires_grad=False))
            yield
        finally:
            for weight, parameter in zip(weights, empty, strict=True):
                _put(weight, parameter)


class LayerwiseScoring:
    """Logits of windows that were known before, for whoever reads them piece by piece (``reference.ScoringModel``)."""

    def __init__(self, model: LayerwiseModel, windows: Sequence[Sequence[int]], states: Sequence[Any]) -> None:
        import transformers

        self._model = model
        self._states = dict(zip(map(tuple, windows), states, strict=True))
        self._held: tuple[int, ...] = ()
        self.name = f"transformers {transformers.__version__} float32, layer by layer"
        self.vocabulary = int(model.model.config.get_text_config().vocab_size)

    def reset(self) -> None:
        self._held = ()

    def append(self, tokens: Sequence[int]) -> Logits:
        import torch

        start = len(self._held)
        self._held += tuple(tokens)
        known = next((item for item in self._states if item[: len(self._held)] == self._held), None)
        if known is None:
            raise ValueError("these tokens are of none of the windows that were announced")
        with torch.no_grad():
            found = self._model.leave(self._states[known][:, start : len(self._held)])
        logits: Logits = found[0].float().cpu().numpy()
        return logits


@contextmanager
def open_layerwise(
    checkpoint: Checkpoint, *, device: DeviceChoice = "auto", needed_bytes: float = 0
) -> Iterator[LayerwiseModel]:
    """The checkpoint's model without weights, which come when they are asked for.

    ``needed_bytes`` is what a GPU must have free. Raises ``CheckpointError`` when transformers cannot build it or one
    of its parameters is not found in the checkpoint, and what ``resolve_device`` raises.
    """
    description = describe(checkpoint, "onnx")
    obstacle = loading_obstacle(checkpoint, description)
    if obstacle is not None:
        raise CheckpointError(f"transformers cannot compute this model: {obstacle}")
    with quiet_transformers(), exact_float32():
        place = str(resolve_device(device, needed_bytes).value)
        hint = "use --device cpu" if place != "cpu" else "end what else uses memory"
        with memory_errors("a layer of this model and what it computes", hint):
            model = LayerwiseModel(_without_weights(checkpoint, description, place), checkpoint, description, place)
            with model.hold_small():
                yield model


@contextmanager
def open_layerwise_scoring(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], progress: Progress, *, device: DeviceChoice = "auto"
) -> Iterator[LayerwiseScoring]:
    """The unquantised model for windows of token ids that are known now. Raises what ``open_layerwise`` raises."""
    with open_layerwise(checkpoint, device=device) as model:
        states = model.through(windows, progress)
        with model.hold(model.head):
            yield LayerwiseScoring(model, windows, states)


def layers_obstacle(checkpoint: Checkpoint, description: ModelDescription, available: Choice) -> str | None:
    """Why logits cannot be computed layer by layer here, None when they can; ``description`` is that for ONNX."""
    obstacle = loading_obstacle(checkpoint, description)
    if obstacle is not None:
        return obstacle
    try:
        with open_layerwise(checkpoint, device="cpu") as model:
            sizes = model.sizes
    except CheckpointError as error:
        return error.message
    # A table is read in its own type beside its float32 numbers; the logits of a piece are there twice.
    needed_bytes = _PROGRAM_BYTES + max(sizes.layer_bytes, round(1.6 * sizes.table_bytes))
    if needed_bytes > int(available.value):
        told = (
            f"{format_bytes(needed_bytes)} of memory even layer by layer, {format_bytes(int(available.value))} are free"
        )
        return f"it needs {told}"
    return None


def _put(weight: _Weight, parameter: Any) -> None:
    for owner, name in weight.places:
        owner._parameters[name] = parameter


def _stop(_module: Any, _arguments: Any) -> None:
    raise _Stop


# --- a model without weights


def _without_weights(checkpoint: Checkpoint, description: ModelDescription, place: str) -> Any:
    """A model whose large parameters take no memory and whose buffers are there."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Unfilled(TorchFunctionMode):  # type: ignore[misc]
        """Parameters start as ``torch.empty``; buffers, which no checkpoint holds, are computed."""

        def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            if func is torch.empty:
                given["device"] = "meta"
            return func(*args, **given)

    try:
        with Unfilled():
            if checkpoint.source.kind == "gguf":
                from transformers import LlamaForCausalLM

                model = LlamaForCausalLM(llama_config(description))
            else:
                from transformers import AutoConfig

                config = AutoConfig.from_pretrained(
                    checkpoint.source.path, local_files_only=True, trust_remote_code=False
                )
                kind = decoder_class(checkpoint.architecture)
                model = kind.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot build {checkpoint.source.location}: {str(error).splitlines()[0]}"
        ) from error
    for path, module in model.named_modules():
        if not path.startswith(text_prefix(model)):
            continue
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.device.type == "meta" or name not in module._non_persistent_buffers_set:
                raise CheckpointError(f"{path}.{name} is no parameter: this family cannot be computed layer by layer")
            module._buffers[name] = buffer.to(place)
    return model.eval().requires_grad_(False)


def _weights(model: Any, checkpoint: Checkpoint, description: ModelDescription) -> list[_Weight]:
    """Where every parameter of the part that speaks comes from. Raises ``CheckpointError`` for one without a source."""
    prefix, head = text_prefix(model), model.get_output_embeddings()
    places: dict[int, list[tuple[str, Any, str]]] = {}
    for path, module in model.named_modules():
        if path.startswith(prefix) or module is head:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((f"{path}.{name}", module, name))
    known = _known_sources(checkpoint, description)
    found = []
    for shared in places.values():
        paths = [path for path, _, _ in shared]
        source = next((name for path in paths if (name := _source(path, prefix, known)) is not None), None)
        module, name = shared[0][1:]
        if source is None or tuple(module._parameters[name].shape) != checkpoint.tensors[source].shape:
            raise CheckpointError(f"{paths[0]} is not in the checkpoint as it is in transformers")
        found.append(_Weight(paths[0], tuple((owner, name) for _, owner, name in shared), source))
    return found


def _known_sources(checkpoint: Checkpoint, description: ModelDescription) -> Mapping[str, str]:
    """The checkpoint's tensors that are text's, by the names that transformers gives them, or by their own."""
    if checkpoint.source.kind == "gguf":
        return {target: name for name in checkpoint.tensors if (target := transformers_name(name)) is not None}
    used = {item.source_name for item in description.tensors if item.values is None}
    return {name: name for name in checkpoint.tensors if name in used}


def _source(path: str, prefix: str, known: Mapping[str, str]) -> str | None:
    """The tensor of a parameter: called the same, or the only one called so below another prefix."""
    if path in known:
        return known[path]
    tail = path.removeprefix(f"{prefix}.")
    ends = [name for name in known if name == tail or name.endswith(f".{tail}")]
    return known[ends[0]] if len(ends) == 1 else None
