"""Qwen 2 and 2.5: a llama with biases on queries, keys and values. Pruned ones become one, which takes more shapes."""

from exporter.architectures.shared.family import (
    DECI,
    LLAMA,
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    Target,
    Windows,
    llama_like_layers,
)

FAMILY = Family(
    targets=(Target("qwen2", square=True), LLAMA, DECI),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=llama_like_layers(others="none"),
    expected=SILU,
    windows=Windows("switched", default=4096),
)
