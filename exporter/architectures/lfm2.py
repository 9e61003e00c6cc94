"""LFM2: most layers have a short convolution over the latest tokens, the others attention with normalised heads."""

from gguf.constants import MODEL_TENSOR

from edgelm.errors import CheckpointError
from exporter.architectures.shared.family import LAYER, Family, RopeSettings, Rule, Target
from exporter.checkpoint import Checkpoint

_ATTENTION, _CONVOLUTION = "full_attention", "conv"
_PREFIX = LAYER + "self_attn."


def _convolutions(checkpoint: Checkpoint, layers: int) -> tuple[int, ...]:
    """Layers without attention: by ``layer_types`` or, in older configurations, those not in ``full_attn_idxs``."""
    kinds = checkpoint.config.get("layer_types")
    if kinds is None:
        attending = checkpoint.config.get("full_attn_idxs")
        if not isinstance(attending, list):
            return ()
        return tuple(layer for layer in range(layers) if layer not in attending)
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= {_ATTENTION, _CONVOLUTION}:
        raise CheckpointError(
            f"{checkpoint.source.location}: config.json: layer_types is no list of {layers} of "
            f"{_ATTENTION}, {_CONVOLUTION}"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == _CONVOLUTION)


def _attention(name: str, target: MODEL_TENSOR, *widths: str, rotary: bool = False) -> Rule:
    return Rule(_PREFIX + name, target, widths, rotary=rotary, only="attention")


FAMILY = Family(
    targets=(Target("lfm2", square=True),),
    tensors=(
        Rule("model.embed_tokens", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
        # What llama.cpp calls so is the norm of the output.
        Rule("model.embedding_norm", MODEL_TENSOR.TOKEN_EMBD_NORM, ("hidden",)),
    ),
    layer_tensors=(
        Rule(LAYER + "operator_norm", MODEL_TENSOR.ATTN_NORM, ("hidden",)),
        _attention("q_proj", MODEL_TENSOR.ATTN_Q, "query", "hidden", rotary=True),
        _attention("k_proj", MODEL_TENSOR.ATTN_K, "key", "hidden", rotary=True),
        _attention("v_proj", MODEL_TENSOR.ATTN_V, "key", "hidden"),
        _attention("q_layernorm", MODEL_TENSOR.ATTN_Q_NORM, "head"),
        _attention("k_layernorm", MODEL_TENSOR.ATTN_K_NORM, "head"),
        _attention("out_proj", MODEL_TENSOR.ATTN_OUT, "hidden", "query"),
        Rule(LAYER + "conv.in_proj", MODEL_TENSOR.SHORTCONV_INPROJ, ("mixed", "hidden"), only="convolution"),
        Rule(LAYER + "conv.conv", MODEL_TENSOR.SHORTCONV_CONV, ("hidden", "taps"), only="convolution", flat=True),
        Rule(LAYER + "conv.out_proj", MODEL_TENSOR.SHORTCONV_OUTPROJ, ("hidden", "hidden"), only="convolution"),
        Rule(LAYER + "ffn_norm", MODEL_TENSOR.FFN_NORM, ("hidden",)),
        Rule(LAYER + "feed_forward.w1", MODEL_TENSOR.FFN_GATE, ("feed_forward", "hidden")),
        Rule(LAYER + "feed_forward.w3", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden")),
        Rule(LAYER + "feed_forward.w2", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward")),
    ),
    expected={"conv_bias": (False,)},
    epsilon=("norm_eps", 1e-5),
    tied=True,
    rope=RopeSettings(theta=("rope_theta", 1e6)),
    convolutions=_convolutions,
)
