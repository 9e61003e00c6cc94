"""RoBERTa and the sentence models made of it: BERT whose positions count from the padding token's number."""

from dataclasses import replace

from exporter.architectures import bert

FAMILY = replace(
    bert.FAMILY,
    prefixes=("roberta.", ""),
    # The head of the pre-training task, and the layer behind <s>.
    ignored=(
        "position_ids",
        *(f"pooler.dense.{kind}" for kind in ("weight", "bias")),
        *(f"lm_head.{name}" for name in ("bias", "decoder.weight", "decoder.bias")),
        *(f"lm_head.{part}.{kind}" for part in ("dense", "layer_norm") for kind in ("weight", "bias")),
    ),
    epsilon=("layer_norm_eps", 1e-12),
    first_position=("pad_token_id", 1),
)
