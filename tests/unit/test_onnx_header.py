"""Hostile and broken ONNX files: each refused with one clear error before any other parser reads them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.errors import BundleError
from runtime.onnx_header import ExternalData, OnnxTensor, read_onnx_model, stored_bytes

onnx = pytest.importorskip("onnx")
helper = onnx.helper
TensorProto = onnx.TensorProto

Change = Callable[[Any], None]


def external_tensor(**places: str) -> Any:
    """A float32 tensor of 16 numbers that lies in ``model.onnx.data``."""
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "model.onnx.data", "offset": "0", "length": "64", **places}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def small_model() -> Any:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "graph",
        [info("x", TensorProto.FLOAT, ["rows", 4])],
        [info("y", TensorProto.FLOAT, ["rows", 4])],
        [external_tensor(), helper.make_tensor("inline", TensorProto.INT64, [2], [1, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, {"key": "value"})
    return model


def write(directory: Path, change: Change = lambda model: None) -> Path:
    model = small_model()
    change(model)
    (directory / "model.onnx.data").write_bytes(bytes(64))
    path = directory / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        read_onnx_model(path)
    assert str(path) in str(caught.value) or str(path.parent) in str(caught.value)
    return str(caught.value)


def test_what_a_valid_file_says(tmp_path: Path) -> None:
    model = read_onnx_model(write(tmp_path))
    assert (model.ir_version, dict(model.opsets), dict(model.metadata)) == (10, {"": 21}, {"key": "value"})
    assert [(value.name, value.type, value.shape) for value in model.inputs] == [("x", 1, ("rows", 4))]
    assert [value.name for value in model.outputs] == ["y"]
    weight, inline = model.initializers
    assert weight.external is not None
    assert (weight.external.file, weight.external.offset, weight.external.size_bytes) == ("model.onnx.data", 0, 64)
    assert (inline.name, inline.shape, inline.external) == ("inline", (2,), None)
    assert model.operators == {("", "MatMul")}
    assert model.data_files == ("model.onnx.data",)


def test_bytes_that_tensors_share_are_counted_once() -> None:
    def stored(start: int, count: int, file: str = "a.data") -> OnnxTensor:
        return OnnxTensor(f"{file} {start}", (count,), TensorProto.FLOAT, ExternalData(file, start, 4 * count))

    inline = OnnxTensor("inline", (3,), TensorProto.INT64, None)
    assert stored_bytes([]) == 0
    assert stored_bytes([stored(0, 10), stored(40, 10), stored(0, 20)]) == 80  # a matrix and its halves
    assert stored_bytes([stored(0, 10), stored(0, 10), stored(20, 10)]) == 60
    assert stored_bytes([stored(0, 10), stored(0, 10, "b.data"), stored(400, 1), inline]) == 108


@pytest.mark.parametrize(
    "location",
    [
        "../model.onnx.data", "/etc/passwd", "sub/model.onnx.data", "..", ".", "", ".hidden", "a\x00b",
        "*/_ORT_MEM_ADDR_/*", "C:\\data", "model.onnx", "x" * 300,
    ],
)  # fmt: skip
def test_data_anywhere_else_is_refused(tmp_path: Path, location: str) -> None:
    def change(model: Any) -> None:
        model.graph.initializer[0].CopyFrom(external_tensor(location=location))

    assert "plain file name" in refusal(write(tmp_path, change))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"offset": "4"}, "ends at byte 68 of model.onnx.data, which has 64"),
        ({"offset": "18446744073709551615"}, "has the offset"),
        ({"offset": "-1"}, "has the offset"),
        ({"offset": "0x0"}, "has the offset"),
        ({"offset": "١"}, "has the offset"),
        ({"length": "60"}, "60 bytes of data, its shape needs 64"),
        ({"length": "1e3"}, "has the length"),
        ({"path": "x"}, "unknown one"),
    ],
)
def test_places_that_make_no_sense_are_refused(tmp_path: Path, places: dict[str, str], message: str) -> None:
    def change(model: Any) -> None:
        model.graph.initializer[0].CopyFrom(external_tensor(**places))

    assert message in refusal(write(tmp_path, change))


def test_two_locations_are_refused(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        entry = model.graph.initializer[0].external_data.add()
        entry.key, entry.value = "location", "other"

    assert "'location' twice" in refusal(write(tmp_path, change))


def test_missing_data_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    assert "is missing" in refusal(path)


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "directory", "fifo"])
def test_data_that_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    path, data = write(tmp_path), tmp_path / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    if kind == "symlink":
        data.symlink_to(tmp_path / "elsewhere")
    elif kind == "hardlink":
        os.link(tmp_path / "elsewhere", data)
    elif kind == "directory":
        data.mkdir()
    else:
        os.mkfifo(data)
    assert ("hard link" if kind == "hardlink" else "not a regular file") in refusal(path)


def _node(operator: str, domain: str) -> Change:
    return lambda model: model.graph.node.append(helper.make_node(operator, ["x"], ["z"], domain=domain))


def _attribute(value: Any) -> Change:
    return lambda model: model.graph.node[0].attribute.append(helper.make_attribute("extra", value))


def _huge(dims: list[int]) -> Change:
    def change(model: Any) -> None:
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(dims)

    return change


def _nested(depth: int) -> Change:
    def change(model: Any) -> None:
        graph = helper.make_graph([], "inner", [], [])
        for _ in range(depth):
            graph = helper.make_graph([helper.make_node("If", ["c"], ["o"], then_branch=graph)], "inner", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], ["o"], then_branch=graph))

    return change


def _function(model: Any) -> None:
    model.functions.append(helper.make_function("own", "f", ["a"], ["b"], [], []))


def _duplicate_name(model: Any) -> None:
    model.graph.initializer.append(external_tensor())


def _sequence_input(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None))


def _sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_node("Evil", "com.evil"), "unknown domain 'com.evil'"),
        (_node("EPContext", "com.microsoft"), "'EPContext' is not allowed"),
        (_attribute(external_tensor(location="../x")), "plain file name"),
        (_attribute([external_tensor(location="/x")]), "plain file name"),
        (_huge([2**40, 2**40]), "absurd shape"),
        (_huge([-1, 4]), "absurd shape"),
        (_huge([1] * 17), "absurd shape"),
        (_huge([5, 4]), "its shape needs 80"),
        (_nested(20), "nested more than 16 deep"),
        (_function, "functions of its own"),
        (_duplicate_name, "same name"),
        (_sequence_input, "is not a tensor"),
        (_sparse, "sparse initializers"),
        (lambda model: model.training_info.add(), "training information"),
        (lambda model: model.ClearField("graph"), "no graph"),
        (lambda model: setattr(model.graph.initializer[1], "raw_data", b"123"), "has 3 bytes, not 16"),
        (lambda model: setattr(model.graph.initializer[0], "data_type", 99), "unknown element type 99"),
        (lambda model: setattr(model.graph.initializer[0], "data_location", 0), "not stored there"),
    ],
)
def test_models_that_ask_for_trouble_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    assert message in refusal(write(tmp_path, change))


def test_data_in_the_graph_of_a_node_is_checked(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        inner = helper.make_graph([], "inner", [], [], [external_tensor(location="../x")])
        model.graph.node.append(helper.make_node("If", ["c"], ["o"], then_branch=inner))

    assert "plain file name" in refusal(write(tmp_path, change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"\x00", "unknown field 0"),
        (b"GGUF", "wrong form"),
        (b"\x08", "truncated"),
        (b"\x3a\xff\xff\xff\xff\x0f", "truncated"),
        (b"\x3a\x00", "no IR version"),
        (b"\x08\x0a", "no graph"),
        (b"\x08\x0a\x3a\x00\x3a\x00", "graph twice"),
        (b"\x08" + b"\xff" * 10, "ten bytes"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "more than 64 bits"),
        (b"\x0b", "wrong form"),
        (b"\xf8\xff\x01\x00", "unknown field"),
        (b"\x08\x0a\x12\x02\xff\xfe\x3a\x00", None),
    ],
)
def test_bytes_that_are_no_model(tmp_path: Path, content: bytes, message: str | None) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    if message is None:  # a producer name is not read, so its encoding does not matter
        assert read_onnx_model(path).inputs == ()
    else:
        assert message in refusal(path)


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_no_file_at_all(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.onnx"
    if kind == "directory":
        path.mkdir()
    assert "cannot read" in refusal(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with contextlib.suppress(BundleError):
        read_onnx_model(path)
