"""Reads and validates an ONNX model file before any C++ parser sees it.

The protobuf wire format is read directly, standard library only. Strict on purpose: unknown fields, repeated singular
fields (which parsers merge differently), unknown operator domains, functions, and external data anywhere but in plain
regular files beside the model are refused, with one message per way to be wrong. Reads no weights and knows nothing of
what a graph computes.

Format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto and https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from edgelm.errors import BundleError

DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
# Wraps a binary of some vendor's compiler, which an execution provider would load from a path of its own.
_REFUSED_OPERATORS = frozenset({"EPContext"})
MAX_FILE_BYTES = 2**31 - 1
MAX_DEPTH = 16
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**40
MAX_STRING_BYTES = 2**20
MAX_ITEMS = 2**20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DECIMAL = re.compile(r"[0-9]{1,18}")
# TensorProto.DataType -> bits of one element; strings have no fixed size and may not be external.
_ELEMENT_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
_STRING_TYPE = 8
ELEMENT_NAMES: Mapping[int, str] = MappingProxyType(
    {1: "fp32", 2: "uint8", 3: "int8", 10: "fp16", 11: "fp64", 16: "bf16", 21: "uint4", 22: "int4"}
)
"""Element types that weights are stored in."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
FLOAT, INT32, INT64, FLOAT16 = 1, 6, 7, 10

Dimension = int | str | None


@dataclass(frozen=True, slots=True)
class OnnxValue:
    """An input or output of the graph. A dimension is a number, a name, or None; ``shape`` None: not stated."""

    name: str
    type: int
    shape: tuple[Dimension, ...] | None


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where a tensor lies beside the model."""

    file: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """A stored tensor. ``external`` None: its bytes are in the model file."""

    name: str
    shape: tuple[int, ...]
    type: int
    external: ExternalData | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the values, 0 for strings."""
        return -(-prod(self.shape) * _ELEMENT_BITS.get(self.type, 0) // 8)


def stored_bytes(tensors: Iterable[OnnxTensor]) -> int:
    """Bytes that tensors take where they are stored; what several have in common is counted once."""
    total, spans = 0, []
    for tensor in tensors:
        if tensor.external is None:
            total += tensor.size_bytes
        else:
            start = tensor.external.offset
            spans.append((tensor.external.file, start, start + tensor.size_bytes))
    file, end = "", 0
    for place, start, stop in sorted(spans):
        if place != file:
            file, end = place, 0
        total += max(stop - max(start, end), 0)
        end = max(end, stop)
    return total


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """A validated model: what goes in and out, what is stored, which operators are used."""

    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    initializers: tuple[OnnxTensor, ...]
    operators: frozenset[tuple[str, str]]
    metadata: Mapping[str, str]
    data_files: tuple[str, ...]
    file_bytes: int


def read_onnx_model(path: Path) -> OnnxModel:
    """Validate a model file and the data files that it names. Raises ``BundleError`` naming what is wrong."""
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{path} is not a regular file")
            if not 0 < status.st_size <= MAX_FILE_BYTES:
                raise _refusal(path, f"it has {status.st_size} bytes; a model has 1 to {MAX_FILE_BYTES}")
            # Not closed by hand: an error on its way up still holds views of it, and goes before it.
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            return _Reader(path).model(memoryview(content))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}", hint="name a bundle or a model") from error


def _refusal(path: Path, message: str) -> BundleError:
    return BundleError(f"{path} is not an ONNX model that EdgeLM runs: {message}", hint="export the bundle again")


@dataclass(slots=True)
class _Field:
    number: int
    wire: int
    value: int
    content: memoryview | None

    @property
    def bytes(self) -> memoryview:
        assert self.content is not None
        return self.content


@dataclass(slots=True)
class _Found:
    """What a walk over the graph and its subgraphs collects."""

    operators: set[tuple[str, str]] = field(default_factory=set)
    tensors: list[OnnxTensor] = field(default_factory=list)
    items: int = 0


