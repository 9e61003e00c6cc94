"""Translation, masked words and labels through optimum: exported, proven, run, served, and refused where hostile."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_engine import wait_until
from live_server import LiveServer, running_server
from tiny_tasks import COLOURS, make_bert_with_head, make_marian, make_t5, sentences

from edgelm.bundle import Bundle, TaskQuality, open_bundle
from edgelm.cli.app import run_cli
from edgelm.errors import BundleError, CheckpointError, ContextOverflowError, UsageError
from exporter.options import ExportOptions
from exporter.pipeline import export, prepare
from exporter.verification import verify
from runtime.engine import EngineOptions
from runtime.model import open_model
from runtime.server.metrics import Metrics
from runtime.server.serving import make_shelf
from runtime.server.task_worker import TaskWorker
from runtime.tasks import Asked, TaskOptions, Translator, open_task

pytestmark = [pytest.mark.tiny, pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
ONE = TaskOptions(threads=1)


def made(source: Path, destination: Path, quant: str = "fp32") -> Bundle:
    return export(ExportOptions(str(source), target="raspberry-pi-5", format="onnx", quant=quant), destination)


def proof(bundle: Bundle) -> TaskQuality:
    quality = open_bundle(bundle.path).manifest.task_quality
    assert quality is not None
    assert quality.token_identity.identical
    assert quality.texts == 25
    return quality


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_marian(tmp_path_factory.mktemp("marian") / "model", steps=300)


@pytest.fixture(scope="module")
def translator(marian: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return made(marian, tmp_path_factory.mktemp("export") / "bundle")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    directory = tmp_path_factory.mktemp("masked")
    source = make_bert_with_head(directory / "masked")
    return source, made(source, directory / "bundle")


@contextmanager
def served(bundle: Bundle) -> Iterator[LiveServer]:
    metrics = Metrics()
    with running_server(TaskWorker(open_task(bundle.path, ONE), metrics), metrics) as running:
        assert wait_until(lambda: running.worker.state != "starting", 30)
        yield running


def post(server: LiveServer, route: str, document: Any) -> tuple[int, Any]:
    body = json.dumps(document).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{route}", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_trained_marian_translates(translator: Bundle, marian: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quality = proof(translator)
    assert quality.agreement == 1
    assert quality.kl_mean < 1e-5
    model = open_task(translator.path, ONE)
    try:
        pairs = list(sentences(40, seed=7))
        right = [model.answer(Asked(source)).document["text"] == target for source, target in pairs]
        assert np.mean(right) > 0.7
        assert model.answer(Asked("red blue green white", max_tokens=1)).document["finish_reason"] == "length"
        with pytest.raises(ContextOverflowError):
            model.answer(Asked("red " * 100))
    finally:
        model.close()
    assert run_cli(["run", str(translator.path), "red blue", "--threads", "1"]) == 0
    captured = capfd.readouterr()
    assert captured.out.strip() == f"{COLOURS['blue']} {COLOURS['red']}"
    assert verify(translator.path, str(marian)).quality == quality


def test_greedy_answers_are_those_of_transformers(translator: Bundle, marian: Path) -> None:
    import torch
    from transformers import MarianMTModel, MarianTokenizer

    tokenizer, original = MarianTokenizer.from_pretrained(marian), MarianMTModel.from_pretrained(marian).eval()
    model = open_task(translator.path, ONE)
    assert isinstance(model, Translator)
    try:
        for source, _ in sentences(12, seed=9):
            ids = tokenizer(source, return_tensors="pt").input_ids
            with torch.inference_mode():
                written = original.generate(ids, num_beams=1, max_new_tokens=16, forced_eos_token_id=None)[0]
            text = tokenizer.decode(written, skip_special_tokens=True)
            assert model.answer(Asked(source, max_tokens=16)).document["text"] == text
            assert model.generate(ids[0].tolist(), 16) == written[1:].tolist()
    finally:
        model.close()


def test_a_rounded_marian_still_translates(marian: Path, tmp_path: Path) -> None:
    quality = proof(made(marian, tmp_path / "b", "int8"))
    assert 0 < quality.kl_mean < 0.2
    assert quality.agreement > 0.5


def test_t5_stores_the_same_weights_once(tmp_path: Path) -> None:
    """Both graphs read one data file; in blocks, embedding and head of a tied model are the same bytes."""
    source = make_t5(tmp_path / "model")
    exact = proof(made(source, tmp_path / "fp32"))
    assert exact.agreement == 1
    assert exact.kl_mean < 1e-5
    rounded = made(source, tmp_path / "int8-32", "int8-32")
    assert 0 < proof(rounded).kl_mean < 0.1
    places: dict[str, set[tuple[str, str]]] = {}
    for name in ("model.onnx", "decoder.onnx"):
        onnx.checker.check_model(str(rounded.path / name))
        for tensor in onnx.load(str(rounded.path / name), load_external_data=False).graph.initializer:
            entry = {item.key: item.value for item in tensor.external_data}
            if entry:
                assert entry["location"] == "model.onnx.data"
                places.setdefault(entry["offset"], set()).add((name, tensor.name))
    assert max(len(names) for names in places.values()) == 3
    model = open_task(rounded.path, ONE)
    try:
        assert 0 < model.answer(Asked("the value of a name", max_tokens=4)).completion_tokens <= 4
    finally:
        model.close()


def test_words_are_found_at_masks(masked: tuple[Path, Bundle], capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers import BertForMaskedLM

    source, bundle = masked
    quality = proof(bundle)
    assert quality.agreement == 1
    assert quality.kl_mean < 1e-6
    assert run_cli(["run", str(bundle.path), "the [MASK] of a name", "--threads", "1", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["masks"][0]
    model = open_task(bundle.path, ONE)
    try:
        ids = [*model._words.frame()[0], *model._words.encode("the [MASK] of a name"), *model._words.frame()[1]]
        with torch.inference_mode():
            scores = BertForMaskedLM.from_pretrained(source).eval()(torch.tensor([ids])).logits[0, ids.index(4)]
        assert [item["token"] for item in found] == scores.topk(5).indices.tolist()
        assert found[0]["score"] == pytest.approx(float(scores.softmax(-1).max()), rel=1e-4)
        with pytest.raises(UsageError, match="has no mask"):
            model.answer(Asked("no mask here"))
    finally:
        model.close()


def test_labels(tmp_path: Path) -> None:
    source = make_bert_with_head(tmp_path / "m", labels=("good", "bad", "odd"))
    bundle = made(source, tmp_path / "b", "int8-32")
    assert bundle.manifest.task is not None
    assert bundle.manifest.task.labels == ("good", "bad", "odd")
    assert proof(bundle).agreement > 0.8
    with served(bundle) as server:
        status, document = post(server, "/v1/classify", {"input": "a name"})
        assert status == 200
        assert sum(item["score"] for item in document["data"][0]["labels"]) == pytest.approx(1)


def test_models_with_a_task_stand_among_several(translator: Bundle, masked: tuple[Path, Bundle]) -> None:
    metrics = Metrics()
    paths = [masked[1].path, translator.path]
    shelf = make_shelf(
        paths, lambda _: (EngineOptions(context=0, threads_prefill=1, sequences=4), True), metrics, unload_after_s=None
    )
    names = [masked[1].manifest.name, translator.manifest.name]
    with running_server(shelf, metrics) as server:
        assert wait_until(lambda: shelf.state != "starting", 30)
        assert post(server, "/v1/fill-mask", {"input": "the [MASK]", "top_k": 1})[0] == 200
        assert shelf.books[names[1]].state == "unloaded"
        status, document = post(server, "/v1/translate", {"input": "red blue", "model": names[1]})
        assert (status, document["data"][0]["text"]) == (200, "blau rot")
        for route, model in (("/v1/translate", names[0]), ("/v1/classify", names[1]), ("/tokenize", names[1])):
            status, document = post(server, route, {"input": "red", "model": model})
            assert (status, document["error"]["code"]) == (400, "model_not_supported")
        status, document = post(server, "/v1/chat/completions", {"messages": [], "model": names[1]})
        assert (status, document["error"]["code"]) == (400, "model_not_supported")
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/status", timeout=30) as answer:
            told = json.loads(answer.read())["models"]
        assert [(model["name"], model["facts"]["Task"]) for model in told] == [
            (names[0], "fill-mask"),
            (names[1], "translate"),
        ]
        # What a plan predicts is what has to be free: weights and caches of both graphs, without the process.
        assert all(0 < book.needed_bytes < 100e6 for book in shelf.books.values())


def test_translations_are_served(translator: Bundle) -> None:
    with served(translator) as server:
        texts = ["red blue", "white"]
        status, document = post(server, "/v1/translate", {"input": texts, "model": translator.manifest.name})
        assert status == 200
        assert [item["text"] for item in document["data"]] == ["blau rot", "weiss"]
        assert document["usage"]["completion_tokens"] > 2
        assert [item["finish_reason"] for item in document["data"]] == ["stop", "stop"]
        for wrong, param in (
            ({}, "input"),
            ({"input": []}, "input"),
            ({"input": [1]}, "input.0"),
            ({"input": "red", "max_tokens": 0}, "max_tokens"),
            ({"input": "red", "top_k": 1}, "top_k"),
            ({"input": "red " * 80}, "input"),
            ({"input": "red" * 10_000}, "input"),
        ):
            status, document = post(server, "/v1/translate", wrong)
            assert status == 400, wrong
            assert document["error"]["param"] == param, wrong
        assert post(server, "/v1/translate", {"input": "red", "model": "other"})[0] == 404
        assert post(server, "/v1/chat/completions", {"messages": []})[1]["error"]["code"] == "model_not_supported"
        assert post(server, "/v1/classify", {"input": "red"})[0] == 404


def test_masks_are_served(masked: tuple[Path, Bundle]) -> None:
    with served(masked[1]) as server:
        status, document = post(server, "/v1/fill-mask", {"input": "a [MASK] and [MASK]", "top_k": 2})
        assert status == 200
        assert [len(places) for places in document["data"][0]["masks"]] == [2, 2]
        status, document = post(server, "/v1/fill-mask", {"input": "none"})
        assert status == 400
        assert "has no mask" in document["error"]["message"]


def test_other_commands_say_what_it_is(translator: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="is for the task translate"):
        open_model(translator.path, EngineOptions())
    assert run_cli(["run", str(translator.path), "red", "--temperature", "1"]) == 2
    assert "--temperature is for models that generate" in capfd.readouterr().err
    assert run_cli(["bench", str(translator.path)]) == 2
    several = ["serve", str(translator.path), str(translator.path), "--port", "0"]
    assert run_cli(several) == 2
    assert "two of the models are named" in capfd.readouterr().err
    assert run_cli(["verify", str(translator.path)]) == 0
    assert "same outcome" in capfd.readouterr().out


def test_what_cannot_be_is_refused(marian: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="becomes ONNX only"):
        prepare(ExportOptions(str(marian), format="gguf"))
    with pytest.raises(UsageError, match="--max-kl is for models"):
        prepare(ExportOptions(str(marian), max_kl=0.1))
    assert prepare(ExportOptions(str(marian), target="raspberry-pi-5")).plan.format == "onnx"
    broken = Path(shutil.copytree(marian, tmp_path / "broken"))
    (broken / "source.spm").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"source\.spm"):
        made(broken, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["model.onnx", "decoder.onnx"])
@pytest.mark.parametrize("place", ["../outside", "/etc/passwd", "linked"])
def test_a_hostile_file_of_several_is_refused(translator: Bundle, name: str, place: str, tmp_path: Path) -> None:
    from runtime.engines.onnx_seq2seq import Seq2SeqEngine

    directory = Path(shutil.copytree(translator.path, tmp_path / "b"))
    (directory / "linked").symlink_to("model.onnx.data")
    model = onnx.load(str(directory / name), load_external_data=False)
    large = next(item for item in model.graph.initializer if item.external_data)
    next(entry for entry in large.external_data if entry.key == "location").value = place
    (directory / name).write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"plain file name|regular file"):
        Seq2SeqEngine(directory / "model.onnx", directory / "decoder.onnx", threads=1)


def test_a_manifest_must_list_both_graphs(translator: Bundle, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(translator.path, tmp_path / "b"))
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["task"]["seq2seq"]["decoder"] = "../decoder.onnx"
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="does not list it"):
        open_task(directory, ONE)
