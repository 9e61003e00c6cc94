"""Opening an exported bundle: name, context, tokenizer and template are the bundle's; damage is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgelm.errors import BundleError
from exporter.options import ExportOptions
from exporter.pipeline import export
from runtime.engine import EngineOptions
from runtime.engines.llamacpp import load_vocabulary
from runtime.generate import GenerationRequest, Session, generate
from runtime.model import open_model
from runtime.tokenizer import GgufTokenizer, JsonTokenizer
from tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.tiny

ASK = EngineOptions(context=0, threads_decode=1, threads_prefill=1)
TEXT = "Hello 12345 größe 🎉 中文\r\n\t<|im_end|>  x"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    source = make_tiny_llama(directory / "checkpoint")
    options = ExportOptions(source=str(source), quant="Q8_0", context=200, verify=False)
    return export(options, directory / "small").path


def test_a_bundle_brings_its_own_words_and_context(bundle: Path) -> None:
    model = open_model(bundle, ASK)
    assert model.manifest is not None
    assert model.name == model.manifest.name
    assert model.engine.info.context == 200
    assert isinstance(model.tokenizer, JsonTokenizer)
    assert model.stop_tokens >= {2}
    ids = model.chat_prompt([{"role": "user", "content": "hi"}])
    assert model.tokenizer.decode(ids, special=True) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    events = list(generate(Session(model.engine), model.tokenizer, GenerationRequest(ids, 5)))
    assert events[-1].finish_reason == "length"
    model.close()


def test_the_plan_s_context_can_be_overridden(bundle: Path) -> None:
    model = open_model(bundle, EngineOptions(context=64, threads_decode=1, threads_prefill=1))
    assert model.engine.info.context == 64
    model.close()


@pytest.mark.parametrize("special", [True, False])
def test_both_tokenizers_give_the_same_ids(bundle: Path, special: bool) -> None:
    vocabulary = load_vocabulary(bundle / "model.gguf")
    embedded, separate = GgufTokenizer(vocabulary), JsonTokenizer(bundle / "tokenizer.json")
    ids = embedded.encode(TEXT, special=special)
    assert ids == separate.encode(TEXT, special=special)
    assert [embedded.token_bytes(token) for token in ids] == [separate.token_bytes(token) for token in ids]
    assert embedded.decode(ids, special=True) == separate.decode(ids, special=True) == TEXT
    assert embedded.decode(ids) == separate.decode(ids)
    vocabulary.close()


@pytest.mark.parametrize("name", ["model.gguf", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_file_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} does not match its SHA-256"):
        open_model(copy, ASK)


def test_what_is_no_model(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_model(tmp_path / "none", ASK)
    with pytest.raises(BundleError, match="is not a bundle"):
        open_model(tmp_path, ASK)
    with pytest.raises(BundleError, match="is a manifest"):
        open_model(bundle / "manifest.json", ASK)
