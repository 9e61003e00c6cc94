"""Cuts a transformers model down to a shape: the units that matter most stay, in their order.

Works on the families of ``anatomy``, which names the axes of every weight. A tensor that is not known there is refused,
never copied in the hope that it fits. Needs torch.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

from edgelm.errors import CheckpointError
from exporter.compress.anatomy import ANATOMIES, Anatomy
from exporter.compress.importance import Importance
from exporter.compress.shape import Shape, group_of, head_size

_SINGLE = re.compile(r"(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Kept:
    """Indices that stay, ascending: ``layers``, ``hidden``, and per teacher's layer ``neurons`` and ``heads``."""

    layers: tuple[int, ...]
    hidden: Any
    neurons: tuple[Any, ...]
    heads: tuple[Any, ...]


def choose(importance: Importance, full: Shape, wanted: Shape) -> Kept:
    """The most important units of each kind."""
    gone = set(importance.layers[: full.layers - wanted.layers])
    return Kept(
        layers=tuple(index for index in range(full.layers) if index not in gone),
        hidden=_most(importance.hidden, wanted.hidden),
        neurons=tuple(_most(row, wanted.neurons) for row in importance.neurons),
        heads=tuple(_most(row, wanted.kv_heads) for row in importance.heads),
    )


def _most(scores: Any, count: int) -> Any:
    # Sorted stably, so that equal scores keep the first: a cut does not depend on the machine.
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def cut(model: Any, wanted: Shape, kept: Kept) -> Any:
    """A new model of shape ``wanted`` with the kept weights, float32, on the teacher's device.

    Raises ``CheckpointError`` for a tensor that is not known here.
    """
    import torch

    anatomy, config = ANATOMIES[model.config.model_type], _cut_config(model.config, wanted, kept)
    with torch.device("meta"):
        student = _empty(config, anatomy, model.config._attn_implementation)
    state = {}
    places = {old: new for new, old in enumerate(kept.layers)}
    for name, values in model.state_dict().items():
        target, indices = _plan(name, kept, places, model.config)
        if target is None:
            continue
        state[target] = _taken(values, indices).float().clone()
    student.load_state_dict(state, strict=True, assign=True)
    student.tie_weights()
    if anatomy.encoder:
        # Numbers of positions and kinds of tokens are no weights: they are the teacher's.
        for name, values in model.named_buffers():
            path, _, leaf = name.rpartition(".")
            student.get_submodule(path).register_buffer(leaf, values.clone(), persistent=False)
    else:
        # Frequencies are no weights: they follow from the configuration.
        student.model.rotary_emb = type(model.model.rotary_emb)(config).to(model.device)
    return student.eval()


def _empty(config: Any, anatomy: Anatomy, attention: str) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModel if anatomy.encoder else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation=attention)
    if anatomy.encoder:
        without_pooler(model)
    return model


def without_pooler(model: Any) -> Any:
    """The same encoder without the layer behind its first token, which is no part of a text's vector."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _cut_config(config: Any, wanted: Shape, kept: Kept) -> Any:
    changed = copy.deepcopy(config)
    anatomy = ANATOMIES[config.model_type]
    changed.num_hidden_layers = wanted.layers
    setattr(changed, anatomy.neurons, wanted.neurons)
    if anatomy.encoder:
        return changed
    changed.head_dim = head_size(config)  # stated from now on: the width no longer tells it
    changed.num_key_value_heads = wanted.kv_heads
    changed.num_attention_heads = wanted.kv_heads * group_of(config)
    changed.hidden_size = wanted.hidden
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        changed.layer_types = [kinds[index] for index in kept.layers]
    return changed


def _plan(name: str, kept: Kept, places: dict[int, int], config: Any) -> tuple[str | None, tuple[Any, ...]]:
    """The student's name of a teacher's tensor (None: gone) and what to take along each axis (None: all)."""
    anatomy = ANATOMIES[config.model_type]
    found = anatomy.place(name)
    if found is None:
        single = _SINGLE.fullmatch(name)
        axes = anatomy.outer.get(single.group(1)) if single else None
        if axes is None:
            raise CheckpointError(f"tensor {name} is not known to pruning")
        return name, tuple(kept.hidden if axis == "hidden" else None for axis in axes)
    layer, role, kind = found
    if role not in anatomy.axes:
        raise CheckpointError(f"tensor {name} is not known to pruning")
    if layer not in places:
        return None, ()
    axes = anatomy.axes[role][:1] if kind == "bias" else anatomy.axes[role]
    target = f"{anatomy.layers}.{places[layer]}.{role}.{kind}"
    return target, tuple(_index(axis, layer, kept, config) for axis in axes)


def _index(axis: str | None, layer: int, kept: Kept, config: Any) -> Any:
    if axis is None:
        return None
    if axis == "hidden":
        return kept.hidden
    if axis == "neurons":
        return kept.neurons[layer]
    heads, size = kept.heads[layer], head_size(config)
    if axis == "query":
        size *= group_of(config)
    return _blocks(heads, size)


def _blocks(heads: Any, size: int) -> Any:
    import torch

    return (heads[:, None] * size + torch.arange(size)[None, :]).reshape(-1)


def _taken(values: Any, indices: tuple[Any, ...]) -> Any:
    for axis, index in enumerate(indices):
        if index is not None and len(index) != values.shape[axis]:
            values = values.index_select(axis, index.to(values.device))
    return values
