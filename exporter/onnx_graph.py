"""Writes a decoder as a fused ONNX graph: a dozen nodes per layer, attention with its cache and rotation in one.

Inputs: ``input_ids`` (batch, sequence) int64; ``seqlens_k`` (batch,) int32, tokens held after this step less one;
``total_sequence_length`` () int32, the largest number of tokens held after this step; ``logit_rows`` (rows,) int64,
which of the batch * sequence positions get logits; ``past_key_values.N.key`` and ``.value`` (batch, heads, capacity,
head size) float32, of which the engine binds the same memory as ``present.N.key`` and ``.value``.
Output: ``logits`` (rows, vocabulary) float32. From the last attention on, only the wanted rows are computed.

With types that end in ``fp16`` all that is float32 is float16 instead (norms sum in float32 all the same), but for the
logits, which are cast, and what is done with them.

Operators: ONNX opset 23 and com.microsoft 1. Knows how parts are joined; neither their values nor their types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import onnx
from onnx import TensorProto, helper

from exporter.onnx_layout import Decoder, Layer, Part
from exporter.onnx_nodes import MICROSOFT, Nodes, TypeOf
from exporter.onnx_storage import Place, QuantizedMatrix, Storage
from exporter.onnx_types import FP16

OPSET, MICROSOFT_OPSET, IR_VERSION = 23, 1, 11
# What attention can rotate itself; other heads are rotated before it.
_HEAD_STEP, _PAIR_STEP = 16, 8
# Pieces of the output matrix: about this large, at most so many, of whole tiles of rows.
_PIECE_BYTES, _PIECES, _PIECE_ROWS = 2**24, 16, 64


def build_graph(
    decoder: Decoder, type_of: TypeOf, *, metadata: dict[str, str], observed: Mapping[str, str] = MappingProxyType({})
) -> tuple[onnx.ModelProto, Storage]:
    """The model with all weights external, and the layout of the data file that it refers to.

    ``type_of`` tells the type of every matrix. With ``observed`` (name of an output by that of a matrix) sums of
    squares of what these matrices read, by channel, are outputs, too.
    """
    builder = _Builder(decoder, type_of)
    builder.decoder_graph()
    outputs = _outputs(decoder, builder.floats_type)
    for tensor, name in observed.items():
        builder.channel_squares(name, tensor)
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["channels"]))
    inputs = _inputs(decoder, builder.floats_type)
    graph = helper.make_graph(builder.nodes, "decoder", inputs, outputs, initializer=builder.initializers)
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


def _inputs(decoder: Decoder, floats: int) -> list[Any]:
    info = helper.make_tensor_value_info
    values = [
        info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        info("seqlens_k", TensorProto.INT32, ["batch"]),
        info("total_sequence_length", TensorProto.INT32, []),
        info("logit_rows", TensorProto.INT64, ["rows"]),
    ]
    for index, layer in enumerate(decoder.layers):
        shape = _cache_shape(decoder, layer)
        values += [info(f"past_key_values.{index}.{part}", floats, shape) for part in ("key", "value")]
    return values


def _outputs(decoder: Decoder, floats: int) -> list[Any]:
    info = helper.make_tensor_value_info
    values = [info("logits", TensorProto.FLOAT, ["rows", decoder.vocabulary])]
    for index, layer in enumerate(decoder.layers):
        shape = _cache_shape(decoder, layer)
        values += [info(f"present.{index}.{part}", floats, shape) for part in ("key", "value")]
    return values


class _Builder(Nodes):
    """Draws one decoder. ``_residual`` is the stream between the layers; ``_pending`` is still to be added to it,
    which the next norm does in passing."""

    def __init__(self, decoder: Decoder, type_of: TypeOf) -> None:
        super().__init__(type_of, half=type_of(decoder.output_matrix).floats == FP16.floats)
        self.decoder, self.structure = decoder, decoder.structure
        self._residual, self._pending = "", ""
        fits = decoder.head_size % _HEAD_STEP == 0 and (decoder.rotary_size // 2) % _PAIR_STEP == 0
        self._rotates_inside = fits and not decoder.structure.norm_after_rotation
        self._temperature = decoder.structure.rotary.temperature if decoder.structure.rotary else None

    def decoder_graph(self) -> None:
        """All nodes from ``input_ids`` to ``logits``."""
        decoder = self.decoder
        for name, rotation in decoder.rotations.items():
            cosines, sines = rotation.tables(decoder.positions)
            self.external(self.storage.add_computed(f"{name}.cos", cosines).place)
            self.external(self.storage.add_computed(f"{name}.sin", sines).place)
        temperature = self._temperature
        if decoder.learned_positions is not None or temperature or (decoder.rotations and not self._rotates_inside):
            self._position_ids()
        if temperature is not None:
            self._sharpness(*temperature)
        self._residual = self._embedding()
        for index, layer in enumerate(decoder.layers):
            self._layer(f"blk.{index}", layer, last=index == len(decoder.layers) - 1)
        self._head(self._normed("output_norm", decoder.final_norm))

    def _layer(self, prefix: str, layer: Layer, *, last: bool) -> None:
        hidden = self._normed(f"{prefix}.attn_norm", layer.attention_norm)
        attended = self._attention(prefix, layer, hidden)
        if last:
            hidden, attended = self._only_wanted_rows(prefix, layer, hidden, attended)
        found = self._post_norm(
            f"{prefix}.post_attention_norm",
            self.linear(f"{prefix}.attn_output", attended, [layer.output]),
            layer.attention_post_norm,
        )
        parallel = self.structure.parallel_residual
        if not parallel:
            self._pending = found
        if not parallel or layer.feed_forward_norm is not None:
            hidden = self._normed(f"{prefix}.ffn_norm", layer.feed_forward_norm)
        added = self._feed_forward(prefix, layer, hidden)
        added = self._post_norm(f"{prefix}.post_ffw_norm", added, layer.feed_forward_post_norm)
        self._pending = self.node("Add", [found, added], f"{prefix}.both") if parallel else added

    def _only_wanted_rows(self, prefix: str, layer: Layer, hidden: str, attended: str) -> tuple[str, str]:
        """Drop all rows that get no logits: nothing behind the last attention looks at others."""
        width = self.decoder.hidden
        is_shared = hidden == self._residual
        self._residual = self._wanted_rows(f"{prefix}.residual.rows", self._residual, width)
        if is_shared:
            hidden = self._residual
        elif self.structure.parallel_residual and layer.feed_forward_norm is None:
            hidden = self._wanted_rows(f"{prefix}.attn_norm.rows", hidden, width)
        heads = layer.heads * self.decoder.head_size
        return hidden, self._wanted_rows(f"{prefix}.attn.rows", attended, heads)

    # --- norms

    def _normed(self, name: str, norm: Part | None) -> str:
        """The norm of the stream with what was pending added; without a norm the stream itself."""
        if norm is None:
            if self._pending:
                self._residual = self.node("Add", [self._residual, self._pending], f"{name}.sum")
                self._pending = ""
            return self._residual
        if not self._pending:
            return self._norm(name, self._residual, norm)
        is_rms = self.structure.norm == "rms"
        operator = "SkipSimplifiedLayerNormalization" if is_rms else "SkipLayerNormalization"
        inputs = [self._pending, self._residual, *self._norm_weights(name, norm)]
        self.emit(operator, inputs, [name, "", "", f"{name}.sum"], {"epsilon": self.structure.epsilon})
        self._residual, self._pending = f"{name}.sum", ""
        return name

    def _norm(self, name: str, hidden: str, norm: Part) -> str:
        operator = "RMSNormalization" if self.structure.norm == "rms" else "LayerNormalization"
        attributes = {"axis": -1, "epsilon": self.structure.epsilon}
        return self.node(operator, [hidden, *self._norm_weights(name, norm)], name, attributes)

    def _norm_weights(self, name: str, norm: Part) -> list[str]:
        weights = [self.floats(f"{name}.weight", [norm.weight])]
        return weights if norm.bias is None else [*weights, self.floats(f"{name}.bias", [norm.bias])]

    def _post_norm(self, name: str, hidden: str, norm: Part | None) -> str:
        return hidden if norm is None else self._norm(name, hidden, norm)

    # --- embedding and positions

    def _embedding(self) -> str:
        hidden = self._rows_of_table()
        if self.decoder.embedding_factors is not None:
            factors = self.external(
                self.storage.add_computed("embedding.factors", self.decoder.embedding_factors).place
            )
            hidden = self.node("Mul", [hidden, factors], "embedding.even")
        if self.structure.embedding_scale != 1.0:
            factor = self.scalar("embedding.scale", float(self.structure.embedding_scale))
            hidden = self.node("Mul", [hidden, factor], "embedding.scaled")
        if self.decoder.learned_positions is not None:
            table = self.floats("position_embd.weight", [self.decoder.learned_positions])
            rows = self.node("Gather", [table, "position_ids"], "positions", {"axis": 0})
            hidden = self.node("Add", [hidden, rows], "embedding.placed")
        return hidden

    def _rows_of_table(self) -> str:
        table = self.decoder.embedding
        kind = self.type_of(table)
        if not kind.is_quantized:
            return self.node(
                "Gather", [self.floats("token_embd.weight", [table]), "input_ids"], "embedding", {"axis": 0}
            )
        matrix = self.quantized("token_embd", [table], kind)
        rows, blocks, block_bytes = matrix.data.shape
        # The head uses the same bytes in its own shape: two initializers, one place in the file.
        data = self.external(matrix.data.reshaped("token_embd.rows", (rows, blocks * block_bytes)))
        scales = [self.external(place) for place in (matrix.scales, matrix.zeros) if place is not None]
        inputs = [data, "input_ids", *scales]
        attributes = {"bits": kind.bits, "block_size": kind.block, "gather_axis": 0, "quantize_axis": 1}
        hidden = self.node("GatherBlockQuantized", inputs, "embedding", attributes)
        if blocks * kind.block == self.decoder.hidden:
            return hidden
        ends = self.whole_numbers("embedding.end", [self.decoder.hidden])
        inputs = [hidden, self.whole_numbers("embedding.start", [0]), ends, self.whole_numbers("embedding.axis", [2])]
        return self.node("Slice", inputs, "embedding.unpadded")

    def channel_squares(self, name: str, tensor: str) -> None:
        """An output of the sums of squares, over all rows, of each channel that a matrix reads."""
        flat = self.node("Flatten", [self.read_by[tensor]], f"{name}.flat", {"axis": -1})
        self.node("ReduceSumSquare", [flat, self.whole_numbers("squares.rows", [0])], name, {"keepdims": 0})

    def _position_ids(self) -> None:
        """(batch, sequence): the last token of each row stands at its ``seqlens_k``."""
        count = self.node("Shape", ["input_ids"], "position.count", {"start": 1, "end": 2})
        ends = self.node("Cast", ["seqlens_k"], "position.ends", {"to": int(TensorProto.INT64)})
        columns = self.node("Unsqueeze", [ends, self.whole_numbers("position.axis", [1])], "position.column")
        one, nothing = self.scalar("position.one", 1), self.scalar("position.zero", 0)
        before = self.node("Sub", [count, one], "position.before")
        starts = self.node("Sub", [columns, before], "position.starts")
        length = self.node("Squeeze", [count], "position.length")
        steps = self.node("Range", [nothing, length, one], "position.steps")
        self.node("Add", [starts, steps], "position_ids")

    def _sharpness(self, growth: float, step: int) -> None:
        """(batch, sequence, 1): what queries are multiplied by, 1 + growth * log(1 + position // step).

        In float32: positions are beyond float16.
        """
        steps = self.node("Div", ["position_ids", self.scalar("sharpness.step", step)], "sharpness.steps")
        count = self.node("Cast", [steps], "sharpness.count", {"to": int(TensorProto.FLOAT)})
        one = self.scalar("sharpness.one", 1.0, exact=True)
        logarithm = self.node("Log", [self.node("Add", [count, one], "sharpness.counted")], "sharpness.log")
        factor = self.scalar("sharpness.growth", float(growth), exact=True)
        grown = self.node("Mul", [logarithm, factor], "sharpness.grown")
        scale = self.node("Add", [grown, one], "sharpness.scale")
        if self.half:
            scale = self.node("Cast", [scale], "sharpness.rounded", {"to": self.floats_type})
        self.node("Unsqueeze", [scale, self.whole_numbers("sharpness.axis", [2])], "sharpness")

    # --- attention

    def _attention(self, prefix: str, layer: Layer, hidden: str) -> str:
        index = prefix.rpartition(".")[2]
        rotates = layer.rotation is not None
        outside = rotates and not self._rotates_inside
        apart = outside or layer.query_norm is not None or self._temperature is not None
        inputs = self._attention_inputs(prefix, layer, hidden, apart=apart)
        if self._temperature is not None:
            inputs[0] = self.node("Mul", [inputs[0], "sharpness"], f"{prefix}.attn_q.sharp")
        if not self.structure.norm_after_rotation:
            inputs = self._query_norms(prefix, layer, inputs)
        if outside:
            inputs = [
                self._rotated(f"{prefix}.attn_q.rotated", layer, inputs[0], layer.heads),
                self._rotated(f"{prefix}.attn_k.rotated", layer, inputs[1], layer.kv_heads),
                inputs[2],
            ]
        if self.structure.norm_after_rotation:
            inputs = self._query_norms(prefix, layer, inputs)
        inputs += [f"past_key_values.{index}.key", f"past_key_values.{index}.value", "seqlens_k"]
        inputs.append("total_sequence_length")
        attributes: dict[str, int | float | str] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads}
        if rotates and self._rotates_inside:
            inputs += [f"{layer.rotation}.cos", f"{layer.rotation}.sin"]
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(self.decoder.adjacent)}
        if not math.isclose(self.structure.attention_scale, self.decoder.head_size**-0.5):
            attributes["scale"] = float(self.structure.attention_scale)
        if self.structure.attention_softcap:
            attributes["softcap"] = float(self.structure.attention_softcap)
        if layer.window:
            attributes["local_window_size"] = layer.window
        outputs = [f"{prefix}.attn", f"present.{index}.key", f"present.{index}.value"]
        return self.emit("GroupQueryAttention", inputs, outputs, attributes)

    def _attention_inputs(self, prefix: str, layer: Layer, hidden: str, *, apart: bool) -> list[str]:
        """Queries, keys and values, in one where they may be."""
        if len(layer.inputs) == 1 or (not apart and self.joinable(layer.inputs)):
            packed = self.linear(f"{prefix}.attn_qkv", hidden, layer.inputs)
            if not apart:
                return [packed, "", ""]
            size = self.decoder.head_size
            widths = [layer.heads * size, layer.kv_heads * size, layer.kv_heads * size]
            names = [f"{prefix}.attn_{letter}" for letter in "qkv"]
            self.emit("Split", [packed, self.whole_numbers(f"{prefix}.attn_qkv.widths", widths)], names, {"axis": -1})
        else:
            names = [
                self.linear(f"{prefix}.attn_{letter}", hidden, [part])
                for letter, part in zip("qkv", layer.inputs, strict=True)
            ]
        return names

    def _query_norms(self, prefix: str, layer: Layer, inputs: list[str]) -> list[str]:
        """Queries and keys normalised, where a family does so."""
        if layer.query_norm is None or layer.key_norm is None:
            return inputs
        queries = self._query_norm(f"{prefix}.attn_q_norm", inputs[0], layer.query_norm, layer.heads)
        return [
            queries,
            self._query_norm(f"{prefix}.attn_k_norm", inputs[1], layer.key_norm, layer.kv_heads),
            inputs[2],
        ]

    def _query_norm(self, name: str, rows: str, norm: Part, heads: int) -> str:
        if self.structure.query_norm == "all":
            return self._norm(name, rows, norm)
        size = self.decoder.head_size
        by_head = self.node("Reshape", [rows, self.whole_numbers("heads.apart", [0, 0, -1, size])], f"{name}.heads")
        normed = self._norm(name, by_head, norm)
        together = self.whole_numbers(f"heads.together.{heads}", [0, 0, heads * size])
        return self.node("Reshape", [normed, together], f"{name}.rows")

    def _rotated(self, name: str, layer: Layer, rows: str, heads: int) -> str:
        attributes = {
            "num_heads": heads,
            "interleaved": int(self.decoder.adjacent),
            "rotary_embedding_dim": self.decoder.rotary_size
            if self.decoder.rotary_size < self.decoder.head_size
            else 0,
        }
        inputs = [rows, f"{layer.rotation}.cos", f"{layer.rotation}.sin", "position_ids"]
        return self.node("RotaryEmbedding", inputs, name, attributes)

    # --- the rest

    def _feed_forward(self, prefix: str, layer: Layer, hidden: str) -> str:
        if layer.joined_gate:
            both = self.linear(f"{prefix}.ffn_up", hidden, [layer.up])
            names = [f"{prefix}.ffn_gate", f"{prefix}.ffn_up.rows"]
            self.emit("Split", [both], names, {"axis": -1, "num_outputs": 2})
            gate, up = names
        else:
            gate = "" if layer.gate is None else self.linear(f"{prefix}.ffn_gate", hidden, [layer.gate])
            up = self.linear(f"{prefix}.ffn_up", hidden, [layer.up])
        if not gate:
            return self.linear(f"{prefix}.ffn_down", self._activation(f"{prefix}.ffn_act", up), [layer.down])
        product = self.node("Mul", [self._activation(f"{prefix}.ffn_act", gate), up], f"{prefix}.ffn_mul")
        return self.linear(f"{prefix}.ffn_down", product, [layer.down])

    def _activation(self, name: str, hidden: str) -> str:
        if self.structure.activation == "silu":
            # x * sigmoid(x): QuickGelu with alpha 1 is SiLU in one pass.
            return self.node("QuickGelu", [hidden], name, {"alpha": 1.0})
        if self.structure.activation == "relu2":
            positive = self.node("Relu", [hidden], f"{name}.positive")
            return self.node("Mul", [positive, positive], name)
        approximate = "tanh" if self.structure.activation == "gelu_tanh" else "none"
        return self.node("Gelu", [hidden], name, {"approximate": approximate})

    def _wanted_rows(self, name: str, hidden: str, width: int) -> str:
        flat = self.node("Reshape", [hidden, self.whole_numbers(f"{name}.shape", [-1, width])], f"{name}.flat")
        return self.node("Gather", [flat, "logit_rows"], name, {"axis": 0})

    def _head(self, hidden: str) -> None:
        table = self.decoder.output_matrix
        kind = self.type_of(table)
        name = "token_embd" if self.decoder.head is None else "output"
        cap = self.structure.logit_softcap
        capped_from = "logits.uncapped" if cap else "logits"
        output = "logits.half" if self.half else capped_from
        self.read_by[table.name] = hidden
        whole: QuantizedMatrix | Place
        if kind.is_quantized:
            whole = self.quantized(name, [table], kind)
            size_bytes = whole.data.size_bytes
        else:
            whole = self.float_place(f"{name}.weight", [table])
            size_bytes = whole.size_bytes
        cuts = self._cuts(table.shape[0], size_bytes)
        if len(cuts) == 1:
            self._head_rows(hidden, whole, output)
        else:
            pieces = [
                self._head_rows(hidden, whole.rows(f"head.{start}", start, stop), f"logits.{start}", start)
                for start, stop in cuts
            ]
            self.node("Concat", pieces, output, {"axis": -1})
        if self.half:
            self.node("Cast", [output], capped_from, {"to": int(TensorProto.FLOAT)})
        if cap:
            inverse = self.scalar("logits.inverse_cap", 1 / cap, exact=True)
            shares = self.node("Mul", [capped_from, inverse], "logits.shares")
            bounded = self.node("Tanh", [shares], "logits.bounded")
            self.node("Mul", [bounded, self.scalar("logits.cap", float(cap), exact=True)], "logits")

    def _cuts(self, rows: int, size_bytes: int) -> list[tuple[int, int]]:
        """First and last row of each piece of the output matrix.

        A kernel packs its matrix into memory of its own, and what is packed last stands beside its mapped pages when
        all others are packed already: the peak of loading. So it is packed piece by piece. Not for GPUs, which have
        no use for it and pay for every node.
        """
        count = 1 if self.half else min(-(-size_bytes // _PIECE_BYTES), _PIECES)
        step = -(-rows // count // _PIECE_ROWS) * _PIECE_ROWS
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _head_rows(self, hidden: str, matrix: QuantizedMatrix | Place, output: str, start: int | None = None) -> str:
        """Logits of a matrix that has all rows of the output matrix, or some from ``start`` on."""
        found, bias = self.decoder.head_bias, None
        if found is not None:
            place = self.float_place("output.bias", [found])
            rows = matrix.shape[0] if isinstance(matrix, Place) else matrix.data.shape[0]
            bias = self.external(place if start is None else place.rows(f"head.{start}.bias", start, start + rows))
        if not isinstance(matrix, Place):
            return self.quantized_linear(matrix, hidden, bias, output)
        inputs = [hidden, self.external(matrix), *([bias] if bias else [])]
        return self.node("Gemm", inputs, output, {"transB": 1})