# Fields by message: number -> (name, wire types, whether it may occur more than once).
_V, _B = (_VARINT,), (_BYTES,)
_Schema = Mapping[int, tuple[str, tuple[int, ...], bool]]
_PAIR: _Schema = {1: ("key", _B, False), 2: ("value", _B, False)}
_MODEL: _Schema = {
    1: ("ir_version", _V, False), 2: ("producer_name", _B, False), 3: ("producer_version", _B, False),
    4: ("domain", _B, False), 5: ("model_version", _V, False), 6: ("doc_string", _B, False),
    7: ("graph", _B, False), 8: ("opset_import", _B, True), 14: ("metadata_props", _B, True),
    20: ("training_info", _B, True), 25: ("functions", _B, True), 26: ("configuration", _B, True),
}  # fmt: skip
_OPSET: _Schema = {1: ("domain", _B, False), 2: ("version", _V, False)}
_GRAPH: _Schema = {
    1: ("node", _B, True), 2: ("name", _B, False), 5: ("initializer", _B, True), 10: ("doc_string", _B, False),
    11: ("input", _B, True), 12: ("output", _B, True), 13: ("value_info", _B, True),
    14: ("quantization_annotation", _B, True), 15: ("sparse_initializer", _B, True), 16: ("metadata_props", _B, True),
}  # fmt: skip
_NODE: _Schema = {
    1: ("input", _B, True), 2: ("output", _B, True), 3: ("name", _B, False), 4: ("op_type", _B, False),
    5: ("attribute", _B, True), 6: ("doc_string", _B, False), 7: ("domain", _B, False), 8: ("overload", _B, False),
    9: ("metadata_props", _B, True), 10: ("device_configurations", _B, True),
}  # fmt: skip
_ATTRIBUTE: _Schema = {
    1: ("name", _B, False), 2: ("f", (_FIXED32,), False), 3: ("i", _V, False), 4: ("s", _B, False),
    5: ("t", _B, False), 6: ("g", _B, False), 7: ("floats", (_FIXED32, _BYTES), True),
    8: ("ints", (_VARINT, _BYTES), True), 9: ("strings", _B, True), 10: ("tensors", _B, True),
    11: ("graphs", _B, True), 13: ("doc_string", _B, False), 14: ("tp", _B, False), 15: ("type_protos", _B, True),
    20: ("type", _V, False), 21: ("ref_attr_name", _B, False), 22: ("sparse_tensor", _B, False),
    23: ("sparse_tensors", _B, True),
}  # fmt: skip
_TENSOR: _Schema = {
    1: ("dims", (_VARINT, _BYTES), True), 2: ("data_type", _V, False), 3: ("segment", _B, False),
    4: ("float_data", (_FIXED32, _BYTES), True), 5: ("int32_data", (_VARINT, _BYTES), True),
    6: ("string_data", _B, True), 7: ("int64_data", (_VARINT, _BYTES), True), 8: ("name", _B, False),
    9: ("raw_data", _B, False), 10: ("double_data", (_FIXED64, _BYTES), True),
    11: ("uint64_data", (_VARINT, _BYTES), True), 12: ("doc_string", _B, False), 13: ("external_data", _B, True),
    14: ("data_location", _V, False), 16: ("metadata_props", _B, True),
}  # fmt: skip
_VALUE: _Schema = {
    1: ("name", _B, False), 2: ("type", _B, False), 3: ("doc_string", _B, False), 4: ("metadata_props", _B, True),
}  # fmt: skip
_TYPE: _Schema = {
    1: ("tensor_type", _B, False), 4: ("sequence_type", _B, False), 5: ("map_type", _B, False),
    6: ("denotation", _B, False), 8: ("sparse_tensor_type", _B, False), 9: ("optional_type", _B, False),
}  # fmt: skip
_TENSOR_TYPE: _Schema = {1: ("elem_type", _V, False), 2: ("shape", _B, False)}
_SHAPE: _Schema = {1: ("dim", _B, True)}
_DIMENSION: _Schema = {1: ("dim_value", _V, False), 2: ("dim_param", _B, False), 3: ("denotation", _B, False)}
_REFUSED = {
    "training_info": "it carries training information",
    "functions": "it defines functions of its own",
    "configuration": "it names device configurations",
    "sparse_initializer": "it has sparse initializers",
    "sparse_tensor": "it has sparse tensors",
    "sparse_tensors": "it has sparse tensors",
    "segment": "it has tensors in segments",
    "device_configurations": "it names device configurations",
    "overload": "it overloads functions",
    "ref_attr_name": "it refers to attributes of functions",
}


