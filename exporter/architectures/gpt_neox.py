"""GPT-NeoX and Pythia: attention and feed-forward network side by side, a part of each head rotates."""

from gguf.constants import MODEL_TENSOR

from exporter.architectures.shared.family import Family, RopeSettings, Rule, Target

_LAYER = "layers.{layer}."

FAMILY = Family(
    targets=(Target("gptneox", square=True, head="required"),),
    tensors=(
        Rule("embed_in", MODEL_TENSOR.TOKEN_EMBD, ("vocabulary", "hidden")),
        Rule("final_layer_norm", MODEL_TENSOR.OUTPUT_NORM, ("hidden",), bias="required"),
    ),
    layer_tensors=(
        Rule(_LAYER + "input_layernorm", MODEL_TENSOR.ATTN_NORM, ("hidden",), bias="required"),
        Rule(
            _LAYER + "attention.query_key_value", MODEL_TENSOR.ATTN_QKV, ("qkv", "hidden"), bias="required", split=True
        ),
        Rule(_LAYER + "attention.dense", MODEL_TENSOR.ATTN_OUT, ("hidden", "query"), bias="required"),
        Rule(_LAYER + "post_attention_layernorm", MODEL_TENSOR.FFN_NORM, ("hidden",), bias="required"),
        Rule(_LAYER + "mlp.dense_h_to_4h", MODEL_TENSOR.FFN_UP, ("feed_forward", "hidden"), bias="required"),
        Rule(_LAYER + "mlp.dense_4h_to_h", MODEL_TENSOR.FFN_DOWN, ("hidden", "feed_forward"), bias="required"),
    ),
    head="embed_out",
    prefixes=("gpt_neox.",),
    ignored=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
    expected={"hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "attention_bias": (True,)},
    norm="layer",
    epsilon=("layer_norm_eps", 1e-5),
    activation="gelu",
    rope=RopeSettings(theta=("rotary_emb_base", 10000.0), share=("rotary_pct", 0.25)),
    parallel_residual=("use_parallel_residual", True),
)
