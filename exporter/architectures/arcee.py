"""Arcee's AFM: a llama whose feed-forward network is a squared ReLU without a gate."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import (
    LLAMA_LIKE_GLOBALS,
    Family,
    Target,
    llama_like_layers,
)

FAMILY = Family(
    targets=(Target("arcee", adjacent=True, factors=("llama3",)),),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=tuple(rule for rule in llama_like_layers(others="none") if rule.target != MODEL_TENSOR.FFN_GATE),
    expected={"hidden_act": ("relu2",), "mlp_bias": (False,)},
    epsilon=("rms_norm_eps", 1e-5),
    activation="relu2",
)
