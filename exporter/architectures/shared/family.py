"""The form of a family: which source tensor becomes which GGUF tensor, which setting which key, and what is expected.

Pure data. Knows no checkpoint; ``checkpoints`` applies it to one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gguf.constants import MODEL_TENSOR

from exporter.checkpoint import Checkpoint

Bias = Literal["none", "optional", "required"]
LAYER = "model.layers.{layer}."


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of a model or, with ``{layer}`` in ``source``, of each layer; names without their suffix.

    ``widths`` are (rows, columns) in the artefact: vocabulary, hidden, positions, types (of tokens: as many as there
    are), query, key, qkv, feed_forward, gate_up, head, or of a short convolution mixed and taps. ``rotary`` rows belong
    to heads that rotate, ``is_query`` ones take a family's query scale. ``split`` and ``offset`` are those of
    ``TensorDescription``, ``transposed`` too. ``optional`` may be absent. ``only`` in layers of that kind;
    ``flat``: the source has a dimension of 1 more.
    """

    source: str
    target: MODEL_TENSOR
    widths: tuple[str, ...]
    rotary: bool = False
    bias: Bias = "none"
    split: bool = False
    transposed: bool = False
    offset: float = 0.0
    is_query: bool = False
    optional: bool = False
    half: int = 0
    only: Literal["", "attention", "convolution"] = ""
    flat: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A GGUF architecture: what llama.cpp's graph of that name can hold (its src/models).

    ``adjacent``: rotation partners are neighbours. ``square``: heads times head size must be the hidden size.
    ``uneven``: widths may differ from layer to layer. ``windows``: attention windows are kept. ``factors``: which
    rotation scalings have a place. ``head``: the output matrix may be there, must, or is always the embedding.
    """

    name: str
    adjacent: bool = False
    square: bool = False
    uneven: bool = False
    windows: bool = False
    factors: tuple[str, ...] = ()
    head: Literal["optional", "required", "tied"] = "optional"


LLAMA = Target("llama", adjacent=True, factors=("llama3",))
DECI = Target("deci", adjacent=True, uneven=True, factors=("llama3",))
"""Llama with widths of its own in every layer (made for Nemotron); it takes the tensors of a llama."""
OWN_GRAPH = Target("", uneven=True, windows=True, factors=("llama3", "longrope"))
"""A graph that is drawn for the checkpoint instead of being llama.cpp's; takes the name of a family's first target."""


@dataclass(frozen=True, slots=True)
class Number:
    """A setting that becomes a GGUF key. ``default`` stands in when config.json has none; None: the key is left out."""

    setting: str
    key: str
    default: float | None = None


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """Where the rotation's settings are. ``share``: (setting, default) of the part of a head that rotates.
    ``temperature`` names the setting of how much queries grow with their position."""

    theta: tuple[str, float] = ("rope_theta", 10000.0)
    share: tuple[str, float] = ("partial_rotary_factor", 1.0)
    local_theta: tuple[str, float] | None = None
    temperature: str | None = None


@dataclass(frozen=True, slots=True)
class Windows:
    """Which layers see only a window: all of them, those that a switch and a list tell, or all but every n-th."""

    kind: Literal["none", "all", "switched", "periodic"] = "none"
    period: int = 0
    default: int | None = None


@dataclass(frozen=True)
class Family:
    """How checkpoints of one ``model_type`` become artefacts. The first target that can hold a shape is taken.

    ``settings`` are names in config.json that differ from the usual, ``expected`` (setting -> values that the graph
    means; the first is the default). ``ignored`` are endings of buffers that follow from the configuration.
    ``scaled_embedding``: the graph multiplies it by the root of the hidden size. ``query_scalar`` is (setting, default)
    of what attention scores are divided by the root of, where the graph divides by that of the head size. ``check``
    names what else stands in the way. ``adjacent``: the source's own rows have rotation partners side by side.
    ``norm_after_rotation``: of queries and keys. ``text_config`` names the part of config.json that counts;
    ``defaults`` stand in for settings that it leaves out; tensors that begin with ``left_out`` are not the text's.
    ``encoder``: attention sees all tokens and there is no head. ``first_position``
    is (setting, default) of the number before that of the first position, where rows up to it belong to no text.
    ``parallel``: attention and feed-forward network always stand side by side. ``head_bias``: the output matrix has a
    bias. ``multiplies_logits``: GGUF's logit scale multiplies instead of dividing. ``convolutions`` tells the layers
    that have a short convolution instead of attention.
    """

    targets: tuple[Target, ...]
    tensors: tuple[Rule, ...]
    layer_tensors: tuple[Rule, ...]
    head: str = "lm_head"
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    settings: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    numbers: tuple[Number, ...] = ()
    norm: Literal["rms", "layer"] = "rms"
    epsilon: tuple[str, float] = ("rms_norm_eps", 1e-6)
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = "silu"
    norm_place: Literal["before", "after", "both"] = "before"
    tied: bool = False
    scaled_embedding: bool = False
    head_size: int | None = None
    rope: RopeSettings | None = RopeSettings()
    windows: Windows = Windows()
    parallel_residual: tuple[str, bool] | None = None
    query_scalar: tuple[str, float] | None = None
    skipped_rotation: Callable[[Checkpoint, int], tuple[int, ...]] | None = None
    check: Callable[[Checkpoint], list[str]] | None = None
    adjacent: bool = False
    norm_after_rotation: bool = False
    text_config: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    encoder: bool = False
    first_position: tuple[str, int] | None = None
    parallel: bool = False
    head_bias: bool = False
    multiplies_logits: bool = False
    convolutions: Callable[[Checkpoint, int], tuple[int, ...]] | None = None


SILU = {"hidden_act": ("silu", "swish")}


def llama_like_layers(*, qkv: Bias = "optional", others: Bias = "optional") -> tuple[Rule, ...]:
    """The nine tensors of a layer under the names that most families share with Llama, and who has biases."""
    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    return (
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",)),
        *attention_tensors(qkv),
        Rule(attention + "o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query"), bias=others),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",)),
        Rule(mlp + "gate_proj", MODEL_TENSOR.FFN_GATE, ("feed_forward", "hidden"), bias=others),
        Rule(mlp + "up_proj", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), bias=others),
        Rule(mlp + "down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward"), bias=others),
    )


def attention_tensors(bias: Bias) -> tuple[Rule, ...]:
    """Query, key and value under their usual names."""
    prefix = LAYER + "self_attn."
    return (
        Rule(prefix + "q_proj", MODEL_TENSOR.ATTN_Q, ("query", "hidden"), rotary=True, bias=bias, is_query=True),
        Rule(prefix + "k_proj", MODEL_TENSOR.ATTN_K, ("key", "hidden"), rotary=True, bias=bias),
        Rule(prefix + "v_proj", MODEL_TENSOR.ATTN_V, ("key", "hidden"), bias=bias),
    )


LLAMA_LIKE_GLOBALS = (
    Rule("model.embed_tokens", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
    Rule("model.norm", MODEL_TENSOR.OUTPUT_NORM, ("hidden",)),
)
