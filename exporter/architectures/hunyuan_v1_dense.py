"""Hunyuan, dense, 0.5B to 7B: queries and keys are normalised head by head, after they were rotated."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import (
    LAYER,
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    Rule,
    Target,
    llama_like_layers,
)

FAMILY = Family(
    targets=(Target("hunyuan-dense"),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=(
        *llama_like_layers(qkv="none", others="none"),
        Rule(LAYER + "self_attn.query_layernorm", MODEL_TENSOR.ATTN_Q_NORM, ("head",)),
        Rule(LAYER + "self_attn.key_layernorm", MODEL_TENSOR.ATTN_K_NORM, ("head",)),
    ),
    expected=SILU,
    epsilon=("rms_norm_eps", 1e-5),
    norm_after_rotation=True,
)
