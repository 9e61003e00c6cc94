"""Named mixes of storage types (``Q4_K_M`` and friends): which tensor gets which type, and why.

The rules are those of llama.cpp's quantiser (src/llama-quant.cpp, dense models), restated as data and small functions,
so that a mix means here what it means there: same types, same fallbacks for rows that do not fit a type. Knows names
and shapes of tensors; reads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from edgelm.errors import UsageError
from exporter import ggml

_ADDED = ("position_embd", "token_types")
_TAPS = "shortconv.conv.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Mix:
    """A named recipe: its default type and its number in ``general.file_type``."""

    name: str
    default: str
    file_type: int


_MIX_TABLE = (
    ("F32", "F32", 0), ("F16", "F16", 1), ("Q4_0", "Q4_0", 2), ("Q4_1", "Q4_1", 3), ("Q8_0", "Q8_0", 7),
    ("Q5_0", "Q5_0", 8), ("Q5_1", "Q5_1", 9), ("Q2_K", "Q2_K", 10), ("Q3_K_S", "Q3_K", 11), ("Q3_K_M", "Q3_K", 12),
    ("Q3_K_L", "Q3_K", 13), ("Q4_K_S", "Q4_K", 14), ("Q4_K_M", "Q4_K", 15), ("Q5_K_S", "Q5_K", 16),
    ("Q5_K_M", "Q5_K", 17), ("Q6_K", "Q6_K", 18), ("IQ2_XXS", "IQ2_XXS", 19), ("IQ2_XS", "IQ2_XS", 20),
    ("Q2_K_S", "Q2_K", 21), ("IQ3_XS", "IQ3_S", 22), ("IQ3_XXS", "IQ3_XXS", 23), ("IQ1_S", "IQ1_S", 24),
    ("IQ4_NL", "IQ4_NL", 25), ("IQ3_S", "IQ3_S", 26), ("IQ3_M", "IQ3_S", 27), ("IQ2_S", "IQ2_XS", 28),
    ("IQ2_M", "IQ2_S", 29), ("IQ4_XS", "IQ4_XS", 30), ("IQ1_M", "IQ1_M", 31), ("BF16", "BF16", 32),
    ("TQ1_0", "TQ1_0", 36), ("TQ2_0", "TQ2_0", 37), ("MXFP4", "MXFP4", 38), ("NVFP4", "NVFP4", 39),
    ("Q1_0", "Q1_0", 40), ("Q2_0", "Q2_0", 41),
)  # fmt: skip
MIXES: Mapping[str, Mix] = MappingProxyType({row[0]: Mix(*row) for row in _MIX_TABLE})
ALIASES: Mapping[str, str] = MappingProxyType({"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"})

_LOWEST = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M", "IQ2_S", "IQ2_M"})
# What stands in when rows are no multiple of a type's block.
_FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# Types whose result without importance weights is useless; the embedding and the head are exempt.
_NEED_IMPORTANCE = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})


@dataclass(frozen=True, slots=True)
class WeightShape:
    """What the rules look at: GGUF name and row-major shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Numbers per row."""
        return self.shape[-1]


@dataclass(frozen=True, slots=True)
class Decision:
    """The type of one tensor and the reason for it."""

    type: str
    reason: str


KEPT_F32 = Decision("F32", "norms and vectors stay F32")


@dataclass
class _Walk:
    """Where the rules are on their way through the tensors, in llama.cpp's order."""

    mix: str
    layers: int
    query_groups: int
    large_grouped: bool
    has_importance: bool
    values_total: int
    seen: dict[str, int] = field(default_factory=dict)

    def count(self, role: str) -> int:
        """How many tensors of this role came before; counts this one."""
        self.seen[role] = self.seen.get(role, 0) + 1
        return self.seen[role] - 1


def mix_named(name: str) -> Mix:
    """The mix of that name, any case. Raises ``UsageError`` listing what exists."""
    upper = name.upper()
    mix = MIXES.get(ALIASES.get(upper, upper))
    if mix is None:
        raise UsageError(f"'{name}' is no quantisation", hint=f"there are: auto, {', '.join(MIXES)}")
    return mix


def in_quantizer_order(names: Sequence[str]) -> list[str]:
    """Names sorted as llama.cpp walks over them: tensors outside of layers first, then layer by layer."""

    def key(name: str) -> tuple[int, str]:
        match = _BLOCK.match(name)
        return (int(match.group(1)) if match else -1, name)

    return sorted(names, key=key)


