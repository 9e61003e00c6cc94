"""ONNX decoders of other exporters: optimum's, a folder as onnxruntime-genai wants it, and what is not understood."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgelm.cli.app import run_cli
from edgelm.errors import BundleError, ContextOverflowError, EngineError, UsageError
from exporter.checkpoint import open_checkpoint, open_source
from runtime.engine import Chunk, EngineOptions
from runtime.engines import load_engine
from runtime.engines.onnx_foreign import ForeignOnnxEngine
from runtime.model import open_model
from tests.onnx_parity import write_model
from tests.parity import distance
from tests.tiny_models import make_tiny_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from onnx_side_by_side import genai_folder

pytestmark = pytest.mark.tiny
OPTIONS = EngineOptions(context=512, sequences=2, threads_decode=2, threads_prefill=2, all_logits=True)
TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 512, 170)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def own(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own graph of the model, in float32."""
    directory = tmp_path_factory.mktemp("own")
    path = write_model(open_checkpoint(open_source(str(source))), directory, "fp32", 512)
    shutil.copy(source / "tokenizer.json", directory)
    return path


@pytest.fixture(scope="module")
def genai(own: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai") / "model"
    genai_folder(own.parent, folder, threads=2, context=512)
    shutil.copy(source / "tokenizer_config.json", folder)
    return folder


def check_sequences(engine: ForeignOnnxEngine, expected: np.ndarray) -> None:
    """Whole prompts, single tokens, truncation and a second sequence give the logits of our own graph."""
    prompt = engine.forward([Chunk(1, TOKENS, "all")])
    assert distance(prompt, expected).kl_mean < 1e-8
    assert engine.length(1) == len(TOKENS)
    assert engine.length(0) == 0
    engine.truncate(160, 1)
    rows = engine.forward([Chunk(1, TOKENS[160:161]), Chunk(0, TOKENS[:20], "last")])
    assert distance(rows, expected[[160, 19]]).kl_mean < 1e-8


def test_genai_folders_give_the_same_logits(genai: Path, own: Path) -> None:
    reference = load_engine(own, OPTIONS)
    expected = reference.forward([Chunk(0, TOKENS, "all")]).copy()
    reference.close()
    engine = load_engine(genai / "model.onnx", OPTIONS)
    assert isinstance(engine, ForeignOnnxEngine)
    check_sequences(engine, expected)
    with pytest.raises(ContextOverflowError):
        engine.forward([Chunk(1, TOKENS * 3)])
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.forward([Chunk(0, [1])])


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_optimum_exports_give_the_same_logits(source: Path, own: Path, tmp_path: Path) -> None:
    exporters = pytest.importorskip("optimum.exporters.onnx")
    exporters.main_export(str(source), tmp_path / "out", task="text-generation-with-past", do_validation=False)
    reference = load_engine(own, OPTIONS)
    expected = reference.forward([Chunk(0, TOKENS, "all")]).copy()
    reference.close()
    engine = load_engine(tmp_path / "out" / "model.onnx", OPTIONS)
    assert isinstance(engine, ForeignOnnxEngine)
    check_sequences(engine, expected)
    engine.close()
    model = open_model(tmp_path / "out", EngineOptions(context=0))
    assert model.engine.info.context == model.engine.info.context_trained == 1024
    assert model.stop_tokens == {2}
    assert model.chat_template is not None
    model.close()


def test_they_run_and_are_measured(genai: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", str(genai), "-p", "16", "-n", "4", "-r", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"]["format"], report["model"]["quant"]) == ("onnx", "fp32")
    assert report["model"]["artifact_bytes"] == sum(path.stat().st_size for path in genai.glob("model.onnx*"))
    assert report["decode_tps"]["median"] > 0


def small_model(path: Path, inputs: list[str]) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"]) for name in inputs]
    output = helper.make_tensor_value_info("logits", TensorProto.INT64, ["b", "s"])
    graph = helper.make_graph([helper.make_node("Identity", [inputs[0]], ["logits"])], "g", values, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["input_ids", "token_type_ids", "attention_mask"], "it has the inputs token_type_ids"),
        (["input_ids", "attention_mask"], "keeps no cache"),
    ],
)
def test_inputs_that_are_not_understood_are_named(inputs: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=message):
        load_engine(small_model(tmp_path / "model.onnx", inputs), OPTIONS)


def test_a_context_beyond_the_trained_one_is_refused(genai: Path) -> None:
    with pytest.raises(UsageError, match="more than the 512"):
        load_engine(genai / "model.onnx", EngineOptions(context=1024))


def test_folders_that_name_files_elsewhere_are_refused(genai: Path, tmp_path: Path) -> None:
    document = json.loads((genai / "genai_config.json").read_text())
    document["model"]["decoder"]["filename"] = "../model.onnx"
    (tmp_path / "genai_config.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match="names no model file in its folder"):
        open_model(tmp_path, OPTIONS)
