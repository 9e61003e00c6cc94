"""The safetensors header reader against the reference implementation and against hostile headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgelm.errors import CheckpointError
from exporter.safetensors_header import parse_safetensors_header, read_index, read_safetensors_header

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4096", 3]),
        "shape": st.lists(st.integers(-1, 5), max_size=3),
        "data_offsets": st.lists(st.integers(-4, 64), min_size=1, max_size=3),
    }
)


def document(header: Any, data: bytes = b"") -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.c": np.ones((4,), np.float16),
        "e": np.zeros((0, 3)),
    }
    save_file(tensors, path, metadata={"format": "np"})
    headers = read_safetensors_header(path)
    assert {name: item.shape for name, item in headers.items()} == {"a": (2, 3), "b.c": (4,), "e": (0, 3)}
    raw = path.read_bytes()
    for name, item in headers.items():
        assert raw[item.offset : item.offset + item.size_bytes] == tensors[name].tobytes()


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()), extra=st.integers(0, 100))
def test_any_header_is_parsed_or_refused(raw: bytes, extra: int) -> None:
    try:
        headers = parse_safetensors_header(raw, Path("x.safetensors"), extra)
    except CheckpointError:
        return
    assert sum(item.size_bytes for item in headers.values()) == extra


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.dictionaries(st.sampled_from(["a", "b", "c"]), ENTRY, max_size=3), data=st.binary(max_size=64))
def test_accepts_nothing_that_the_reference_refuses(tmp_path: Path, entries: dict[str, Any], data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(document(entries, data))
    try:
        headers = read_safetensors_header(path)
    except CheckpointError:
        return
    with safe_open(path, framework="np") as reference:
        assert set(reference.keys()) == set(headers)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x08\0\0\0\0\0\0", "truncated"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated"),
        (document({"a": ONE}, b"1234"), "4 bytes are missing"),
        (document({"a": ONE}, b"1234567890"), "2 bytes too many"),
        (document({"a": ONE, "b": ONE}, b"12345678"), "overlaps"),
        (document({"a": {**ONE, "data_offsets": [8, 16]}}, b"1" * 16), "gap"),
        (document({"a": {**ONE, "shape": [3]}}, b"12345678"), "8 bytes where its shape needs 12"),
        (document({"a": {**ONE, "shape": [2**62, 2**62]}}, b"12345678"), "where its shape needs"),
        (document({"a": {**ONE, "shape": [-2]}}, b"12345678"), "shape"),
        (document({"a": {**ONE, "shape": [True, 2]}}, b"12345678"), "shape"),
        (document({"a": {**ONE, "dtype": "F9"}}, b"12345678"), "unknown type 'F9'"),
        (document({"a": {"dtype": "F32"}}, b"12345678"), "not safetensors"),
        (document([1]), "no table"),
        (document({"__metadata__": {"a": 1}}), "metadata"),
        (struct.pack("<Q", 7) + b'{"a":1 ', "no valid JSON"),
        (struct.pack("<Q", 15) + b'{"a":{},"a":{}}', "twice"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "no valid JSON"),
    ],
)
def test_names_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors_header(path)
    assert str(path) in caught.value.message
    with pytest.raises((SafetensorError, OSError)), safe_open(path, framework="np"):
        pass


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "", 3])
def test_index_with_other_than_plain_names_is_refused(tmp_path: Path, shard: Any) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="no plain safetensors file name"):
        read_index(path)
