"""OLMo 2: norms after attention and feed-forward network, queries and keys normalised over all heads together."""

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

FAMILY = Family(
    targets=(Target("olmo2", square=True, head="required"),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=(
        *attention_tensors("none"),
        Rule(LAYER + "self_attn.q_norm", MODEL_TENSOR.ATTN_Q_NORM, ("query",)),
        Rule(LAYER + "self_attn.k_norm", MODEL_TENSOR.ATTN_K_NORM, ("key",)),
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query")),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.ATTN_POST_NORM, ("hidden",)),
        Rule(LAYER + "mlp.gate_proj", MODEL_TENSOR.FFN_GATE, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.up_proj", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward")),
        Rule(LAYER + "post_feedforward_layernorm", MODEL_TENSOR.FFN_POST_NORM, ("hidden",)),
    ),
    expected={**SILU, "attention_bias": (False,)},
    epsilon=("rms_norm_eps", 1e-5),
    norm_place="after",
)
