"""Mistral 7B and its kin: a llama whose first versions see a window only."""

from exporter.architectures.shared.family import (
    DECI,
    LLAMA,
    LLAMA_LIKE_GLOBALS,
    SILU,
    Family,
    Windows,
    llama_like_layers,
)

FAMILY = Family(
    targets=(LLAMA, DECI),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=llama_like_layers(),
    expected=SILU,
    windows=Windows("all", default=4096),
)
