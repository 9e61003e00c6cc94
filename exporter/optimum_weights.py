"""Weights of graphs that optimum exported: rounded to 8 or 4 bits, and stored once in a data file beside the graphs.

Two ways: ``int8`` (matrices per channel, activations rounded as they come, by ONNX Runtime's own quantiser) and blocks
(``MatMulNBits``, types of ``onnx_types``). Tables of embeddings are stored in blocks in both: one scale for a whole
table loses much. Knows no tasks and no plans.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgelm.errors import UsageError
from exporter.gguf import write_errors
from exporter.onnx_quantize import PackedRows, quantize_rows
from exporter.onnx_storage import DATA_NAME
from exporter.onnx_types import WeightType, parse_type
from exporter.optimum_graphs import silent

DYNAMIC = "int8"
_TABLE = WeightType(8, 32)
_ACCURACY_LEVEL = 4  # of MatMulNBits: activations in 8 bits per block
_MICROSOFT = "com.microsoft"
_ALIGNMENT = 4096
_INLINE_BYTES = 1024
"""Shapes and axes are smaller, and inference of shapes reads them from the graph."""
TABLE_ROWS = 64
"""Tables of fewer rows (token types, distances) are small, and read as they are."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How matrices are stored. ``kind`` None: dynamic int8."""

    name: str
    kind: WeightType | None

    def of_product(self, inputs: int, outputs: int) -> WeightType | None:
        """How a matrix is stored that is multiplied with; None: dynamic int8.

        What narrows (the second half of feed-forward networks) reads activations that spread most: a scale for all of
        them loses more there than everywhere else together, so they get one per block.
        """
        return self.table if self.kind is None and inputs > outputs else self.kind

    @property
    def table(self) -> WeightType:
        """How tables of embeddings are stored."""
        return _TABLE if self.kind is None else self.kind


def rounding_named(name: str) -> Rounding:
    """The rounding that ``--quant`` names. Raises ``UsageError``."""
    if name.lower() == DYNAMIC:
        return Rounding(DYNAMIC, None)
    try:
        kind = parse_type(name)
    except UsageError as error:
        raise UsageError(
            f"'{name}' is no quantisation of encoders and of encoder-decoders in ONNX",
            hint="there are fp32, int8 (per channel, activations too), and weights in blocks: int8-32, int8-128, ...",
        ) from error
    if kind.floats != 32:
        raise UsageError(
            f"'{name}' is for decoders: encoders and encoder-decoders in ONNX compute with float32",
            hint="use fp32, or a type without fp16",
        )
    return Rounding(kind.name, kind)


def round_weights(model: Any, rounding: Rounding) -> Any:
    """An onnx ``ModelProto`` with its weights rounded; the one given is changed. fp32 changes nothing."""
    if rounding.table.is_quantized:
        _Rewriter(model, rounding).rewrite()
    return _dynamic(model) if rounding.kind is None else model


