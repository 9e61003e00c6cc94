"""Which type every tensor of an ONNX artefact gets, and what that costs. Pure: reads and writes nothing.

A ``--quant`` for ONNX is a recipe (``int8``, ``int4``, ``int4-mixed``) or the name of one type for every matrix
(``int4-64-asym``, ``fp32``; see ``onnx_types``). ``fp16``, and any of them with ``-fp16`` behind it, is a graph that
computes with float16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from edgelm.bundle import TensorPlan
from edgelm.errors import UsageError
from exporter.architectures.base import ModelDescription, TensorDescription
from exporter.onnx_layout import check_expressible, position_limit, table_elements
from exporter.onnx_rotary import FACTORS
from exporter.onnx_types import FP32, HALF, WeightType, parse_type

_GRAPH_BYTES = 2**14
_NODE_BYTES = 320  # per stored tensor: its entry, its share of nodes, and alignment of its data
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_POSITIONS = "position_embd.weight"  # added to rows of the embedding: small, and read one row a token
_VALUE_OR_DOWN = re.compile(r"blk\.([0-9]+)\.(?:attn_v|attn_qkv|ffn_down)\.weight")
_ATTENTION_OR_DOWN = re.compile(r"blk\.[0-9]+\.(?:attn_[a-z]+|ffn_down)\.weight")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Types by role: ``body`` for the matrices of the layers, ``tables`` for embedding and head.

    ``sensitive``, when there is one, is for what loses most by rounding: with ``every_layer`` all of attention and all
    down projections, else values and down projections of the first and last eighth of the layers and of every third one
    between, as k-quant mixes of GGUF do. ``calibrated``: 4-bit matrices are rounded with error compensation from
    calibration text, which needs torch and transformers. ``balanced``: what matrices read is balanced against them by
    calibration text, which needs neither.
    """

    name: str
    body: WeightType
    tables: WeightType
    sensitive: WeightType | None = None
    every_layer: bool = False
    calibrated: bool = False
    balanced: bool = False

    @property
    def halved(self) -> Recipe:
        """The same in a graph that computes with float16. Nothing is balanced there: balancing is for kernels that
        round activations to 8 bits, and those of float16 do not."""
        return replace(
            self,
            name=f"{self.name}{HALF}",
            body=self.body.halved,
            tables=self.tables.halved,
            sensitive=None if self.sensitive is None else self.sensitive.halved,
            balanced=False,
        )

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is read."""
        return self.calibrated or self.balanced

    def is_sensitive(self, name: str, layers: int) -> bool:
        """Whether a matrix of the layers gets the better type."""
        if self.sensitive is None:
            return False
        if self.every_layer:
            return _ATTENTION_OR_DOWN.fullmatch(name) is not None
        match = _VALUE_OR_DOWN.fullmatch(name)
        return match is not None and _more_bits(int(match[1]), layers)


_INT8, _INT4 = WeightType(8, 32), WeightType(4, 32, asymmetric=True)
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("fp32", FP32, FP32),
            Recipe("int8", _INT8, _INT8, balanced=True),
            Recipe("int4-mixed", _INT4, _INT8, _INT8),
            Recipe("int4", _INT4, _INT8),
            # Compensated, a 4-bit table loses so little that its bytes do more good in the layers.
            Recipe("int4-mixed-gptq", _INT4, _INT4, WeightType(8, 64), every_layer=True, calibrated=True),
            Recipe("int4-gptq", _INT4, _INT4, calibrated=True),
        )
    }
)
CANDIDATES = ("int8", "int4-mixed", "int4")
"""What ``--quant auto`` chooses from, most bits first."""


def recipe_named(name: str) -> Recipe:
    """The recipe of that name, or one that stores every matrix in the type of that name. Raises ``UsageError``."""
    recipe = RECIPES.get(name.lower()) or _half_recipe(name.lower())
    if recipe is not None:
        return recipe
    try:
        kind = parse_type(name)
    except UsageError as error:
        raise UsageError(
            f"'{name}' is no quantisation of ONNX models",
            hint=f"there are: {', '.join(RECIPES)}; or one type for all, as int4-64 or int4-32-asym; fp16, or any of "
            "them with -fp16 behind it, for graphs that compute with float16",
        ) from error
    return Recipe(kind.name, kind, kind)


def _half_recipe(name: str) -> Recipe | None:
    """The recipe that ``NAME-fp16`` names; None for types, which say the same of themselves."""
    recipe = RECIPES.get(name.removesuffix(HALF)) if name.endswith(HALF) else None
    return recipe.halved if recipe is not None and recipe.body.is_quantized else None


def tensor_plans(
    description: ModelDescription, recipe: Recipe, overrides: Sequence[tuple[str, str]] = ()
) -> tuple[TensorPlan, ...]:
    """Type and size of every stored tensor, in the description's order.

    ``overrides`` are (regular expression on tensor names, type); the first that matches a matrix decides. Raises
    ``UsageError`` for an override that matches none, ``CheckpointError`` for models that no graph can express.
    """
    check_expressible(description)
    tensors = [item for item in description.tensors if item.name not in FACTORS]
    for pattern, kind in overrides:
        if not any(
            len(item.shape) == 2 and item.name != _POSITIONS and re.search(pattern, item.name) for item in tensors
        ):
            raise UsageError(
                f"--type '{pattern}={kind}' fits no matrix",
                hint="names are GGUF's, as blk.0.ffn_down.weight; edgelm export --dry-run --json lists them",
            )
    layers = description.dimensions.layers
    return tuple(_tensor_plan(item, *_decide(item, recipe, overrides, layers)) for item in tensors)


def artifact_bytes(description: ModelDescription, plans: Sequence[TensorPlan], context: int) -> int:
    """Expected size of ``model.onnx`` and its data file together."""
    number_bytes = 2 if any(plan.type.endswith("fp16") for plan in plans) else 4
    tables = number_bytes * position_limit(description, context) * table_elements(description)
    return sum(plan.size_bytes for plan in plans) + tables + _GRAPH_BYTES + _NODE_BYTES * len(plans)


def _decide(
    tensor: TensorDescription, recipe: Recipe, overrides: Sequence[tuple[str, str]], layers: int
) -> tuple[WeightType, str]:
    if len(tensor.shape) != 2 or tensor.name == _POSITIONS:
        stays = FP32 if recipe.body.floats == FP32.floats else FP32.halved
        return stays, "vectors and learned positions are not rounded to blocks"
    for pattern, kind in overrides:
        if re.search(pattern, tensor.name):
            return _override(pattern, kind, recipe), f"asked for by --type '{pattern}={kind}'"
    if tensor.name in _EMBEDDINGS:
        return recipe.tables, f"embedding or head in {recipe.name}"
    if recipe.sensitive is not None and recipe.is_sensitive(tensor.name, layers):
        return recipe.sensitive, f"{recipe.name} keeps this one better"
    return recipe.body, f"default of {recipe.name}"


def _override(pattern: str, name: str, recipe: Recipe) -> WeightType:
    """The type of ``--type``, with the floats of the recipe's graph: all of a graph computes with the same."""
    kind = parse_type(name)
    if kind.floats == recipe.body.floats:
        return kind
    if kind.is_quantized and kind.floats == FP32.floats:
        return kind.halved
    raise UsageError(
        f"--type '{pattern}={name}' does not go with --quant {recipe.name}: a graph computes with float16 or float32",
        hint="name types of one kind, with -fp16 behind all of them or behind none",
    )


def _more_bits(index: int, total: int) -> bool:
    """The first and last eighth, and every third between."""
    return index < total // 8 or index >= 7 * total // 8 or (index - total // 8) % 3 == 2


def _tensor_plan(tensor: TensorDescription, kind: WeightType, reason: str) -> TensorPlan:
    return TensorPlan(
        name=tensor.name,
        source_name=tensor.source_name,
        shape=tensor.shape,
        type=kind.name,
        size_bytes=kind.size_bytes(tensor.shape),
        reason=reason,
    )
