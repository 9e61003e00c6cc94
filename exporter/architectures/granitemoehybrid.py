"""Granite 4, the dense ones without recurrent layers: a Granite 3 with gate and up in one matrix."""

from dataclasses import replace

from gguf.constants import MODEL_TENSOR

from exporter.architectures import granite
from exporter.architectures.shared.family import LAYER, SILU, Rule, attention_tensors
from exporter.checkpoint import Checkpoint

_ATTENTION = ("attention", "full_attention")  # before and since transformers 5


def _check(checkpoint: Checkpoint) -> list[str]:
    kinds = checkpoint.config.get("layer_types")
    other = [kind for kind in kinds if kind not in _ATTENTION] if isinstance(kinds, list) else ["mamba"]
    return [f"it has layers of kind {other[0]}, which are not supported: only attention is"] if other else []


FAMILY = replace(
    granite.FAMILY,
    layer_tensors=(
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",)),
        *attention_tensors("none"),
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query")),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",)),
        Rule(LAYER + "shared_mlp.input_linear", MODEL_TENSOR.FFN_GATE, ("feed_forward", "hidden"), half=1),
        Rule(LAYER + "shared_mlp.input_linear", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), half=2),
        Rule(LAYER + "shared_mlp.output_linear", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward")),
    ),
    expected={**SILU, "position_embedding_type": ("rope",), "attention_bias": (False,)},
    check=_check,
)
