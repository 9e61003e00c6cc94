"""Applies a family to a Hugging Face checkpoint: names, shapes, settings, and every reason that stands in the way.

Widths come from the tensors; the configuration only says what tensors cannot. Nothing but headers is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, Keys

from edgelm.errors import CheckpointError
from exporter.architectures.base import (
    Dimensions,
    LayerShape,
    ModelDescription,
    Structure,
    TensorDescription,
    config_count,
    config_number,
)
from exporter.architectures.shared.encoders import describe_encoder, encoder_metadata
from exporter.architectures.shared.family import OWN_GRAPH, Family, Rule, Target
from exporter.architectures.shared.problems import Problems
from exporter.architectures.shared.rope import RopeDescription, describe_rope
from exporter.architectures.shared.windows import attention_windows
from exporter.checkpoint import Checkpoint, weight_type

_LAYERS_LIMIT = 512  # llama.cpp's own
_SHOWN_LAYERS = 3
_OLDER_NAMES = {"weight": "gamma", "bias": "beta"}  # of norms, in the first checkpoints of BERT


@dataclass(frozen=True)
class _Sizes:
    """What the headers say before a target is chosen. A layer is None when its tensors are missing.

    ``taps`` are the tokens that a short convolution sees, in the layers ``convolutions``.
    """

    layers: int
    hidden: int
    vocabulary: int
    head_size: int
    context: int
    tied: bool
    shapes: tuple[LayerShape | None, ...]
    convolutions: tuple[int, ...] = ()
    taps: int = 0


class _Source:
    """A checkpoint seen through a family: tensors by its names, with or without a prefix that some leave out."""

    def __init__(self, checkpoint: Checkpoint, family: Family) -> None:
        self.checkpoint, self.family = checkpoint, family
        names = checkpoint.tensors
        fitting = [item for item in family.prefixes if any(name.startswith(item) for name in names)]
        embedding = f"{family.tensors[0].source}.weight"
        self.prefix = next((item for item in family.prefixes if item + embedding in names), (fitting or [""])[0])

    def name(self, rule: Rule, layer: int | None, suffix: str = "weight") -> str:
        stem = f"{self.prefix}{rule.source.format(layer=layer)}"
        older = f"{stem}.{_OLDER_NAMES[suffix]}"
        return older if older in self.checkpoint.tensors else f"{stem}.{suffix}"

    def shape(self, name: str, *, transposed: bool = False) -> tuple[int, ...] | None:
        header = self.checkpoint.tensors.get(name)
        if header is None:
            return None
        return header.shape[::-1] if transposed else header.shape

    def count(self, name: str, default: int | None = None) -> int:
        return config_count(self.checkpoint, self.family.settings.get(name, name), default)

    def head_name(self) -> str:
        """The output matrix stands outside of the prefix, or inside where a text is part of a model that sees."""
        inside = f"{self.prefix}{self.family.head}.weight"
        return inside if inside in self.checkpoint.tensors else f"{self.family.head}.weight"


def describe_checkpoint(checkpoint: Checkpoint, family: Family, *, own_graph: bool = False) -> ModelDescription:
    """Describe a checkpoint of a family. ``own_graph``: for a graph drawn for it, which llama.cpp's limits do not bind.

    Raises ``CheckpointError`` with every setting and tensor in the way.
    """
    if own_graph and not family.encoder:
        target = replace(OWN_GRAPH, name=family.targets[0].name, adjacent=family.adjacent)
        family = replace(family, targets=(target,), check=None)
    problems = Problems(checkpoint.source.location)
    checkpoint = _text_part(checkpoint, family)
    source = _Source(checkpoint, family)
    _check_settings(source, problems)
    _check_types(source, problems)
    sizes = _sizes(source, problems)
    if sizes is None:
        problems.raise_all()
        raise AssertionError("sizes are missing for a reason")
    target = _target(source, sizes, problems)
    rope = windows = None
    with problems.collect():
        rope = describe_rope(checkpoint, family.rope, target, sizes.head_size) if family.rope is not None else None
    with problems.collect():
        windows = attention_windows(checkpoint, family.windows, sizes.layers)
    tensors = _tensors(source, target, sizes, problems)
    metadata = structure = None
    with problems.collect():
        structure = _structure(source, sizes, rope, windows or ())
        metadata = _metadata(source, target, sizes, structure)
    problems.raise_all()
    assert structure is not None
    assert metadata is not None
    dimensions, notes = _dimensions(sizes, target, structure)
    metadata[Keys.LLM.CONTEXT_LENGTH] = dimensions.context_trained
    if sizes.tied and not family.encoder and source.head_name() in checkpoint.tensors:
        notes = (*notes, f"{source.head_name()} is left out: by config.json the embedding is the output matrix too")
    encoder = None
    if family.encoder:
        with problems.collect():
            encoder, told = describe_encoder(checkpoint, dimensions)
            metadata.update(encoder_metadata(encoder, tensors))
            notes = (*notes, *told)
        problems.raise_all()
    if target.windows and any(structure.windows):
        metadata[Keys.Attention.SLIDING_WINDOW] = max(structure.windows)
        metadata[Keys.Attention.SLIDING_WINDOW_PATTERN] = [window > 0 for window in structure.windows]
    if rope is not None:
        metadata.update(rope.metadata)
        tensors.extend(rope.tensors)
    general = {
        Keys.General.ARCHITECTURE: target.name,
        Keys.General.TYPE: "model",
        Keys.General.NAME: checkpoint.source.location.rsplit("/", 1)[-1],
    }
    named = {key.format(arch=target.name): value for key, value in metadata.items()}
    return ModelDescription(target.name, dimensions, {**general, **named}, tuple(tensors), structure, notes, encoder)


def _text_part(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """A checkpoint as a text model: settings of that part, tensors of other parts left out."""
    if family.text_config is None:
        return checkpoint
    settings = checkpoint.config.get(family.text_config)
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{checkpoint.source.location}: config.json: {family.text_config} is no table")
    tensors = {name: item for name, item in checkpoint.tensors.items() if not name.startswith(family.left_out)}
    config = {**family.defaults, **settings}
    # Both parts have it, and transformers 5 goes by the whole model's, earlier ones by the text's.
    if checkpoint.config.get("tie_word_embeddings") and not any(
        name.endswith(f"{family.head}.weight") for name in tensors
    ):
        config["tie_word_embeddings"] = True
    return replace(checkpoint, config=config, tensors=tensors)


# --- settings and sizes


def _check_settings(source: _Source, problems: Problems) -> None:
    config = source.checkpoint.config
    always = {"num_local_experts": (None, 0, 1), "quantization_config": (None,)}
    for key, values in {**always, **source.family.expected}.items():
        found = config.get(key, values[0])
        if found not in values:
            told = found.get("quant_method", "set") if isinstance(found, Mapping) else repr(found)
            problems.add(f"config.json: {key} is {told}, which is not supported")
    if source.family.check is not None:
        with problems.collect():
            for told in source.family.check(source.checkpoint):
                problems.add(told)


def _check_types(source: _Source, problems: Problems) -> None:
    """All tensors that will be read are stored in a type that can be."""
    odd: dict[str, list[str]] = {}
    for name, header in source.checkpoint.tensors.items():
        if not name.endswith(source.family.ignored):
            try:
                weight_type(header)
            except CheckpointError:
                odd.setdefault(header.type, []).append(name)
    for kind, names in odd.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        problems.add(
            f"tensor {min(names)}{more} is stored as {kind}, which EdgeLM does not read",
            hint="save the checkpoint as float32, float16 or bfloat16",
        )


def _sizes(source: _Source, problems: Problems) -> _Sizes | None:
    family, embedding = source.family, source.family.tensors[0]
    layers = heads = context = head_size = None
    convolutions, taps = tuple[int, ...](), 0
    with problems.collect():
        layers = source.count("num_hidden_layers")
    with problems.collect():
        heads = source.count("num_attention_heads")
    with problems.collect():
        context = source.count("max_position_embeddings", 2048) - _skipped_positions(source)
    if layers is not None and layers > _LAYERS_LIMIT:
        problems.add(f"{layers} layers; the engine takes {_LAYERS_LIMIT}")
        return None
    shape = source.shape(source.name(embedding, None))
    if shape is None or len(shape) != 2 or 0 in shape:
        told = f"tensor {source.name(embedding, None)} has the shape {shape}"
        if shape is None:
            told = f"it has no tensor {source.name(embedding, None)}"
        problems.add(told, hint=_wrong_kind(family))
        return None
    if layers is None or heads is None or context is None:
        return None
    with problems.collect():
        head_size = config_count(source.checkpoint, "head_dim", family.head_size or shape[1] // heads or 1)
    if head_size is None:
        return None
    if family.convolutions is not None:
        with problems.collect():
            convolutions = family.convolutions(source.checkpoint, layers)
            taps = source.count("conv_L_cache", 3)
    tied = source.checkpoint.config.get("tie_word_embeddings")
    if tied not in (None, True, False):
        problems.add(f"config.json: tie_word_embeddings is {tied!r}, which is neither true nor false")
    return _Sizes(
        layers=layers,
        hidden=shape[1],
        vocabulary=shape[0],
        head_size=head_size,
        context=context,
        tied=family.tied if tied is None else bool(tied),
        shapes=tuple(
            _without_attention(source, layer, shape[1] // head_size)
            if layer in convolutions
            else _layer_shape(source, layer, head_size, problems)
            for layer in range(layers)
        ),
        convolutions=convolutions,
        taps=taps,
    )


def _wrong_kind(family: Family) -> str:
    return f"is it {'an encoder' if family.encoder else 'a causal language model'} of this family?"


def _skipped_positions(source: _Source) -> int:
    """Rows of the table of positions that no text uses: they count from the padding's own number."""
    if source.family.first_position is None:
        return 0
    name, default = source.family.first_position
    value = source.checkpoint.config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise CheckpointError(f"{source.checkpoint.source.location}: config.json: {name} is {value!r}, which is no id")
    return value + 1


