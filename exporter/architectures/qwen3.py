"""Qwen 3, dense: queries and keys are normalised head by head."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import (
    LAYER,
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    Rule,
    Target,
    Windows,
    llama_like_layers,
)

FAMILY = Family(
    targets=(Target("qwen3"),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=(
        *llama_like_layers(others="none"),
        Rule(LAYER + "self_attn.q_norm", MODEL_TENSOR.ATTN_Q_NORM, ("head",)),
        Rule(LAYER + "self_attn.k_norm", MODEL_TENSOR.ATTN_K_NORM, ("head",)),
    ),
    expected=SILU,
    head_size=128,
    windows=Windows("switched", default=4096),
)
