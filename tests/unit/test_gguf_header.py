"""The GGUF header validator: agrees with the format's reference reader, names every defect, survives hostile bytes."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.errors import BundleError
from runtime.gguf_header import GGML_TYPES, GGUFStrings, has_single_blocks, read_gguf_header, workload_from_gguf

U32, U64, STRING, ARRAY, BOOL = 4, 10, 8, 9, 7


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str = "a", extents: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)


def build(
    pairs: list[bytes] | None = None, tensors: list[bytes] | None = None, *, data_bytes: int = 4096, version: int = 3
) -> bytes:
    pairs, tensors = pairs or [], tensors or []
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data_bytes


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write_file


def write_model(path: Path, *, tied: bool = True, kv_heads: int | list[int] = 2) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(kv_heads)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "日本", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_array("flags", [True, False])
    writer.add_bool("yes", True)
    writer.add_float64("pi", 3.25)
    writer.add_int64("negative", -(2**40))
    writer.add_tensor("token_embd.weight", np.zeros((10, 64), dtype=np.float16))
    writer.add_tensor("blk.0.attn_q.weight", np.arange(64 * 64, dtype=np.float32).reshape(64, 64))
    quantised = gguf.quants.quantize(np.ones((48, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.ffn_up.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    if not tied:
        writer.add_tensor("output.weight", np.zeros((10, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_type_table_is_the_formats() -> None:
    published = {kind.name: (int(kind), *GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {name: (entry.id, entry.block, entry.block_bytes) for name, entry in GGML_TYPES.items()}
    assert {name: ours[name] for name in ours if name in published} == {
        name: sizes for name, sizes in published.items() if name not in {"Q8_1", "Q8_K"}
    }
    # Added to the format after the oldest gguf package that we accept.
    assert set(ours) - set(published) <= {"NVFP4", "Q1_0", "Q2_0"}


def test_agrees_with_the_reference_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path)
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert header.version == 3
    assert header.data_offset == reader.data_offset
    for key, value in header.metadata.items():
        expected = reader.fields[key].contents()
        assert (list(value) if isinstance(value, GGUFStrings | np.ndarray) else value) == expected
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.type, ours.offset) == (theirs.name, theirs.tensor_type.name, theirs.data_offset)
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.size_bytes == theirs.n_bytes


def test_strings_behave_as_a_sequence(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path)
    tokens = read_gguf_header(path).metadata["tokenizer.ggml.tokens"]
    assert list(tokens) == ["a", "é", "日本", ""]
    assert (tokens[1], tokens[-2], tokens[1:3], len(tokens)) == ("é", "日本", ["é", "日本"], 4)
    with pytest.raises(IndexError):
        tokens[4]


def test_workload_of_tied_and_untied_heads(tmp_path: Path) -> None:
    write_model(tmp_path / "tied.gguf")
    tied = workload_from_gguf(read_gguf_header(tmp_path / "tied.gguf"))
    assert tied.lookup is None
    assert {item.type: item.size_bytes for item in tied.weights} == {"F16": 1280, "F32": 16384, "Q4_0": 48 * 36}
    assert (tied.layers, tied.hidden, tied.vocabulary) == (3, 64, 10)
    assert tied.kv_elements_per_token == 3 * 2 * (16 + 16)
    write_model(tmp_path / "untied.gguf", tied=False, kv_heads=[1, 0, 4])
    untied = workload_from_gguf(read_gguf_header(tmp_path / "untied.gguf"))
    assert untied.lookup is not None
    assert untied.lookup.size_bytes == 1280
    assert untied.streamed_bytes == 16384 + 48 * 36 + 2560
    assert untied.kv_elements_per_token == (1 + 0 + 4) * (16 + 16)


@pytest.mark.parametrize(
    ("kind", "extents", "single"),
    [("Q8_0", (32, 4), True), ("Q8_0", (64, 4), False), ("F32", (1, 4), False), ("Q4_K", (256, 2), True)],
)
def test_rows_of_one_block(kind: str, extents: tuple[int, ...], single: bool, write: Callable[[bytes], Path]) -> None:
    header = read_gguf_header(write(build(tensors=[tensor(extents=extents, kind=GGML_TYPES[kind].id)])))
    assert has_single_blocks(header) is single


def test_workload_needs_a_whole_model(write: Callable[[bytes], Path]) -> None:
    with pytest.raises(BundleError, match=r"'general\.architecture' is missing"):
        workload_from_gguf(read_gguf_header(write(build())))
    named = build([pair("general.architecture", STRING, text("llama"))])
    with pytest.raises(BundleError, match="token_embd"):
        workload_from_gguf(read_gguf_header(write(named)))
    embedded = build([pair("general.architecture", STRING, text("llama"))], [tensor("token_embd.weight", (32, 4))])
    with pytest.raises(BundleError, match="block_count' is missing"):
        workload_from_gguf(read_gguf_header(write(embedded)))


ARRAY_OF = struct.Struct("<IQ")
WRONG: list[tuple[str, bytes, str]] = [
    ("empty", b"", "truncated at 0 bytes, inside the magic"),
    ("magic", b"GGML" + build()[4:], "starts with b'GGML'"),
    ("version", build(version=1), "version 1 is not one of 2, 3"),
    ("big endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ("tensor count", b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "announces 9223372036854775808 tensors"),
    ("key count", b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "announces 1099511627776 metadata keys"),
    ("counts past the end", b"GGUF" + struct.pack("<IQQ", 3, 0, 5), "truncated at 24 bytes"),
    ("long key", build([struct.pack("<Q", 2**60)]), "more than 65535"),
    ("empty key", build([pair("", U32, b"\0" * 4)]), "empty name"),
    ("key not UTF-8", build([pair(b"\xff", U32, b"\0" * 4)]), "not UTF-8"),
    ("duplicate key", build([pair("k", U32, b"\0" * 4)] * 2), "'k' occurs twice"),
    ("value type", build([pair("k", 13, b"\0" * 8)]), "unknown value type 13"),
    ("boolean", build([pair("k", BOOL, b"\2")]), "boolean with the value 2"),
    ("long string", build([pair("k", STRING, struct.pack("<Q", 2**63))]), "'k' has 9223372036854775808 bytes"),
    ("string past the end", build([pair("k", STRING, struct.pack("<Q", 2**20))]), "truncated at"),
    ("string not UTF-8", build([pair("k", STRING, text(b"\xc0"))]), "not UTF-8"),
    ("array of arrays", build([pair("k", ARRAY, ARRAY_OF.pack(ARRAY, 1))]), "array of arrays"),
    ("array type", build([pair("k", ARRAY, ARRAY_OF.pack(99, 1))]), "unknown value type 99"),
    ("array of booleans", build([pair("k", ARRAY, ARRAY_OF.pack(BOOL, 1) + b"\7")]), "booleans with the value 7"),
    ("long array", build([pair("k", ARRAY, ARRAY_OF.pack(U64, 2**61))]), "2305843009213693952 elements"),
    ("array past the end", build([pair("k", ARRAY, ARRAY_OF.pack(U64, 2**20))]), "truncated at"),
    ("strings past the end", build([pair("k", ARRAY, ARRAY_OF.pack(STRING, 2**20))]), "truncated at"),
    ("long element", build([pair("k", ARRAY, ARRAY_OF.pack(STRING, 1) + b"\xff" * 8)]), "element 0 has"),
    ("alignment type", build([pair("general.alignment", U64, b"\x20" + b"\0" * 7)]), "unsigned 32-bit"),
    ("alignment zero", build([pair("general.alignment", U32, b"\0" * 4)]), "alignment 0"),
    ("alignment odd", build([pair("general.alignment", U32, struct.pack("<I", 48))]), "alignment 48"),
    ("tensor name", build(tensors=[tensor("n" * 64)]), "64 bytes, more than 63"),
    ("tensor without name", build(tensors=[tensor("")]), "tensor 0 has an empty name"),
    ("duplicate tensor", build(tensors=[tensor("a"), tensor("a", offset=128)]), "tensor 'a' occurs twice"),
    ("no dimensions", build(tensors=[tensor(extents=())]), "0 dimensions"),
    ("five dimensions", build(tensors=[tensor(extents=(1, 1, 1, 1, 1))]), "5 dimensions"),
    ("zero dimension", build(tensors=[tensor(extents=(32, 0))]), "zero or negative"),
    ("negative dimension", build(tensors=[tensor(extents=(2**64 - 1,))]), "zero or negative"),
    ("product overflow", build(tensors=[tensor(extents=(2**40, 2**40))]), "more elements than 64 bits"),
    ("wrapping product", build(tensors=[tensor(extents=(2**32, 2**32 + 1))]), "more elements than 64 bits"),
    ("tensor type", build(tensors=[tensor(kind=31)]), "unknown type 31"),
    ("kernel-only type", build(tensors=[tensor(kind=9)]), "unknown type 9"),
    ("row length", build(tensors=[tensor(extents=(48, 32), kind=2)]), "rows of 48, no multiple of the 32 of Q4_0"),
    ("misaligned", build(tensors=[tensor(offset=8)]), "not at a multiple of 32"),
    ("outside", build(tensors=[tensor(offset=4096)]), "ends past the end"),
    ("offset wraps", build(tensors=[tensor(offset=2**64 - 64)]), "ends past the end"),
    ("size outside", build(tensors=[tensor(extents=(2**20,))]), "ends past the end"),
    ("overlap", build(tensors=[tensor("a", (64,)), tensor("b", offset=128)]), "'a' and 'b' overlap"),
    ("same place", build(tensors=[tensor("a"), tensor("b")]), "'a' and 'b' overlap"),
]


@pytest.mark.parametrize(("data", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_names_what_is_wrong(write: Callable[[bytes], Path], data: bytes, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        read_gguf_header(write(data))
    assert message in caught.value.message


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        read_gguf_header(tmp_path / "none.gguf")
    with pytest.raises(BundleError, match="not a file"):
        read_gguf_header(tmp_path)


def test_element_that_is_not_utf8_is_refused_on_access(write: Callable[[bytes], Path]) -> None:
    path = write(build([pair("k", ARRAY, ARRAY_OF.pack(STRING, 2) + text("a") + text(b"\xff"))]))
    strings = read_gguf_header(path).metadata["k"]
    assert strings[0] == "a"
    with pytest.raises(BundleError, match="element 1 is not UTF-8"):
        list(strings)


def test_every_truncation_of_a_real_header_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_model(whole)
    data, cut = whole.read_bytes(), tmp_path / "cut.gguf"
    for length in range(0, len(data) - 32, 7):
        cut.write_bytes(data[:length])
        with pytest.raises(BundleError):
            read_gguf_header(cut)


def consume(header: Any) -> None:
    for value in header.metadata.values():
        if isinstance(value, GGUFStrings):
            list(value)
    workload_from_gguf(header)


FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.binary(max_size=300), prefixed=st.booleans())
def test_random_bytes_raise_only_our_error(tmp_path: Path, data: bytes, prefixed: bool) -> None:
    path = tmp_path / "random.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + data if prefixed else data)
    with contextlib.suppress(BundleError):
        consume(read_gguf_header(path))


INTERESTING = st.sampled_from([0, 1, 7, 8, 9, 31, 32, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])


@FUZZ
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 1200), st.one_of(st.binary(min_size=1, max_size=8), INTERESTING)),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_headers_raise_only_our_error_and_allocate_little(
    tmp_path: Path, edits: list[tuple[int, bytes | int]]
) -> None:
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        write_model(whole)
    data = bytearray(whole.read_bytes())
    for position, value in edits:
        patch = value.to_bytes(8, "little") if isinstance(value, int) else value
        data[position : position + len(patch)] = patch
    path = tmp_path / "mutated.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        consume(read_gguf_header(path))
    except BundleError:
        pass
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 8 * 2**20