def is_quantizable(tensor: WeightShape) -> bool:
    """Whether a mix touches this tensor at all: matrices of weights, not norms, vectors and the few taps of short
    convolutions, nor what is added to embeddings (positions and types of tokens)."""
    if tensor.name.startswith(_ADDED) or "_norm.weight" in tensor.name or tensor.name.endswith(_TAPS):
        return False
    return len(tensor.shape) >= 2 and tensor.name.endswith("weight")


def tensor_types(
    mix: Mix,
    tensors: Sequence[WeightShape],
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    overrides: Sequence[tuple[str, str]] = (),
    has_importance: bool = False,
) -> dict[str, Decision]:
    """The type of every tensor under a mix, with its reason.

    ``overrides`` are (regular expression, type): the first that is found in a tensor's name decides. Raises
    ``UsageError`` for a type that a tensor cannot take and that has no stand-in.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    walk = _Walk(
        mix=mix.name,
        layers=layers,
        query_groups=heads // kv_heads,
        large_grouped=layers == 80 and heads != kv_heads,
        has_importance=has_importance,
        values_total=sum(_role(name) == "attn_v" for name in by_name),
    )
    tied = "output.weight" not in by_name
    return {name: _decide(mix, by_name[name], walk, overrides, tied=tied) for name in in_quantizer_order(list(by_name))}


def override_for(tensor: WeightShape, overrides: Sequence[tuple[str, str]]) -> Decision | None:
    """What was asked for this tensor by name, fitted to its rows; None when nothing was. Norms cannot be overridden."""
    for pattern, type_name in overrides:
        if is_quantizable(tensor) and re.search(pattern, tensor.name):
            return _fitting(tensor, Decision(type_name, f"asked for: {pattern}={type_name}"))
    return None


def _decide(
    mix: Mix, tensor: WeightShape, walk: _Walk, overrides: Sequence[tuple[str, str]], *, tied: bool
) -> Decision:
    if not is_quantizable(tensor):
        return KEPT_F32
    asked = override_for(tensor, overrides)
    if asked is not None:
        return asked
    if not ggml.TYPES[mix.default].is_quantized:
        return Decision(mix.default, f"{mix.name} stores all matrices so")
    return _fitting(tensor, _by_role(mix, tensor, walk, tied=tied))


def _fitting(tensor: WeightShape, wanted: Decision) -> Decision:
    """The wanted type, or its stand-in when rows are no multiple of its block."""
    block = ggml.TYPES[wanted.type].block
    if tensor.columns % block == 0:
        return wanted
    stand_in = _FALLBACKS.get(wanted.type)
    if stand_in is None and block > 32:
        raise UsageError(
            f"{wanted.type} needs rows that are multiples of {block}; {tensor.name} has {tensor.columns}",
            hint="choose another --quant, or another type for this tensor with --type",
        )
    if stand_in is None or tensor.columns % ggml.TYPES[stand_in].block:
        stand_in = "F16"
    return Decision(
        stand_in, f"rows of {tensor.columns} are no multiple of the {block} that {wanted.type} needs ({wanted.reason})"
    )


def _role(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name == "token_embd.weight":
        return "token_embd"
    roles = {"attn_v.weight": "attn_v", "attn_k.weight": "attn_k", "attn_q.weight": "attn_q"}
    roles |= {"attn_output.weight": "attn_output", "ffn_up": "ffn_up", "ffn_gate": "ffn_gate", "ffn_down": "ffn_down"}
    return next((role for part, role in roles.items() if part in name), "other")


def _by_role(mix: Mix, tensor: WeightShape, walk: _Walk, *, tied: bool) -> Decision:
    role = _role(tensor.name)
    if role == "output" or (role == "token_embd" and tied):
        return _head(mix, tensor, "tied embedding and head" if tied else "head")
    if role == "token_embd":
        return _chosen(mix, _EMBEDDING.get(mix.name), "embedding")
    rules = _LOWEST_RULES if mix.name in _LOWEST else _RULES
    rule = rules.get(role)
    return _chosen(mix, rule(walk) if rule else None, role)


def _chosen(mix: Mix, type_name: str | None, role: str) -> Decision:
    if type_name is None or type_name == mix.default:
        return Decision(mix.default, f"default of {mix.name}")
    return Decision(type_name, f"{mix.name} stores this {role} so")


def _head(mix: Mix, tensor: WeightShape, role: str) -> Decision:
    """The head decides every logit, so it gets more bits than the rest."""
    block = ggml.TYPES[mix.default].block
    if tensor.columns % block:
        return Decision("Q8_0", f"{role}: rows of {tensor.columns} are no multiple of the {block} of {mix.default}")
    if mix.name in _LOWEST | {"IQ3_XXS"}:
        return Decision("Q5_K", f"{role}: more bits for the logits")
    if mix.default != "Q8_0":
        return Decision("Q6_K", f"{role}: more bits for the logits")
    return Decision("Q8_0", f"default of {mix.name}")


_EMBEDDING = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
}


def _more_bits(index: int, total: int) -> bool:
    """The first and last eighth, and every third between: the layers that gain most from more bits."""
    return index < total // 8 or index >= 7 * total // 8 or (index - total // 8) % 3 == 2


def _attention_value(walk: _Walk) -> str | None:
    chosen = _attention_value_of_mix(walk, walk.count("attn_v"))
    if walk.large_grouped and (chosen or MIXES[walk.mix].default) in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def _attention_value_of_mix(walk: _Walk, index: int) -> str | None:
    grouped, mix = walk.query_groups >= 4, walk.mix
    if mix == "Q2_K":
        return "Q4_K" if grouped else "Q3_K"
    if mix == "IQ3_XXS" and not grouped:
        return "IQ3_XXS" if walk.has_importance else "IQ3_S"
    if mix in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"):
        return "Q4_K" if grouped else None
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(index, walk.values_total) else None
    fixed: dict[str, str | None] = {
        "IQ3_M": "Q4_K",
        "Q3_K_M": "Q5_K" if index < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "IQ4_NL": "Q5_K" if grouped else None,
        "IQ4_XS": "Q5_K" if grouped else None,
        "Q4_K_S": "Q5_K" if index < 4 else None,
    }
    return fixed.get(mix)


def _attention_query_or_key(walk: _Walk) -> str | None:
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(walk.mix)


def _attention_output(walk: _Walk) -> str | None:
    return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(walk.mix)


def _feed_forward_down(walk: _Walk) -> str | None:
    layers = walk.layers
    index = walk.count("ffn_down")
    early, plain = index < layers // 8, not walk.has_importance
    rules: dict[str, str | None] = {
        "Q2_K": "Q3_K",
        "Q2_K_S": "Q4_K" if early else None,
        "IQ3_XXS": ("Q4_K" if early else "Q3_K") if plain else None,
        "Q3_K_M": "Q5_K" if index < layers // 16 else "Q4_K",
        "IQ3_M": "Q4_K" if early else None,
        "Q3_K_L": "Q5_K",
        "Q4_K_M": "Q6_K" if _more_bits(index, layers) else None,
        "Q5_K_M": "Q6_K" if _more_bits(index, layers) else None,
        "IQ4_NL": "Q5_K" if early and plain else None,
        "IQ4_XS": "Q5_K" if early and plain else None,
        "Q4_K_S": "Q5_K" if early else None,
        "Q4_0": "Q4_1" if early and not plain else None,
        "Q5_0": "Q5_1" if early and not plain else None,
    }
    return rules.get(walk.mix)


def _feed_forward_wide(role: str) -> Callable[[_Walk], str | None]:
    def rule(walk: _Walk) -> str | None:
        index = walk.count(role)
        middle = walk.layers // 8 <= index < 7 * walk.layers // 8
        return "IQ3_XXS" if walk.mix == "IQ3_XS" and middle else None

    return rule


_RULES: Mapping[str, Callable[[_Walk], str | None]] = {
    "attn_v": _attention_value,
    "attn_k": _attention_query_or_key,
    "attn_q": _attention_query_or_key,
    "attn_output": _attention_output,
    "ffn_down": _feed_forward_down,
    "ffn_gate": _feed_forward_wide("ffn_gate"),
    "ffn_up": _feed_forward_wide("ffn_up"),
}


def _lowest_value(walk: _Walk) -> str | None:
    if walk.query_groups >= 4:
        return "Q4_K"
    return "IQ3_S" if walk.mix in ("IQ2_S", "IQ2_M") else "Q2_K"


def _lowest_down(walk: _Walk) -> str | None:
    if walk.count("ffn_down") >= walk.layers // 8:
        return None
    return "IQ3_S" if walk.mix in ("IQ2_S", "IQ2_M") else "Q2_K"


def _lowest_output(walk: _Walk) -> str | None:
    return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(walk.mix)


_LOWEST_RULES: Mapping[str, Callable[[_Walk], str | None]] = {
    "attn_v": _lowest_value,
    "ffn_down": _lowest_down,
    "attn_output": _lowest_output,
}


def lacking_importance(mix: Mix, types: Mapping[str, str]) -> str | None:
    """The first tensor whose type is useless without importance weights, None when there is none."""
    for name, type_name in types.items():
        impossible = ggml.TYPES[type_name].requires_importance
        useless = type_name in _NEED_IMPORTANCE or (type_name == "Q2_K" and mix.name == "Q2_K_S")
        if impossible or (useless and _role(name) not in ("output", "token_embd")):
            return name
    return None
