"""The head of a GGUF file, byte for byte what the format's own package writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from edgelm.bundle import TensorPlan
from exporter import ggml
from exporter.gguf_header import ALIGNMENT, encode_header
from runtime.gguf_header import read_gguf_header

METADATA: dict[str, Any] = {
    "general.name": "Größe 模型",
    "llama.block_count": 30,
    "a.negative": -5,
    "a.large": 2**40,
    "llama.rope.freq_base": 1e5,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["", "a", "Ġthe", "🦊"],
    "tokenizer.ggml.token_type": [3, 1, 1, -1],
    "a.scores": [0.5, -1.0],
    "a.flags": [True, False],
    "tokenizer.ggml.precompiled_charsmap": b"\x00a\xff",
}
TYPES = {
    "general.name": GGUFValueType.STRING,
    "llama.block_count": GGUFValueType.UINT32,
    "a.negative": GGUFValueType.INT32,
    "a.large": GGUFValueType.INT64,
    "llama.rope.freq_base": GGUFValueType.FLOAT32,
    "tokenizer.ggml.add_bos_token": GGUFValueType.BOOL,
}
SUBTYPES = {
    "tokenizer.ggml.tokens": GGUFValueType.STRING,
    "tokenizer.ggml.token_type": GGUFValueType.INT32,
    "a.scores": GGUFValueType.FLOAT32,
    "a.flags": GGUFValueType.BOOL,
    "tokenizer.ggml.precompiled_charsmap": GGUFValueType.UINT8,
}


def plan(name: str, shape: tuple[int, ...], type_name: str) -> TensorPlan:
    rows = int(np.prod(shape[:-1]))
    size_bytes = rows * ggml.TYPES[type_name].row_bytes(shape[-1])
    return TensorPlan(name=name, source_name=name, shape=shape, type=type_name, size_bytes=size_bytes, reason="test")


PLANS = [plan("blk.0.attn_q.weight", (3, 64), "Q4_0"), plan("output_norm.weight", (5,), "F32")]


def test_equal_to_the_formats_own_writer(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "peer.gguf", "llama")
    for key, value in METADATA.items():
        kind = TYPES.get(key, GGUFValueType.ARRAY)
        writer.add_key_value(key, value, kind, SUBTYPES.get(key))
    for item in PLANS:
        kind_id = ggml.TYPES[item.type].id
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.size_bytes, raw_dtype=kind_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    expected = (tmp_path / "peer.gguf").read_bytes()
    found = encode_header("llama", METADATA, PLANS)
    assert found[: len(expected)] == expected
    assert found[len(expected) :] == bytes(-len(expected) % ALIGNMENT)


def test_readers_see_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = sum(-(-item.size_bytes // ALIGNMENT) * ALIGNMENT for item in PLANS)
    path.write_bytes(encode_header("llama", METADATA, PLANS) + bytes(data))
    ours, theirs = read_gguf_header(path), GGUFReader(path)
    assert list(ours.metadata["tokenizer.ggml.tokens"]) == METADATA["tokenizer.ggml.tokens"]
    assert [(item.name, item.shape, item.type) for item in ours.tensors] == [
        (item.name, item.shape, item.type) for item in PLANS
    ]
    assert [item.offset for item in ours.tensors] == [int(item.data_offset) for item in theirs.tensors]


@pytest.mark.parametrize("value", [None, {"a": 1}, [1, "a"], [1, 2.0], [None], object()])
def test_what_has_no_place_in_the_format(value: object) -> None:
    with pytest.raises(TypeError, match=r"a\.key"):
        encode_header("llama", {"a.key": value}, ())
