"""Models by hub id, against a hub on loopback: what is fetched, what is continued, what is refused and why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgelm.errors import CheckpointError
from exporter.checkpoint import open_source
from exporter.hub import is_hub_id
from exporter.safetensors_header import INDEX
from tests.hub_server import COMMIT, Hub, serve
from tests.tiny_models import make_tiny_llama

ROOT = Path(__file__).parents[2]
MODEL = "tiny-org/tiny-llama"
TENSORS = 20
HUB_CHUNK_BYTES = 10 * 2**20  # huggingface_hub writes what it receives in pieces of this size


def shard(directory: Path, further: dict[str, np.ndarray[Any, Any]] | None = None) -> Path:
    """Split the weights into two files; other files that a repository may hold lie around."""
    tensors = load_file(directory / "model.safetensors") | (further or {})
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, held in enumerate((names[::2], names[1::2]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in held}, directory / name)
        weight_map |= dict.fromkeys(held, name)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "consolidated.safetensors").write_bytes(b"another form of the same")
    (directory / "modeling_tiny.py").write_text("raise SystemExit('code of a checkpoint was run')")
    return directory


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    directory = shard(make_tiny_llama(tmp_path / "repository", hidden=256, ffn=512))
    with serve(Hub({MODEL: directory})) as running:
        yield running


def child(hub: Hub, tmp_path: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, where the hub's library reads its environment."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **hub.environment(tmp_path), "PYTHONPATH": str(ROOT), **changes},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def plan(hub: Hub, tmp_path: Path, source: str = MODEL, **changes: str) -> subprocess.CompletedProcess[str]:
    arguments = ("-m", "edgelm", "plan", source, "--target", "raspberry-pi-5", "--quant", "Q8_0", "--json")
    return child(hub, tmp_path, *arguments, **changes)


OPEN = """
import sys
from edgelm.errors import CheckpointError
from exporter.checkpoint import open_checkpoint, open_source
for text in sys.argv[2:]:
    try:
        print(len(open_checkpoint(open_source(text, headers_only=sys.argv[1] == "headers")).tensors))
    except CheckpointError as error:
        print(error.message, "HINT:", error.hint)