class _Reader:
    """Walks one file. Every method raises ``BundleError`` for what it does not accept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = _Found()
        self._data_sizes: dict[str, int] = {}

    def refuse(self, message: str) -> NoReturn:
        raise _refusal(self.path, message)

    def model(self, content: memoryview) -> OnnxModel:
        """The whole file."""
        single: dict[str, _Field] = {}
        opsets: dict[str, int] = {}
        metadata: dict[str, str] = {}
        for name, item in self.fields(content, _MODEL, "the model"):
            if name == "opset_import":
                domain, version = self.opset(item.bytes)
                if domain in opsets:
                    self.refuse(f"it imports the operator set {domain!r} twice")
                opsets[domain] = version
            elif name == "metadata_props":
                key, value = self.pair(item.bytes)
                metadata[key] = value
            else:
                single[name] = item
        if "graph" not in single or "ir_version" not in single:
            self.refuse("it has no graph" if "ir_version" in single else "it has no IR version")
        inputs, outputs, initializers = self.graph(single["graph"].bytes, 0)
        return OnnxModel(
            ir_version=single["ir_version"].value,
            opsets=MappingProxyType(opsets),
            inputs=inputs,
            outputs=outputs,
            initializers=initializers,
            operators=frozenset(self.found.operators),
            metadata=MappingProxyType(metadata),
            data_files=tuple(sorted(self._data_sizes)),
            file_bytes=len(content),
        )

    def graph(
        self, content: memoryview, depth: int
    ) -> tuple[tuple[OnnxValue, ...], tuple[OnnxValue, ...], tuple[OnnxTensor, ...]]:
        """Inputs, outputs and initializers; nodes and subgraphs are checked on the way."""
        if depth > MAX_DEPTH:
            self.refuse(f"its graphs are nested more than {MAX_DEPTH} deep")
        values: dict[str, list[OnnxValue]] = {"input": [], "output": []}
        initializers: list[OnnxTensor] = []
        for name, item in self.fields(content, _GRAPH, "a graph"):
            if name == "node":
                self.node(item.bytes, depth)
            elif name == "initializer":
                initializers.append(self.tensor(item.bytes))
            elif name in values:
                values[name].append(self.value(item.bytes))
        names = [tensor.name for tensor in initializers]
        if len(set(names)) != len(names):
            self.refuse("two initializers have the same name")
        return tuple(values["input"]), tuple(values["output"]), tuple(initializers)

    def node(self, content: memoryview, depth: int) -> None:
        """Check a node's operator and what its attributes carry."""
        operator = domain = ""
        attributes = []
        for name, item in self.fields(content, _NODE, "a node"):
            if name == "op_type":
                operator = self.text(item.bytes)
            elif name == "domain":
                domain = self.text(item.bytes)
            elif name == "attribute":
                attributes.append(item.bytes)
        if domain not in DOMAINS:
            self.refuse(f"operator {operator!r} is of the unknown domain {domain!r}")
        if not operator or operator in _REFUSED_OPERATORS:
            self.refuse(f"operator {operator!r} is not allowed" if operator else "a node has no operator")
        self.found.operators.add((domain, operator))
        for attribute in attributes:
            for name, item in self.fields(attribute, _ATTRIBUTE, f"an attribute of {operator}"):
                if name in ("t", "tensors"):
                    self.tensor(item.bytes)
                elif name in ("g", "graphs"):
                    self.graph(item.bytes, depth + 1)

    def tensor(self, content: memoryview) -> OnnxTensor:
        """A tensor's name, type and place, sizes checked."""
        single: dict[str, _Field] = {}
        shape: list[int] = []
        places: dict[str, str] = {}
        for name, item in self.fields(content, _TENSOR, "a tensor"):
            if name == "dims":
                shape += [item.value] if item.wire == _VARINT else self.varints(item.bytes)
            elif name == "external_data":
                key, value = self.pair(item.bytes)
                if key in places or key not in ("location", "offset", "length", "checksum"):
                    self.refuse(f"a tensor's external data has the key {key!r} twice or an unknown one")
                places[key] = value
            else:
                single[name] = item
        title = self.text(single["name"].bytes) if "name" in single else ""
        kind = single["data_type"].value if "data_type" in single else 0
        self._check_shape(title, shape, kind)
        tensor = OnnxTensor(title, tuple(shape), kind, None)
        if "data_location" in single and single["data_location"].value == 1:
            tensor = OnnxTensor(title, tuple(shape), kind, self.external(tensor, places))
        elif places or ("data_location" in single and single["data_location"].value != 0):
            self.refuse(f"tensor {title!r} names external data but is not stored there")
        elif "raw_data" in single and len(single["raw_data"].bytes) != tensor.size_bytes:
            self.refuse(f"tensor {title!r} has {len(single['raw_data'].bytes)} bytes, not {tensor.size_bytes}")
        return tensor

    def _check_shape(self, title: str, shape: list[int], kind: int) -> None:
        if len(shape) > MAX_DIMENSIONS or any(size >= 2**62 for size in shape) or prod(shape) > MAX_ELEMENTS:
            self.refuse(f"tensor {title!r} has an absurd shape")
        if kind not in _ELEMENT_BITS and kind != _STRING_TYPE:
            self.refuse(f"tensor {title!r} has the unknown element type {kind}")

    def external(self, tensor: OnnxTensor, places: Mapping[str, str]) -> ExternalData:
        """Check that external data is whole and lies in a plain file of its own beside the model."""
        location = places.get("location", "")
        if not _PLAIN_NAME.fullmatch(location) or location == self.path.name:
            self.refuse(f"tensor {tensor.name!r} is stored in {location!r}, which is not a plain file name beside it")
        if tensor.type == _STRING_TYPE:
            self.refuse(f"tensor {tensor.name!r} is external and holds strings")
        for key in ("offset", "length"):
            if key in places and not _DECIMAL.fullmatch(places[key]):
                self.refuse(f"tensor {tensor.name!r} has the {key} {places[key]!r}")
        offset = int(places.get("offset", "0"))
        size_bytes = int(places.get("length", str(tensor.size_bytes)))
        if size_bytes != tensor.size_bytes:
            self.refuse(f"tensor {tensor.name!r} has {size_bytes} bytes of data, its shape needs {tensor.size_bytes}")
        available = self._data_size(location)
        if offset + size_bytes > available:
            self.refuse(
                f"tensor {tensor.name!r} ends at byte {offset + size_bytes} of {location}, which has {available}"
            )
        return ExternalData(location, offset, size_bytes)

    def _data_size(self, name: str) -> int:
        if name not in self._data_sizes:
            file = self.path.parent / name
            try:
                status = os.lstat(file)
            except OSError as error:
                raise BundleError(
                    f"{file} is missing, which {self.path.name} keeps weights in", hint="copy the whole bundle"
                ) from error
            if not stat.S_ISREG(status.st_mode):
                self.refuse(f"its data file {name} is not a regular file")
            if status.st_nlink > 1:
                self.refuse(f"its data file {name} is a hard link; a copy would do")
            self._data_sizes[name] = status.st_size
        return self._data_sizes[name]

    def value(self, content: memoryview) -> OnnxValue:
        """A graph input or output. Anything but a dense tensor is refused."""
        title, kind = "", None
        for name, item in self.fields(content, _VALUE, "an input or output"):
            if name == "name":
                title = self.text(item.bytes)
            elif name == "type":
                kind = item.bytes
        if kind is None:
            self.refuse(f"{title!r} has no type")
        element, shape = 0, None
        for name, item in self.fields(kind, _TYPE, f"the type of {title!r}"):
            if name == "denotation":
                continue
            if name != "tensor_type":
                self.refuse(f"{title!r} is not a tensor")
            for part, inner in self.fields(item.bytes, _TENSOR_TYPE, f"the type of {title!r}"):
                if part == "elem_type":
                    element = inner.value
                else:
                    dimensions = self.fields(inner.bytes, _SHAPE, f"the shape of {title!r}")
                    shape = tuple(self.dimension(entry.bytes) for _, entry in dimensions)
        return OnnxValue(title, element, shape)

    def dimension(self, content: memoryview) -> Dimension:
        """One dimension of a shape."""
        result: Dimension = None
        for name, item in self.fields(content, _DIMENSION, "a dimension"):
            if name == "dim_value":
                result = item.value
            elif name == "dim_param":
                result = self.text(item.bytes)
        return result

    def opset(self, content: memoryview) -> tuple[str, int]:
        """(domain, version) of an operator set."""
        domain, version = "", 0
        for name, item in self.fields(content, _OPSET, "an operator set"):
            if name == "domain":
                domain = self.text(item.bytes)
            else:
                version = item.value
        return domain, version

    def pair(self, content: memoryview) -> tuple[str, str]:
        """A key and its value."""
        found = {"key": "", "value": ""}
        for name, item in self.fields(content, _PAIR, "a key and value"):
            found[name] = self.text(item.bytes)
        return found["key"], found["value"]

    def text(self, content: memoryview) -> str:
        """A UTF-8 string of bounded length."""
        if len(content) > MAX_STRING_BYTES:
            self.refuse(f"it holds a string of {len(content)} bytes")
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError:
            self.refuse("it holds a string that is not UTF-8")

    def fields(self, content: memoryview, schema: _Schema, where: str) -> Iterator[tuple[str, _Field]]:
        """The fields of a message by name."""
        seen: set[int] = set()
        position, end = 0, len(content)
        while position < end:
            self.found.items += 1
            if self.found.items > MAX_ITEMS:
                self.refuse(f"it has more than {MAX_ITEMS} entries")
            key, position = self.varint(content, position)
            number, wire = key >> 3, key & 7
            if number not in schema:
                self.refuse(f"{where} has the unknown field {number}")
            name, wires, repeated = schema[number]
            if wire not in wires or (number in seen and not repeated):
                self.refuse(f"{where} has {name} {'twice' if wire in wires else 'in a wrong form'}")
            if name in _REFUSED:
                self.refuse(_REFUSED[name])
            seen.add(number)
            item, position = self._field(content, position, number, wire)
            yield name, item

    def _field(self, content: memoryview, position: int, number: int, wire: int) -> tuple[_Field, int]:
        if wire == _VARINT:
            value, position = self.varint(content, position)
            return _Field(number, wire, value, None), position
        if wire == _BYTES:
            size_bytes, position = self.varint(content, position)
        else:
            size_bytes = 8 if wire == _FIXED64 else 4
        if size_bytes > len(content) - position:
            self.refuse("it is truncated")
        stop = position + size_bytes
        return _Field(number, wire, 0, content[position:stop]), stop

    def varints(self, content: memoryview) -> list[int]:
        """Packed numbers, no more than a shape can have."""
        values, position = [], 0
        while position < len(content):
            value, position = self.varint(content, position)
            values.append(value)
            if len(values) > MAX_DIMENSIONS:
                self.refuse("a tensor has an absurd shape")
        return values

    def varint(self, content: memoryview, position: int) -> tuple[int, int]:
        """An unsigned number of at most 64 bits, and the position after it."""
        value = 0
        for shift in range(0, 70, 7):
            if position >= len(content):
                self.refuse("it is truncated")
            byte = content[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
        else:
            self.refuse("it holds a number of more than ten bytes")
        if value >= 2**64:
            self.refuse("it holds a number of more than 64 bits")
        return value, position
