"""Writes a decoder as a fused ONNX graph: a dozen nodes per layer, attention with its cache and rotation in one.

Inputs: ``input_ids`` (batch, sequence) int64; ``seqlens_k`` (batch,) int32, tokens held after this step less one;
``total_sequence_length`` () int32, the largest number of tokens held after this step; ``logit_rows`` (rows,) int64,
which of the batch * sequence positions get logits; ``past_key_values.N.key`` and ``.value`` (batch, heads, capacity,
head size) float32, of which the engine binds the same memory as ``present.N.key`` and ``.value``.
Output: ``logits`` (rows, vocabulary) float32. From the last attention on, only the wanted rows are computed.

Operators: ONNX opset 23 and com.microsoft 1. Constants that shapes depend on are inline, because shape inference
cannot read external data. Knows types and places of weights, not their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporter.architectures.base import TensorDescription
from exporter.onnx_layout import Decoder, Layer, Part
from exporter.onnx_storage import DATA_NAME, Place, QuantizedMatrix, Storage
from exporter.onnx_types import WeightType

OPSET, MICROSOFT_OPSET, IR_VERSION = 23, 1, 11
MICROSOFT = "com.microsoft"
# 4: activations may be quantised to int8 per block; the weights' rounding costs far more, and it is twice as fast.
ACCURACY_LEVEL = 4
_DTYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}

_MICROSOFT_OPERATORS = frozenset(
    {"GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "QuickGelu", "SkipSimplifiedLayerNormalization"}
)

TypeOf = Callable[[TensorDescription], WeightType]
Attributes = Mapping[str, int | float]
_NONE: Attributes = MappingProxyType({})


def build_graph(
    decoder: Decoder, type_of: TypeOf, *, rotary_positions: int, metadata: dict[str, str]
) -> tuple[onnx.ModelProto, Storage]:
    """The model with all weights external, and the layout of the data file that it refers to.

    ``type_of`` tells the type of every matrix. ``rotary_positions`` is the longest context that can be computed.
    """
    builder = _Builder(decoder, type_of)
    builder.decoder_graph(rotary_positions)
    graph = helper.make_graph(
        builder.nodes, "decoder", _inputs(decoder), _outputs(decoder), initializer=builder.initializers
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, MICROSOFT_OPSET)],
        ir_version=IR_VERSION,
        producer_name="edgelm",
    )
    helper.set_model_props(model, metadata)
    return model, builder.storage


def _cache_shape(decoder: Decoder, layer: Layer) -> list[str | int]:
    return ["batch", layer.kv_heads, "capacity", decoder.head_size]


def _inputs(decoder: Decoder) -> list[Any]:
    info = helper.make_tensor_value_info
    values = [
        info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        info("seqlens_k", TensorProto.INT32, ["batch"]),
        info("total_sequence_length", TensorProto.INT32, []),
        info("logit_rows", TensorProto.INT64, ["rows"]),
    ]
    for index, layer in enumerate(decoder.layers):
        shape = _cache_shape(decoder, layer)
        values += [info(f"past_key_values.{index}.{part}", TensorProto.FLOAT, shape) for part in ("key", "value")]
    return values


def _outputs(decoder: Decoder) -> list[Any]:
    info = helper.make_tensor_value_info
    values = [info("logits", TensorProto.FLOAT, ["rows", decoder.vocabulary])]
    for index, layer in enumerate(decoder.layers):
        shape = _cache_shape(decoder, layer)
        values += [info(f"present.{index}.{part}", TensorProto.FLOAT, shape) for part in ("key", "value")]
    return values


class _Builder:
    """Nodes, initializers and data file of one model as they grow. Methods return names of values."""

    def __init__(self, decoder: Decoder, type_of: TypeOf) -> None:
        self.decoder, self.type_of = decoder, type_of
        self.storage = Storage()
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._matrices: dict[str, QuantizedMatrix] = {}
        self._known: set[str] = set()

    def decoder_graph(self, rotary_positions: int) -> None:
        """All nodes from ``input_ids`` to ``logits``."""
        decoder = self.decoder
        angles = np.arange(rotary_positions)[:, None] * decoder.rotary.frequencies[None, :]
        self._external(self.storage.add_computed("rotary.cos", np.cos(angles).astype(np.float32)).place)
        self._external(self.storage.add_computed("rotary.sin", np.sin(angles).astype(np.float32)).place)
        residual = self._embedding()
        hidden = self._first_norm(residual, decoder.layers[0].attention_norm)
        for index, layer in enumerate(decoder.layers):
            prefix, last = f"blk.{index}", index == len(decoder.layers) - 1
            hidden = self._attention(prefix, layer, hidden)
            if last:
                hidden = self._wanted_rows(f"{prefix}.attn.rows", hidden, layer.heads * decoder.head_size)
                residual = self._wanted_rows(f"{prefix}.residual.rows", residual, decoder.hidden)
            hidden = self._linear(f"{prefix}.attn_output", hidden, [layer.output])
            hidden, residual = self._skip_norm(f"{prefix}.ffn_norm", hidden, residual, layer.feed_forward_norm)
            hidden = self._feed_forward(prefix, layer, hidden)
            norm = decoder.final_norm if last else decoder.layers[index + 1].attention_norm
            name = "output_norm" if last else f"blk.{index + 1}.attn_norm"
            hidden, residual = self._skip_norm(name, hidden, residual, norm)
        self._head(hidden)

    def _embedding(self) -> str:
        table = self.decoder.embedding
        kind = self.type_of(table)
        if not kind.is_quantized:
            return self._node(
                "Gather", [self._floats("token_embd.weight", [table]), "input_ids"], "embedding", {"axis": 0}
            )
        matrix = self._quantized("token_embd", [table], kind)
        rows, blocks, block_bytes = matrix.data.shape
        # The head uses the same bytes in its own shape: two initializers, one place in the file.
        data = self._external(matrix.data.reshaped("token_embd.rows", (rows, blocks * block_bytes)))
        inputs = [data, "input_ids", matrix.scales.name, *([matrix.zeros.name] if matrix.zeros else [])]
        attributes = {"bits": kind.bits, "block_size": kind.block, "gather_axis": 0, "quantize_axis": 1}
        hidden = self._node("GatherBlockQuantized", inputs, "embedding", attributes)
        if blocks * kind.block == self.decoder.hidden:
            return hidden
        ends = self._constant("embedding.end", [self.decoder.hidden])
        inputs = [hidden, self._constant("embedding.start", [0]), ends, self._constant("embedding.axis", [2])]
        return self._node("Slice", inputs, "embedding.unpadded")

    def _first_norm(self, hidden: str, norm: TensorDescription) -> str:
        inputs = [hidden, self._floats("blk.0.attn_norm.weight", [norm])]
        attributes = {"axis": -1, "epsilon": self.decoder.epsilon}
        return self._node("RMSNormalization", inputs, "blk.0.attn_norm", attributes)

    def _skip_norm(self, name: str, hidden: str, residual: str, norm: TensorDescription) -> tuple[str, str]:
        """The norm of ``hidden + residual``, and the sum."""
        inputs = [hidden, residual, self._floats(f"{name}.weight", [norm])]
        outputs = [name, "", "", f"{name}.sum"]
        self._emit("SkipSimplifiedLayerNormalization", inputs, outputs, {"epsilon": self.decoder.epsilon})
        return name, f"{name}.sum"

    def _attention(self, prefix: str, layer: Layer, hidden: str) -> str:
        parts = {"attn_q": layer.query, "attn_k": layer.key, "attn_v": layer.value}
        index = prefix.rpartition(".")[2]
        if self._joinable(list(parts.values())):
            packed = self._linear(f"{prefix}.attn_qkv", hidden, list(parts.values()))
            inputs = [packed, "", ""]
        else:
            inputs = [self._linear(f"{prefix}.{name}", hidden, [part]) for name, part in parts.items()]
        inputs += [f"past_key_values.{index}.key", f"past_key_values.{index}.value", "seqlens_k"]
        inputs += ["total_sequence_length", "rotary.cos", "rotary.sin"]
        outputs = [f"{prefix}.attn", f"present.{index}.key", f"present.{index}.value"]
        attributes = {
            "num_heads": layer.heads,
            "kv_num_heads": layer.kv_heads,
            "do_rotary": 1,
            "rotary_interleaved": int(self.decoder.rotary.adjacent),
        }
        return self._emit("GroupQueryAttention", inputs, outputs, attributes)

    def _joinable(self, parts: Sequence[Part]) -> bool:
        """Whether matrices can be one: same type, and biases for all or for none."""
        return (
            len({self.type_of(part.weight) for part in parts}) == 1 and len({part.bias is None for part in parts}) == 1
        )

    def _feed_forward(self, prefix: str, layer: Layer, hidden: str) -> str:
        gate = self._linear(f"{prefix}.ffn_gate", hidden, [layer.gate])
        up = self._linear(f"{prefix}.ffn_up", hidden, [layer.up])
        # x * sigmoid(x): QuickGelu with alpha 1 is SiLU in one pass.
        gate = self._node("QuickGelu", [gate], f"{prefix}.ffn_act", {"alpha": 1.0})
        return self._linear(f"{prefix}.ffn_down", self._node("Mul", [gate, up], f"{prefix}.ffn_mul"), [layer.down])

    def _wanted_rows(self, name: str, hidden: str, width: int) -> str:
        flat = self._node("Reshape", [hidden, self._constant(f"{name}.shape", [-1, width])], f"{name}.flat")
        return self._node("Gather", [flat, "logit_rows"], name, {"axis": 0})

    def _head(self, hidden: str) -> None:
        table = self.decoder.output_matrix
        kind = self.type_of(table)
        name = "token_embd" if self.decoder.head is None else "output"
        if kind.is_quantized:
            self._quantized_linear(self._quantized(name, [table], kind), hidden, None, "logits")
        else:
            weight = self._floats(f"{name}.weight", [table])
            self._node("Gemm", [hidden, weight], "logits", {"transB": 1})

    def _linear(self, name: str, hidden: str, parts: Sequence[Part]) -> str:
        weights = [part.weight for part in parts]
        biases = [part.bias for part in parts if part.bias is not None]
        bias = self._floats(f"{name}.bias", biases) if biases else None
        kind = self.type_of(weights[0])
        if kind.is_quantized:
            return self._quantized_linear(self._quantized(name, weights, kind), hidden, bias, name)
        weight = self._floats(f"{name}.weight", weights, transposed=True)
        if bias is None:
            return self._node("MatMul", [hidden, weight], name)
        product = self._node("MatMul", [hidden, weight], f"{name}.product")
        return self._node("Add", [product, bias], name)

    def _quantized_linear(self, matrix: QuantizedMatrix, hidden: str, bias: str | None, output: str) -> str:
        inputs = [
            hidden,
            self._external(matrix.data),
            matrix.scales.name,
            matrix.zeros.name if matrix.zeros else "",
            "",
            bias or "",
        ]
        while not inputs[-1]:
            inputs.pop()
        attributes = {
            "K": matrix.parts[0].shape[1],
            "N": matrix.data.shape[0],
            "bits": matrix.kind.bits,
            "block_size": matrix.kind.block,
            "accuracy_level": ACCURACY_LEVEL,
        }
        return self._node("MatMulNBits", inputs, output, attributes)

    def _quantized(self, name: str, weights: Sequence[TensorDescription], kind: WeightType) -> QuantizedMatrix:
        if name not in self._matrices:
            matrix = self.storage.add_quantized(f"{name}.weight", weights, kind)
            self._external(matrix.scales)
            if matrix.zeros is not None:
                self._external(matrix.zeros)
            self._matrices[name] = matrix
        return self._matrices[name]

    def _floats(self, name: str, parts: Sequence[TensorDescription], *, transposed: bool = False) -> str:
        if name not in self._known:
            self._external(self.storage.add_float(name, parts, transposed=transposed).place)
        return name

    def _external(self, place: Place) -> str:
        tensor = TensorProto(name=place.name, data_type=_DTYPES[place.dtype], dims=place.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA_NAME), ("offset", place.offset), ("length", place.size_bytes)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        self.initializers.append(tensor)
        self._known.add(place.name)
        return place.name

    def _constant(self, name: str, values: Sequence[int]) -> str:
        if name not in self._known:
            self._known.add(name)
            self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def _node(self, operator: str, inputs: Sequence[str], output: str, attributes: Attributes = _NONE) -> str:
        return self._emit(operator, inputs, [output], attributes)

    def _emit(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes = _NONE
    ) -> str:
        """Append a node named as its first output. Operators that ONNX does not define are Microsoft's."""
        domain = MICROSOFT if operator in _MICROSOFT_OPERATORS else ""
        node = helper.make_node(operator, inputs, outputs, name=outputs[0], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return outputs[0]
