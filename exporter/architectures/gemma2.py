"""Gemma 2: norms before and after each part, soft-caps, every other layer with a window; norms are stored less one."""

from gguf.constants import MODEL_TENSOR, Keys

from exporter.architectures.shared.family import LAYER, Family, Number, Rule, Target, Windows, attention_tensors

GEMMA_GLOBALS = (
    Rule("model.embed_tokens", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
    Rule("model.norm", MODEL_TENSOR.OUTPUT_NORM, ("hidden",), offset=1.0),
)


def gemma_layers(query_key: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """A layer around its attention's inputs."""
    return (
        Rule(LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",), offset=1.0),
        *query_key,
        Rule(LAYER + "self_attn.o_proj", MODEL_TENSOR.ATTN_OUT, ("hidden", "query")),
        Rule(LAYER + "post_attention_layernorm", MODEL_TENSOR.ATTN_POST_NORM, ("hidden",), offset=1.0),
        Rule(LAYER + "pre_feedforward_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",), offset=1.0),
        Rule(LAYER + "mlp.gate_proj", MODEL_TENSOR.FFN_GATE, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.up_proj", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden")),
        Rule(LAYER + "mlp.down_proj", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward")),
        Rule(LAYER + "post_feedforward_layernorm", MODEL_TENSOR.FFN_POST_NORM, ("hidden",), offset=1.0),
    )


FAMILY = Family(
    targets=(Target("gemma2", windows=True, head="tied"),),
    tensors=GEMMA_GLOBALS,
    layer_tensors=gemma_layers(attention_tensors("none")),
    expected={"hidden_activation": ("gelu_pytorch_tanh", None), "attention_bias": (False,)},
    numbers=(
        Number("attn_logit_softcapping", Keys.LLM.ATTN_LOGIT_SOFTCAPPING),
        Number("final_logit_softcapping", Keys.LLM.FINAL_LOGIT_SOFTCAPPING),
    ),
    activation="gelu_tanh",
    norm_place="both",
    tied=True,
    scaled_embedding=True,
    head_size=256,
    windows=Windows("periodic", period=2, default=4096),
    query_scalar=("query_pre_attn_scalar", 256.0),
)
