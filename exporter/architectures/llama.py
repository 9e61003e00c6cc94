"""Llama 1 to 3, SmolLM, TinyLlama and their kin."""

from exporter.architectures.shared.family import DECI, LLAMA, LLAMA_LIKE_GLOBALS, SILU, Family, llama_like_layers

FAMILY = Family(
    targets=(LLAMA, DECI),
    tensors=LLAMA_LIKE_GLOBALS,
    layer_tensors=llama_like_layers(),
    expected=SILU,
)