class _Rewriter:
    """Replaces products with stored matrices and look-ups in stored tables by their quantised forms, in place."""

    def __init__(self, model: Any, rounding: Rounding) -> None:
        self._model, self._rounding = model, rounding
        self._stored = {item.name: item for item in model.graph.initializer}
        self._made: dict[tuple[str, bool], list[str]] = {}
        self._blocks = 0

    def rewrite(self) -> None:
        from onnx import helper

        for node in self._model.graph.node:
            matrix = self._stored.get(node.input[1]) if node.op_type == "MatMul" else None
            table = self._stored.get(node.input[0]) if node.op_type == "Gather" else None
            if matrix is not None and _is_matrix(matrix):
                kind = self._rounding.of_product(matrix.dims[0], matrix.dims[1])
                if kind is not None and kind.is_quantized:
                    self._product(node, matrix, kind)
            elif table is not None and _is_matrix(table) and _is_table(node, table):
                self._look_up(node, table, self._rounding.table)
        if self._made and all(item.domain != _MICROSOFT for item in self._model.opset_import):
            self._model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
        self._drop_unused()

    def _product(self, node: Any, matrix: Any, kind: WeightType) -> None:
        from onnx import numpy_helper

        rows = np.ascontiguousarray(numpy_helper.to_array(matrix).T)
        parts = self._parts(matrix.name, rows, kind, flat=False)
        attributes = {"K": rows.shape[1], "N": rows.shape[0], "accuracy_level": _ACCURACY_LEVEL}
        self._become(node, "MatMulNBits", [node.input[0], *parts], kind, attributes)

    def _look_up(self, node: Any, table: Any, kind: WeightType) -> None:
        from onnx import numpy_helper

        rows = numpy_helper.to_array(table)
        if rows.shape[1] % kind.block:
            return  # rows would come out longer than they are
        data, *rest = self._parts(table.name, np.ascontiguousarray(rows), kind, flat=True)
        self._become(
            node, "GatherBlockQuantized", [data, node.input[1], *rest], kind, {"gather_axis": 0, "quantize_axis": 1}
        )

    def _become(self, node: Any, operator: str, inputs: Sequence[str], kind: WeightType, more: dict[str, int]) -> None:
        from onnx import helper

        attributes = {"bits": kind.bits, "block_size": kind.block, **more}
        node.op_type, node.domain = operator, _MICROSOFT
        del node.input[:], node.attribute[:]
        node.input.extend(inputs)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())

    def _parts(self, name: str, rows: npt.NDArray[np.float32], kind: WeightType, *, flat: bool) -> list[str]:
        """Names of the stored parts of rounded rows: data, scales and, if there are any, zero points."""
        from onnx import numpy_helper

        if (name, flat) not in self._made:
            packed: PackedRows = quantize_rows(rows, kind)
            data = packed.data.reshape(len(rows), -1) if flat else packed.data
            suffix = "rows" if flat else "blocks"
            arrays = {f"{name}.{suffix}": data, f"{name}.{suffix}.scales": packed.scales}
            if packed.zeros is not None:
                arrays[f"{name}.{suffix}.zeros"] = packed.zeros
            for title, array in arrays.items():
                self._model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), title))
            self._made[name, flat] = list(arrays)
        return self._made[name, flat]

    def _drop_unused(self) -> None:
        used = {name for node in self._model.graph.node for name in node.input}
        kept = [item for item in self._model.graph.initializer if item.name in used]
        del self._model.graph.initializer[:]
        self._model.graph.initializer.extend(kept)


def _is_matrix(tensor: Any) -> bool:
    return len(tensor.dims) == 2 and tensor.data_type == 1  # float32


def _is_table(node: Any, tensor: Any) -> bool:
    axis = next((item.i for item in node.attribute if item.name == "axis"), 0)
    return axis == 0 and tensor.dims[0] >= TABLE_ROWS


def _dynamic(model: Any) -> Any:
    """Matrices in int8 with a scale per channel; activations are rounded when they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="edgelm-int8-") as directory:
        source, rounded = Path(directory) / "model.onnx", Path(directory) / "rounded.onnx"
        onnx.save_model(model, str(source), save_as_external_data=True, location="data", size_threshold=_INLINE_BYTES)
        with silent():
            quantize_dynamic(
                source,
                rounded,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )
        return onnx.load(str(rounded))


# --- storage


class DataFile:
    """The file beside the graphs that holds what is large. Equal bytes are stored once, whichever graph they are of."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._places: dict[tuple[int, bytes], int] = {}

    def take(self, model: Any) -> None:
        """Move the large arrays of a graph here."""
        for tensor in model.graph.initializer:
            self._move(tensor)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    self._move(attribute.t)

    def _move(self, tensor: Any) -> None:
        from onnx import numpy_helper

        if not tensor.HasField("raw_data"):
            array = numpy_helper.to_array(tensor)
            if array.nbytes < _INLINE_BYTES:
                return
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        raw = tensor.raw_data
        if len(raw) < _INLINE_BYTES:
            return
        key = (len(raw), hashlib.sha256(raw).digest())
        offset = self._places.get(key)
        if offset is None:
            position = self._stream.tell()
            offset = self._places[key] = -(-position // _ALIGNMENT) * _ALIGNMENT
            self._stream.write(b"\0" * (offset - position))
            self._stream.write(raw)
        places = {"location": DATA_NAME, "offset": str(offset), "length": str(len(raw))}
        tensor.ClearField("raw_data")
        tensor.data_location = 1  # external
        for name, value in places.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = name, value


def store_graphs(directory: Path, graphs: Mapping[str, Any], notes: Mapping[str, Mapping[str, str]]) -> None:
    """Write graphs by file name with their notes as metadata, and ``model.onnx.data``. The models are used up.

    Raises ``BundleError`` when a file cannot be written.
    """
    data = directory / DATA_NAME
    with write_errors(data), data.open("wb") as stream:
        file = DataFile(stream)
        for name, model in graphs.items():
            file.take(model)
            del model.metadata_props[:]
            for key, value in notes[name].items():
                entry = model.metadata_props.add()
                entry.key, entry.value = key, value
            model.doc_string = ""
            model.graph.doc_string = ""
            with write_errors(directory / name):
                (directory / name).write_bytes(model.SerializeToString())