"""


def opened(hub: Hub, tmp_path: Path, *sources: str, part: str = "headers", **changes: str) -> list[str]:
    """What opening each source gives: the number of its tensors, or what is told."""
    done = child(hub, tmp_path, "-c", OPEN, part, *sources, **changes)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars of the hub's library
    return done.stdout.splitlines()


def weights(hub: Hub) -> list[Path]:
    return sorted(hub.models[MODEL].glob("model-*.safetensors"))


def test_hub_ids() -> None:
    assert all(map(is_hub_id, ("org/name", "org/name@main", "org/name@v1.0", "org/n@refs/pr/2")))
    assert not any(map(is_hub_id, ("name", "a/b/c", "../up", "org/name@", "org/name@-x", "./a/b", "org/@main")))


def test_offline_without_a_copy_says_so() -> None:
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE keeps it from being fetched") as caught:
        open_source("no-such-org/no-such-model")
    assert "unset HF_HUB_OFFLINE" in str(caught.value.hint)


def test_plan_reads_headers_only_and_export_fetches_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    planned = plan(hub, tmp_path, f"{MODEL}@main")
    assert planned.returncode == 0, planned.stderr
    asked = {name for _, name, _ in hub.requests}
    assert asked.isdisjoint({"consolidated.safetensors", "pytorch_model.bin", "modeling_tiny.py"})
    for file in weights(hub):
        assert [wanted for _, name, wanted in hub.requests if name == file.name] == ["bytes=0-262143"]
    assert not list((tmp_path / "hf").rglob("model-*.safetensors"))

    hub.requests.clear()
    options = ("--target", "raspberry-pi-5", "--quant", "Q8_0", "--context", "256", "--no-verify", "--json")
    exported = child(hub, tmp_path, "-m", "edgelm", "export", MODEL, "-o", str(tmp_path / "bundle"), *options)
    assert exported.returncode == 0, exported.stderr
    assert exported.stderr == ""
    assert {name for _, name, _ in hub.requests} == {file.name for file in weights(hub)}
    source = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["source"]
    assert (source["location"], source["revision"]) == (MODEL, COMMIT)
    (row,) = json.loads(planned.stdout)["candidates"]
    assert row["artifact_bytes"] == pytest.approx(json.loads(exported.stdout)["artifact_bytes"], rel=0.02)

    hub.requests.clear()
    tensors = opened(hub, tmp_path, MODEL, f"{MODEL}@main", f"{MODEL}@{COMMIT}", part="all")
    assert hub.requests == []  # everything is here
    assert opened(hub, tmp_path, MODEL, f"{MODEL}@main", f"{MODEL}@{COMMIT}", HF_HUB_OFFLINE="1") == tensors
    assert set(tensors) == {str(TENSORS)}


def test_interrupted_download_is_continued(hub: Hub, tmp_path: Path) -> None:
    large = np.zeros(HUB_CHUNK_BYTES // 2, dtype=np.float32)
    hub.models[MODEL] = shard(make_tiny_llama(tmp_path / "large", layers=1), {"a": large})
    file = weights(hub)[0]
    size_bytes, cut = file.stat().st_size, HUB_CHUNK_BYTES + 2**20
    hub.cut_after[file.name] = cut
    broken, whole = opened(hub, tmp_path, MODEL, MODEL, part="all")
    assert "could not be loaded from the hub" in broken
    assert "goes on where it stopped" in broken
    assert whole == "12"
    assert [wanted for method, name, wanted in hub.requests if (method, name) == ("GET", file.name)] == [
        None,
        f"bytes={HUB_CHUNK_BYTES}-",
    ]
    assert hub.sent[file.name] == cut + size_bytes - HUB_CHUNK_BYTES


def test_damaged_files_are_removed_and_fetched_again(hub: Hub, tmp_path: Path) -> None:
    file = weights(hub)[1]
    hub.corrupted |= {file.name, "config.json"}
    small, large, whole = opened(hub, tmp_path, MODEL, MODEL, MODEL, part="all")
    assert f"config.json of {MODEL} is damaged" in small
    assert f"{file.name} of {MODEL} is damaged" in large
    assert "run the command again" in large
    assert whole == str(TENSORS)


def test_what_the_hub_refuses_is_told_with_the_way_out(hub: Hub, tmp_path: Path) -> None:
    for name in ("pickle", "gguf", "hole"):
        hub.models[f"tiny-org/{name}"] = shutil.copytree(hub.models[MODEL], tmp_path / name)
    for name in ("pickle", "gguf"):
        for path in (tmp_path / name).glob("*.safetensors*"):
            path.unlink()
    (tmp_path / "gguf" / "tiny-Q4_0.gguf").write_bytes(b"GGUF")
    next((tmp_path / "hole").glob("model-*.safetensors")).unlink()
    hub.models["tiny-org/gated"] = hub.models[MODEL]
    hub.gated.add("tiny-org/gated")
    sources = [f"{MODEL}@v9", *(f"tiny-org/{name}" for name in ("other", "gated", "pickle", "gguf", "hole"))]
    revision, unknown, gated, pickle, gguf, hole = opened(hub, tmp_path, *sources)
    assert f"{MODEL} has no revision v9" in revision
    assert "the hub has no such model, or it is private" in unknown
    assert "tiny-org/gated is gated" in gated
    assert "hf auth login" in gated
    assert "its weights are pickle (pytorch_model.bin)" in pickle
    assert "hf download tiny-org/gguf tiny-Q4_0.gguf" in gguf
    assert "which its model.safetensors.index.json names" in hole
    (unreachable,) = opened(hub, tmp_path, "tiny-org/new", HF_ENDPOINT="http://127.0.0.1:9")
    assert "could not be loaded from the hub" in unreachable
    assert "HF_HUB_OFFLINE=1" in unreachable