def _layer_size(source: _Source, layer: int, target: MODEL_TENSOR, axis: int) -> int | None:
    rule = next((item for item in source.family.layer_tensors if item.target == target), None)
    shape = source.shape(source.name(rule, layer), transposed=rule.transposed) if rule else None
    return shape[axis] if shape is not None and len(shape) == 2 else None


def _without_attention(source: _Source, layer: int, heads: int) -> LayerShape | None:
    """A layer with a convolution: llama.cpp wants its heads counted as everywhere, and none of keys."""
    feed_forward = _layer_size(source, layer, MODEL_TENSOR.FFN_DOWN, 1)
    return LayerShape(heads, 0, feed_forward) if feed_forward else None


def _layer_shape(source: _Source, layer: int, head_size: int, problems: Problems) -> LayerShape | None:
    """Heads and width of one layer, from its tensors alone."""

    def size(target: MODEL_TENSOR, axis: int) -> int | None:
        return _layer_size(source, layer, target, axis)

    query, feed_forward = size(MODEL_TENSOR.ATTN_OUT, 1), size(MODEL_TENSOR.FFN_DOWN, 1)
    fused = size(MODEL_TENSOR.ATTN_QKV, 0)
    key = size(MODEL_TENSOR.ATTN_K, 0)
    if fused is not None and query is not None:
        key = (fused - query) // 2
    else:
        query = size(MODEL_TENSOR.ATTN_Q, 0) or query
    if not query or not key or not feed_forward:
        return None
    if head_size % 2 or query % head_size or key % head_size or (query // head_size) % (key // head_size):
        problems.add(f"{query} query and {key} key rows do not divide into heads of {head_size}")
        return None
    return LayerShape(query // head_size, key // head_size, feed_forward)


# --- what can hold it


def _target(source: _Source, sizes: _Sizes, problems: Problems) -> Target:
    """The first architecture that can hold these shapes; what is wrong with the family's own, if none can."""
    misfits = {target.name: _misfits(target, sizes) for target in source.family.targets}
    for target in source.family.targets:
        if not misfits[target.name]:
            return target
    first = source.family.targets[0]
    for told in misfits[first.name]:
        problems.add(told, hint="prune all layers alike, or pad them with zeros: that changes no answer")
    return first


def _misfits(target: Target, sizes: _Sizes) -> list[str]:
    known = [(layer, shape) for layer, shape in enumerate(sizes.shapes) if shape is not None]
    if not known:
        return []
    told = []
    if not target.uneven:
        told += [
            text
            for name, what in (
                ("heads", "query heads"),
                ("kv_heads", "key heads"),
                ("feed_forward", "feed-forward rows"),
            )
            if (text := _unevenness(target, name, what, known)) is not None
        ]
    odd = [layer for layer, shape in known if shape.heads * sizes.head_size != sizes.hidden]
    if target.square and odd:
        wanted = f"{sizes.hidden} rows of queries, as many as the hidden size"
        told.append(
            f"layer {odd[0]} has {sizes.shapes[odd[0]].heads * sizes.head_size}, "  # type: ignore[union-attr]
            f"llama.cpp's {target.name} takes {wanted}"
        )
    return told


def _unevenness(target: Target, name: str, what: str, known: Sequence[tuple[int, LayerShape]]) -> str | None:
    counts = [(layer, getattr(shape, name)) for layer, shape in known if shape.kv_heads or name != "kv_heads"]
    usual = max((count for _, count in counts), default=0)
    odd = [(layer, count) for layer, count in counts if count != usual]
    if not odd:
        return None
    listed = ", ".join(f"layer {layer} has {count}" for layer, count in odd[:_SHOWN_LAYERS])
    more = f" and {len(odd) - _SHOWN_LAYERS} more differ" if len(odd) > _SHOWN_LAYERS else ""
    return f"{listed}{more}, others {usual} {what}: llama.cpp's {target.name} takes the same number in every layer"


def _dimensions(sizes: _Sizes, target: Target, structure: Structure) -> tuple[Dimensions, tuple[str, ...]]:
    shapes = tuple(shape for shape in sizes.shapes if shape is not None)
    first = next((shape for shape in shapes if shape.kv_heads), shapes[0])
    context, notes = sizes.context, []
    seen = [window for window in structure.windows if window]
    if seen and not target.windows and min(seen) < context:
        context = min(seen)
        notes.append(
            f"the context ends at {context} tokens instead of {sizes.context}: beyond, the model's attention has a "
            f"window, which llama.cpp's {target.name} does not have"
        )
    if target.name == "deci":
        notes.append("layers differ in width: the artefact is of llama.cpp's architecture deci, a llama that allows it")
    dimensions = Dimensions(
        layers=sizes.layers,
        hidden=sizes.hidden,
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_size=sizes.head_size,
        feed_forward=first.feed_forward,
        vocabulary=sizes.vocabulary,
        context_trained=context,
        tied=sizes.tied and target.head != "required" and structure.causal,
        uneven=shapes if len(set(shapes)) > 1 else (),
    )
    return dimensions, tuple(notes)


# --- tensors


def _tensors(source: _Source, target: Target, sizes: _Sizes, problems: Problems) -> list[TensorDescription]:
    family, found, missing = source.family, list[TensorDescription](), list[str]()
    model = {"vocabulary": sizes.vocabulary, "hidden": sizes.hidden, "positions": sizes.context}
    model |= {"mixed": 3 * sizes.hidden, "taps": sizes.taps}
    scale = _query_scale(source, sizes, problems)
    for rule, layer in _rules(family, sizes):
        widths = model if layer is None else {**model, **_widths(sizes, layer)}
        for description in _mapped(source, target, rule, layer, widths):
            if description.source_name not in source.checkpoint.tensors:
                missing.append(description.source_name)
                continue
            _check_shape(source, rule, description, problems)
            found.append(_scaled(description, scale) if rule.is_query else description)
    with problems.collect():
        found += _head(source, target, sizes, missing)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problems.add(f"it has no tensor {missing[0]}{more}", hint=_wrong_kind(family))
    _refuse_leftovers(source, {source.head_name(), *(item.source_name for item in found)}, problems)
    return found


def _rules(family: Family, sizes: _Sizes) -> Iterator[tuple[Rule, int | None]]:
    yield from ((rule, None) for rule in family.tensors)
    for layer in range(sizes.layers):
        kind = "convolution" if layer in sizes.convolutions else "attention"
        yield from ((rule, layer) for rule in family.layer_tensors if rule.only in ("", kind))


def _widths(sizes: _Sizes, layer: int) -> dict[str, int]:
    shape, head = sizes.shapes[layer], sizes.head_size
    if shape is None:
        return {"head": head}
    query, key = shape.heads * head, shape.kv_heads * head
    return {
        "query": query,
        "key": key,
        "qkv": query + 2 * key,
        "feed_forward": shape.feed_forward,
        "gate_up": 2 * shape.feed_forward,
        "head": head,
    }


def _mapped(
    source: _Source, target: Target, rule: Rule, layer: int | None, widths: Mapping[str, int]
) -> Iterator[TensorDescription]:
    """Bias and weight of one rule. Widths that are not known, since the layer is incomplete, stay what they are."""
    head = widths.get("head", 0)
    name = TENSOR_NAMES[rule.target].format(bid=layer)
    weight = source.name(rule, layer)
    if rule.optional and weight not in source.checkpoint.tensors:
        return
    actual = source.shape(weight, transposed=rule.transposed) or (0,) * len(rule.widths)
    padded = (*actual, *(0,) * len(rule.widths))
    shape = tuple(widths.get(width, padded[axis]) for axis, width in enumerate(rule.widths))
    skipped = _skipped_positions(source) if rule.target == MODEL_TENSOR.POS_EMBD else 0
    skipped = shape[0] if rule.half == 2 else skipped
    interleave = head if rule.rotary and target.adjacent and not source.family.adjacent else 0
    split = head if rule.split else 0
    bias = source.name(rule, layer, "bias")
    if rule.bias == "required" or (rule.bias == "optional" and bias in source.checkpoint.tensors):
        yield TensorDescription(f"{name}.bias", bias, shape[:1], interleave, split=split)
    yield TensorDescription(
        f"{name}.weight",
        weight,
        shape,
        interleave,
        split=split,
        transposed=rule.transposed,
        offset=rule.offset,
        skipped=skipped,
    )


def _check_shape(source: _Source, rule: Rule, description: TensorDescription, problems: Problems) -> None:
    transposed = rule.transposed and len(description.shape) == 2
    actual = source.shape(description.source_name, transposed=transposed)
    if actual and rule.half:
        actual = (actual[0] // 2 if actual[0] % 2 == 0 else actual[0], *actual[1:])
    elif actual and rule.flat:
        actual = tuple(size for size in actual if size != 1)
    elif actual and description.skipped:
        actual = (actual[0] - description.skipped, *actual[1:])
    if actual != description.shape:
        wanted = description.shape[::-1] if transposed else description.shape
        shown = actual[::-1] if transposed and actual else actual
        problems.add(f"tensor {description.source_name} has the shape {shown}, the others imply {wanted}")


def _query_scale(source: _Source, sizes: _Sizes, problems: Problems) -> float:
    """What queries are multiplied by so that dividing by the root of the head size is right for the model."""
    if source.family.query_scalar is None:
        return 1.0
    name, default = source.family.query_scalar
    with problems.collect():
        return math.sqrt(sizes.head_size / config_number(source.checkpoint, name, default))
    return 1.0


def _scaled(item: TensorDescription, scale: float) -> TensorDescription:
    if scale == 1.0:
        return item
    return replace(item, scale=item.scale * scale, offset=item.offset * scale)


def _head(source: _Source, target: Target, sizes: _Sizes, missing: list[str]) -> Iterator[TensorDescription]:
    """The output matrix: its own, or the embedding once more where the graph insists on one; none of an encoder."""
    if source.family.encoder:
        return
    name = f"{TENSOR_NAMES[MODEL_TENSOR.OUTPUT]}.weight"
    shape = (sizes.vocabulary, sizes.hidden)
    if sizes.tied and target.head == "required":
        yield TensorDescription(name, source.name(source.family.tensors[0], None), shape)
    elif not sizes.tied:
        found = source.shape(source.head_name())
        if found is None:
            missing.append(source.head_name())
        elif target.head == "tied" or found != shape:
            told = "has no place" if target.head == "tied" else f"has the shape {found}, the embedding {shape}"
            raise CheckpointError(f"{source.checkpoint.source.location}: tensor {source.head_name()} {told}")
        else:
            yield TensorDescription(name, source.head_name(), shape)
    yield from _head_bias(source, sizes, missing)


def _head_bias(source: _Source, sizes: _Sizes, missing: list[str]) -> Iterator[TensorDescription]:
    if not source.family.head_bias:
        return
    name, shape = f"{source.family.head}.bias", (sizes.vocabulary,)
    found = source.shape(name)
    if found is None:
        missing.append(name)
    elif found != shape:
        raise CheckpointError(f"{source.checkpoint.source.location}: tensor {name} has the shape {found}, not {shape}")
    else:
        yield TensorDescription(f"{TENSOR_NAMES[MODEL_TENSOR.OUTPUT]}.bias", name, shape)


def _refuse_leftovers(source: _Source, used: set[str], problems: Problems) -> None:
    checkpoint, ignored = source.checkpoint, source.family.ignored
    left = [name for name in checkpoint.tensors if name not in used and not name.endswith(ignored)]
    if left:
        problems.add(
            f"it has {len(left)} tensors that a {checkpoint.architecture} model has no place for, as {min(left)}",
            hint="is config.json the one of these weights?",
        )


# --- structure and metadata


def _structure(source: _Source, sizes: _Sizes, rope: RopeDescription | None, windows: tuple[int, ...]) -> Structure:
    family, checkpoint = source.family, source.checkpoint
    targets = {rule.target for rule in family.layer_tensors}
    norms = [rule for rule in family.layer_tensors if rule.target == MODEL_TENSOR.ATTN_Q_NORM]
    switch = family.parallel_residual
    numbers = _numbers(source)
    rotary = rope.rotary if rope is not None else None
    if rotary is not None and family.skipped_rotation is not None:
        rotary = replace(rotary, skipped=family.skipped_rotation(checkpoint, sizes.layers))
    return Structure(
        norm=family.norm,
        epsilon=config_number(checkpoint, *family.epsilon),
        activation=family.activation,
        gated=MODEL_TENSOR.FFN_GATE in targets or any("gate_up" in rule.widths for rule in family.layer_tensors),
        norm_place=family.norm_place,
        parallel_residual=family.parallel or (switch is not None and bool(checkpoint.config.get(*switch))),
        query_norm=("head" if norms[0].widths == ("head",) else "all") if norms else "none",
        rotary=rotary,
        windows=windows,
        attention_scale=numbers.get(Keys.Attention.SCALE, 1 / math.sqrt(sizes.head_size)),  # queries carry the rest
        attention_softcap=numbers.get(Keys.LLM.ATTN_LOGIT_SOFTCAPPING, 0.0),
        logit_softcap=numbers.get(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, 0.0),
        embedding_scale=numbers.get(
            Keys.LLM.EMBEDDING_SCALE, math.sqrt(sizes.hidden) if family.scaled_embedding else 1.0
        ),
        residual_scale=numbers.get(Keys.LLM.RESIDUAL_SCALE, 1.0),
        logit_divisor=numbers.get(Keys.LLM.LOGIT_SCALE, 1.0) ** (-1 if family.multiplies_logits else 1),
        norm_after_rotation=family.norm_after_rotation,
        causal=not family.encoder,
        convolutions=sizes.convolutions,
    )


def _numbers(source: _Source) -> dict[str, float]:
    found = {}
    for number in source.family.numbers:
        if source.checkpoint.config.get(number.setting) is not None or number.default is not None:
            found[number.key] = config_number(source.checkpoint, number.setting, number.default)
    return found


def _metadata(source: _Source, target: Target, sizes: _Sizes, structure: Structure) -> dict[str, Any]:
    shapes = [shape for shape in sizes.shapes if shape is not None]

    def each(name: str) -> int | list[int]:
        counts = [getattr(shape, name) for shape in shapes]
        return counts if len(set(shapes if target.uneven else counts)) > 1 else counts[0]

    if not shapes:
        return {}
    epsilon = Keys.Attention.LAYERNORM_RMS_EPS if structure.norm == "rms" else Keys.Attention.LAYERNORM_EPS
    values = {
        Keys.LLM.BLOCK_COUNT: sizes.layers,
        Keys.LLM.EMBEDDING_LENGTH: sizes.hidden,
        Keys.LLM.FEED_FORWARD_LENGTH: each("feed_forward"),
        Keys.LLM.VOCAB_SIZE: sizes.vocabulary,
        Keys.Attention.HEAD_COUNT: each("heads"),
        Keys.Attention.HEAD_COUNT_KV: each("kv_heads"),
        Keys.Attention.KEY_LENGTH: sizes.head_size,
        Keys.Attention.VALUE_LENGTH: sizes.head_size,
        epsilon: structure.epsilon,
        **_numbers(source),
    }
    if sizes.convolutions:
        values[Keys.ShortConv.L_CACHE] = sizes.taps
    if source.family.parallel_residual is not None:
        values[Keys.LLM.USE_PARALLEL_RESIDUAL] = structure.parallel_residual
    return values
