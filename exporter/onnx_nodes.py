"""Nodes and weights of an ONNX graph as it grows: what every part of a decoder is put together from.

Knows operators, types and places of weights; neither their values nor how a decoder is joined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from onnx import TensorProto, helper

from exporter.architectures.base import TensorDescription
from exporter.onnx_layout import Part
from exporter.onnx_storage import DATA_NAME, Place, QuantizedMatrix, Storage
from exporter.onnx_types import WeightType

MICROSOFT = "com.microsoft"
# 4: activations may be quantised to int8 per block; the weights' rounding costs far more, and it is twice as fast.
ACCURACY_LEVEL = 4
_DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}
_MICROSOFT_OPERATORS = frozenset(
    {
        "GatherBlockQuantized",
        "GroupQueryAttention",
        "MatMulNBits",
        "QuickGelu",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)

TypeOf = Callable[[TensorDescription], WeightType]
Attributes = Mapping[str, int | float | str]
NONE: Attributes = MappingProxyType({})


class Nodes:
    """Nodes, initializers and data file of one model. Methods return names of values.

    ``half``: all that is computed is float16, which a matrix multiplies exactly; otherwise float32.
    """

    def __init__(self, type_of: TypeOf, *, half: bool = False) -> None:
        self.type_of, self.half = type_of, half
        self.storage = Storage("float16" if half else "float32")
        self.floats_type = int(TensorProto.FLOAT16 if half else TensorProto.FLOAT)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._matrices: dict[str, QuantizedMatrix] = {}
        self._floats: dict[str, Place] = {}
        self._known: set[str] = set()
        self.read_by: dict[str, str] = {}
        """What each matrix reads, by its tensor's name."""

    def node(self, operator: str, inputs: Sequence[str], output: str, attributes: Attributes = NONE) -> str:
        """Append a node with one output."""
        return self.emit(operator, inputs, [output], attributes)

    def emit(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes = NONE) -> str:
        """Append a node named as its first output. Operators that ONNX does not define are Microsoft's."""
        domain = MICROSOFT if operator in _MICROSOFT_OPERATORS else ""
        node = helper.make_node(operator, inputs, outputs, name=outputs[0], domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return outputs[0]

    def whole_numbers(self, name: str, values: Sequence[int]) -> str:
        """An inline int64 vector: shape inference cannot read external data."""
        if name not in self._known:
            self._known.add(name)
            self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def scalar(self, name: str, value: float, *, exact: bool = False) -> str:
        """An inline number of the graph's float type, float32 when ``exact``; whole ones given as ``int`` are int64."""
        if name not in self._known:
            self._known.add(name)
            kind = TensorProto.FLOAT if exact else self.floats_type
            kind = TensorProto.INT64 if isinstance(value, int) else kind
            self.initializers.append(helper.make_tensor(name, kind, [], [value]))
        return name

    def joinable(self, parts: Sequence[Part]) -> bool:
        """Whether matrices can be one: same type, and biases for all or for none."""
        return (
            len({self.type_of(part.weight) for part in parts}) == 1 and len({part.bias is None for part in parts}) == 1
        )

    def linear(self, name: str, hidden: str, parts: Sequence[Part]) -> str:
        """The product with matrices below each other, and their biases."""
        weights = [part.weight for part in parts]
        biases = [part.bias for part in parts if part.bias is not None]
        bias = self.floats(f"{name}.bias", biases) if biases else None
        kind = self.type_of(weights[0])
        self.read_by |= {weight.name: hidden for weight in weights}
        if kind.is_quantized:
            return self.quantized_linear(self.quantized(name, weights, kind), hidden, bias, name)
        weight = self.floats(f"{name}.weight", weights, transposed=True)
        if bias is None:
            return self.node("MatMul", [hidden, weight], name)
        product = self.node("MatMul", [hidden, weight], f"{name}.product")
        return self.node("Add", [product, bias], name)

    def quantized_linear(self, matrix: QuantizedMatrix, hidden: str, bias: str | None, output: str) -> str:
        """The product with a quantised matrix."""
        inputs = [
            hidden,
            self.external(matrix.data),
            self.external(matrix.scales),
            self.external(matrix.zeros) if matrix.zeros else "",
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
        }
        if not self.half:
            attributes["accuracy_level"] = ACCURACY_LEVEL
        return self.node("MatMulNBits", inputs, output, attributes)

    def quantized(self, name: str, weights: Sequence[TensorDescription], kind: WeightType) -> QuantizedMatrix:
        """Matrices below each other as one quantised one; asked for again, the same."""
        if name not in self._matrices:
            self._matrices[name] = self.storage.add_quantized(f"{name}.weight", weights, kind)
        return self._matrices[name]

    def floats(self, name: str, parts: Sequence[TensorDescription], *, transposed: bool = False) -> str:
        """Tensors below each other as floats."""
        return self.external(self.float_place(name, parts, transposed=transposed))

    def float_place(self, name: str, parts: Sequence[TensorDescription], *, transposed: bool = False) -> Place:
        """Where tensors below each other lie as floats; asked for again, the same."""
        if name not in self._floats:
            self._floats[name] = self.storage.add_float(name, parts, transposed=transposed).place
        return self._floats[name]

    def external(self, place: Place) -> str:
        """An initializer that lies in the data file; asked for again, the same."""
        if place.name in self._known:
            return place.name
        tensor = TensorProto(name=place.name, data_type=_DTYPES[place.dtype], dims=place.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA_NAME), ("offset", place.offset), ("length", place.size_bytes)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        self.initializers.append(tensor)
        self._known.add(place.name)
        return place.name
