"""Sources and checkpoints: what is accepted, what is refused, what the tensors are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgelm.errors import CheckpointError, MissingDependencyError
from exporter.checkpoint import open_checkpoint, open_source
from tests.tiny_models import Dtype, make_tiny_llama


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_load_as_exact_float32(tmp_path: Path, dtype: Dtype) -> None:
    wanted = make_tiny_llama(tmp_path / "f32", dtype="float32", layers=1)
    checkpoint = open_checkpoint(open_source(str(make_tiny_llama(tmp_path / "m", dtype=dtype, layers=1))))
    reference = load_file(wanted / "model.safetensors")
    assert set(checkpoint.tensors) == set(reference)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        values = checkpoint.load(name)
        assert values.shape == reference[name].shape
        if dtype == "bfloat16":
            np.testing.assert_allclose(values, reference[name], rtol=2**-8)
            assert not (values.view(np.uint32) & 0xFFFF).any()
        else:
            np.testing.assert_array_equal(values, reference[name].astype(dtype).astype(np.float32))


def test_shards_are_joined(tmp_path: Path) -> None:
    directory = make_tiny_llama(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / shard)
    (directory / "model.safetensors").unlink()
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(open_source(str(directory)))
    np.testing.assert_array_equal(checkpoint.load(names[1]), tensors[names[1]])
    assert [path.name for path in checkpoint.files] == ["config.json", "a.safetensors", "b.safetensors"]

    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "b.safetensors"}}))
    with pytest.raises(CheckpointError, match="disagree on tensor"):
        open_checkpoint(open_source(str(directory)))
    index.write_text(json.dumps({"weight_map": weight_map}))
    (directory / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        open_checkpoint(open_source(str(directory)))


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="there is no demo:other"):
        open_source("demo:other")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(CheckpointError, match="neither a checkpoint directory nor a"):
        open_source(str(tmp_path / "x.txt"))


def test_packages_that_sources_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs huggingface_hub"):
        open_source("somebody/no-such-model")
    with pytest.raises(MissingDependencyError, match="demo:smollm2 is not installed"):
        open_source("demo:smollm2")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    source = open_source(str(directory))
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no config\.json"):
        open_checkpoint(source)
    for text, message in (("{", "no valid JSON"), ("[]", "no table of settings")):
        (directory / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(source)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"it has no model\.safetensors"):
        open_checkpoint(source)
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"as pickle \(pytorch_model\.bin\)"):
        open_checkpoint(source)


def test_damaged_gguf_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        open_checkpoint(open_source(str(path)))


def test_weights_in_other_types_are_refused_when_read(tmp_path: Path) -> None:
    directory = make_tiny_llama(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.uint8)
    save_file(tensors, directory / "model.safetensors")
    checkpoint = open_checkpoint(open_source(str(directory)))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as U8"):
        checkpoint.load("model.norm.weight")


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    directory = make_tiny_llama(tmp_path / "m")
    checkpoint = open_checkpoint(open_source(str(directory)))
    shutil.move(directory / "model.safetensors", tmp_path / "away")
    assert len(checkpoint.tensors) == 2 * 9 + 2
    with pytest.raises(OSError, match="No such file"):
        checkpoint.load("model.norm.weight")
