"""The GGUF writer: what llama.cpp's gguf package reads back, and what happens when it cannot finish."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from edgelm.bundle import TensorPlan
from edgelm.errors import BundleError, CheckpointError
from exporter import ggml
from exporter.architectures import describe
from exporter.architectures.base import TensorDescription, interleave_rows
from exporter.checkpoint import Checkpoint, open_checkpoint, open_source
from exporter.gguf import SLAB_ELEMENTS, check_room, write_gguf
from runtime.gguf_header import read_gguf_header
from tests.tiny_models import make_tiny_llama, write_safetensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(open_source(str(make_tiny_llama(tmp_path / "model", dtype="bfloat16"))))


def plans(tensors: tuple[TensorDescription, ...], type_name: str) -> list[TensorPlan]:
    found = []
    for item in tensors:
        kind = ggml.TYPES[type_name if len(item.shape) == 2 else "F32"]
        size_bytes = int(np.prod(item.shape[:-1])) * kind.row_bytes(item.shape[-1])
        found.append(
            TensorPlan(
                name=item.name,
                source_name=item.source_name,
                shape=item.shape,
                type=kind.name,
                size_bytes=size_bytes,
                reason="test",
            )
        )
    return found


def test_every_tensor_and_key_is_read_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    description = describe(checkpoint)
    extra = {
        "tokenizer.ggml.tokens": ["a", "é"],
        "x.flag": True,
        "x.scores": [1.5, 2.0],
        "x.empty": "",
        "x.ids": [1, 2],
    }
    path = tmp_path / "model.gguf"
    planned = plans(description.tensors, "F32")
    write_gguf(path, checkpoint, description.tensors, planned, {**description.metadata, **extra})
    reader = gguf.GGUFReader(path)
    for key, value in {"general.architecture": "llama", **description.metadata, **extra}.items():
        assert reader.fields[key].contents() == (pytest.approx(value) if isinstance(value, float) else value), key
    assert [tensor.name for tensor in reader.tensors] == [item.name for item in planned]
    head = description.dimensions.head_size
    for item, tensor in zip(description.tensors, reader.tensors, strict=True):
        values = checkpoint.load(item.source_name)
        np.testing.assert_array_equal(tensor.data, interleave_rows(values, head) if item.interleave else values)
    header = read_gguf_header(path)  # our own strict reader agrees
    assert header.file_bytes == header.tensors[-1].offset + -(-header.tensors[-1].size_bytes // 32) * 32


def test_rows_of_rotary_heads_are_interleaved() -> None:
    rows = np.arange(12).reshape(12, 1)
    assert interleave_rows(rows, 6).ravel().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_slabs_and_threads_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_tiny_llama(tmp_path / "m", hidden=128, heads=2, kv_heads=1, vocab=512)
    checkpoint = open_checkpoint(open_source(str(directory)))
    description = describe(checkpoint)
    contents = []
    for elements, threads in ((SLAB_ELEMENTS, 1), (200, 3), (1, 2)):
        monkeypatch.setattr("exporter.gguf.SLAB_ELEMENTS", elements)
        path = tmp_path / f"{elements}.gguf"
        write_gguf(path, checkpoint, description.tensors, plans(description.tensors, "Q8_0"), {}, threads=threads)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_same_type_is_copied_and_other_types_are_converted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    description = describe(checkpoint)
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    write_gguf(first, checkpoint, description.tensors, plans(description.tensors, "Q4_0"), description.metadata)
    again = open_checkpoint(open_source(str(first)))
    tensors = describe(again).tensors
    write_gguf(second, again, tensors, plans(tensors, "Q4_0"), description.metadata)
    assert first.read_bytes() == second.read_bytes()
    write_gguf(second, again, tensors, plans(tensors, "F32"), description.metadata)
    for tensor in gguf.GGUFReader(second).tensors:
        np.testing.assert_allclose(tensor.data, again.load(tensor.name), err_msg=tensor.name)


@pytest.mark.parametrize("type_name", ["F32", "BF16", "Q8_0"])
def test_nan_in_the_source_is_named(tmp_path: Path, type_name: str) -> None:
    directory = make_tiny_llama(tmp_path / "m", layers=1)
    checkpoint = open_checkpoint(open_source(str(directory)))
    values = {name: checkpoint.load(name) for name in checkpoint.tensors}
    values["model.layers.0.mlp.up_proj.weight"][3, 5] = np.inf
    write_safetensors(directory / "model.safetensors", values, "bfloat16")
    checkpoint = open_checkpoint(open_source(str(directory)))
    description, path = describe(checkpoint), tmp_path / "x.gguf"
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or infinity"):
        write_gguf(path, checkpoint, description.tensors, plans(description.tensors, type_name), {})
    assert not path.exists()


@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "Q4_0", "Q4_K"])
def test_numbers_too_large_for_a_type_are_named(tmp_path: Path, type_name: str) -> None:
    directory = make_tiny_llama(tmp_path / "model", hidden=256, ffn=256, dtype="float32")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= np.float32(1e30)
    write_safetensors(directory / "model.safetensors", tensors, "float32")
    checkpoint = open_checkpoint(open_source(str(directory)))
    description = describe(checkpoint)
    planned = plans(description.tensors, type_name)
    with pytest.raises(CheckpointError, match=rf"up_proj\.weight holds numbers too large for {type_name}") as caught:
        write_gguf(tmp_path / "model.gguf", checkpoint, description.tensors, planned, description.metadata)
    assert caught.value.hint == "give it another type: --type 'blk.0.ffn_up.weight=F32'"


def test_source_that_shrinks_meanwhile_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    description, path = describe(checkpoint), tmp_path / "x.gguf"
    with (checkpoint.source.path / "model.safetensors").open("r+b") as stream:
        stream.truncate(100_000)
    with pytest.raises(CheckpointError, match="ended inside tensor"):
        write_gguf(path, checkpoint, description.tensors, plans(description.tensors, "F32"), {})
    assert not path.exists()


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit is what every user can set; the kernel's answer takes the way of ENOSPC."""
    make_tiny_llama(tmp_path / "m")
    script = f"""
        import resource, sys
        from pathlib import Path
        from edgelm.errors import BundleError
        from exporter.architectures import describe
        from exporter.checkpoint import open_checkpoint, open_source
        from exporter.gguf import write_gguf
        from tests.unit.test_gguf_writer import plans
        checkpoint = open_checkpoint(open_source({str(tmp_path / "m")!r}))
        tensors = describe(checkpoint).tensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
        try:
            write_gguf(Path({str(tmp_path / "x.gguf")!r}), checkpoint, tensors, plans(tensors, "F32"), {{}})
        except BundleError as error:
            sys.exit(error.message)
    """
    for limit in (100, 50_000):  # inside the header, inside the data
        command = [sys.executable, "-c", textwrap.dedent(script), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == 1
        assert "no room left while writing x.gguf" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_room_is_checked_first(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "yet", 1)
    with pytest.raises(BundleError, match=r"the bundle needs 1e\+03 TB and"):
        check_room(tmp_path, 10**15)


def test_metadata_of_no_gguf_type_is_a_bug(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for value in (None, {"a": 1}, [1, "a"]):
        with pytest.raises(TypeError, match=r"metadata x\.y"):
            write_gguf(tmp_path / "x.gguf", checkpoint, (), [], {"x.y": value})
    assert not (tmp_path / "x.gguf").exists()


def test_memory_is_bounded_by_slabs(tmp_path: Path) -> None:
    """Doubling the model must not move the peak: 24 MB against 48 MB of weights in processes of their own."""
    peaks = []
    for layers in (4, 8):
        directory = make_tiny_llama(tmp_path / f"m{layers}", hidden=512, heads=8, ffn=2048, layers=layers)
        script = f"""
            import resource
            from pathlib import Path
            from exporter.architectures import describe
            from exporter.checkpoint import open_checkpoint, open_source
            from exporter.gguf import write_gguf
            from tests.unit.test_gguf_writer import plans
            checkpoint = open_checkpoint(open_source({str(directory)!r}))
            tensors = describe(checkpoint).tensors
            planned = plans(tensors, "Q8_0")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            write_gguf(Path({str(tmp_path / "x.gguf")!r}), checkpoint, tensors, planned, {{}}, threads=2)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
        peaks.append(int(done.stdout) * (1 if sys.platform == "darwin" else 1024))
    assert max(peaks) < 30e6
    assert peaks[1] < peaks[0] + 6e6
