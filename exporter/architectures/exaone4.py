"""EXAONE 4, the small one: norms after attention and feed-forward network, queries and keys normalised head by head."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import (
    LAYER,
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    Rule,
    Target,
    attention_tensors,
)
from exporter.checkpoint import Checkpoint

_HYBRID_LAYERS = 64  # llama.cpp knows the large one, whose layers differ, by their number


def _check(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.config.get("num_hidden_layers") != _HYBRID_LAYERS:
        return []
    return [f"llama.cpp takes every exaone4 model of {_HYBRID_LAYERS} layers for one with attention windows"]


FAMILY = Family(
    targets=(Target("exaone4", square=True, factors=("llama3",)),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=(
        *attention_tensors("none"),
        Rule(LAYER + "self_attn.q_norm", MODEL_TENSOR.ATTN_Q_NORM, ("head",)),
        Rule(LAYER + "self_attn.k_norm", MODEL_TENSOR.ATTN_K_NORM, ("head",)),
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query")),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.ATTN_POST_NORM, ("hidden",)),
        Rule(LAYER + "mlp.gate_proj", MODEL_TENSOR.FFN_GATE, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.up_proj", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward")),
        Rule(LAYER + "post_feedforward_layernorm", MODEL_TENSOR.FFN_POST_NORM, ("hidden",)),
    ),
    expected={**SILU, "sliding_window": (None,)},
    epsilon=("rms_norm_eps", 1e-5),
    norm_place="after",
    check=_check,
)
