"""Beside llama.cpp's own tools: its server takes the same greedy tokens, its converter writes the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from exporter.checkpoint import open_checkpoint, open_source
from runtime.engine import Chunk, EngineOptions
from runtime.engines.llamacpp import load_engine
from tests.parity import ROWS, VOCABULARY, Row, known_to_transformers, make_checkpoint, transformers_logits, write_f32
from tests.peers import compare, convert, llama_server, server_greedy, sources, tool

pytestmark = [pytest.mark.tiny, pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

PROMPT, ANSWER, CONTEXT = 24, 32, 256
GREEDY = (
    "llama 3.1 rotation",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "phi3",
    "gpt2",
    "smollm3",
    "olmo2",
    "gpt_neox",
    "phi",
    "nemotron",
    "lfm2",
    "cohere2",
)
ENDS = (0, 2)  # of a text and of a turn, in the tokenizer of the tiny models
TIE = 0.01  # logits that llama.cpp's flash attention, which rounds to 16 bits, may put the other way around
# Both have them, with other values: what the converter leaves to a query scale of one over the root of the head size.
SCALED = {
    "gemma2, other query scale": r"blk\.\d\.attn_q\.weight",
    "gemma3_text": r"blk\.\d\.attn_q_norm\.weight",
    "gemma3, text of a model that sees": r"blk\.\d\.attn_q_norm\.weight",
}
# What the converter refuses: configurations of GPT-2 and Command R7B as transformers writes them, all but published
# Hunyuans, and a family that it does not have.
REFUSED = {
    "gpt2": "n_ctx",
    "cohere2": "rotary_pct",
    "hunyuan_v1_dense, long base": "assumptions changed",
    "helium": "not supported",
}
# What the converter takes for granted whatever config.json says: of Phi the published counts, of GLM the settings that
# its first form had under other names.
ASSUMED = {
    "phi": {"phi2.attention.head_count_kv", "phi2.feed_forward_length"},
    "glm": {"chatglm.attention.layer_norm_rms_epsilon", "chatglm.context_length"},
}
OUTPUT = {"olmo2, tied": ("output.weight",)}  # llama.cpp's graph has no tied form
# Written by the whole export, not by the parity run; the size label is for the names of files.
LATER = {"general.file_type", "general.quantization_version", "general.size_label"}
# A window as long as the context, and a context of training where nothing scales: neither changes anything.
# What the converter says of recurrent layers and experts for a Granite 4 that has neither, of a kind of norm that
# Nemotron does not have, that nothing scales, and what makes Ministral's factor on sine and cosine 1, as ours says.
WITHOUT_EFFECT = re.compile(
    r"phi3\.(attention\.sliding_window|rope\.scaling\.original_context_length)|"
    r"granite\.(ssm\.\w+|expert_\w+|rope\.scaling\.finetuned)|"
    r"nemotron\.attention\.layer_norm_rms_epsilon|(nemotron|command-r)\.rope\.scaling\.type|"
    r"mistral3\.rope\.scaling\.yarn_log_multiplier"
)
# What the converter leaves to llama.cpp's defaults, or the tokenizer's files to those who read them.
DEFAULTS = re.compile(
    r"tokenizer\.ggml\.add_(bos_token|eos_token|space_prefix)|[\w-]+\.(vocab_size|attention\.(key_length|value_length|"
    r"head_count_kv|sliding_window_pattern)|rope\.(dimension_count|freq_base(_swa)?|scaling\.(attn_factor|yarn_beta_\w+)))"
)


def row_named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def likeliest(logits: npt.NDArray[np.float32]) -> int:
    """The server is told to go on at the end of a text, which takes its tokens off the list."""
    return int(np.argmax(np.where(np.isin(np.arange(len(logits)), ENDS), -np.inf, logits)))


def our_greedy(path: Path, prompt: list[int]) -> list[int]:
    engine = load_engine(path, EngineOptions(context=CONTEXT, kv_type="f32", threads_decode=2, threads_prefill=2))
    try:
        found, chunk = list[int](), prompt
        while len(found) < ANSWER:
            found.append(likeliest(engine.forward([Chunk(0, chunk, "last")])[-1]))
            chunk = found[-1:]
        return found
    finally:
        engine.close()


@pytest.mark.parametrize("name", GREEDY)
def test_same_greedy_tokens_as_llama_server_and_transformers(name: str, tmp_path: Path) -> None:
    tool("llama-server")
    model = make_checkpoint(row_named(name), tmp_path / "model")
    path = tmp_path / "model.gguf"
    write_f32(open_checkpoint(open_source(str(tmp_path / "model"))), path)
    prompt = np.random.default_rng(3).integers(3, VOCABULARY, PROMPT).tolist()
    with llama_server(path, CONTEXT) as connection:
        theirs = server_greedy(connection, prompt, ANSWER)
    ours = our_greedy(path, prompt)
    assert len(ours) == ANSWER
    assert ours == theirs
    logits = transformers_logits(model, [*prompt, *ours])[PROMPT - 1 : -1]
    for token, row in zip(ours, logits, strict=True):
        assert row[token] > row[likeliest(row)] - TIE


def test_same_tensors_and_keys_as_the_converter(tmp_path: Path) -> None:
    sources()
    rows = [row for row in ROWS if row.change is None and known_to_transformers(row)]
    jobs = {}
    for number, row in enumerate(rows):
        directory = tmp_path / str(number)
        make_checkpoint(row, directory / "model")
        write_f32(open_checkpoint(open_source(str(directory / "model"))), directory / "ours.gguf")
        jobs[directory / "model"] = directory / "theirs.gguf"
    for number, (row, told) in enumerate(zip(rows, convert(jobs), strict=True)):
        if row.name in REFUSED:
            assert told is not None, row.name
            assert REFUSED[row.name] in told
            continue
        assert told is None, f"{row.name}: {told}"
        found = compare(tmp_path / str(number) / "ours.gguf", tmp_path / str(number) / "theirs.gguf")
        changed = SCALED.get(row.name)
        assert [name for name in found.tensors if not (changed and re.fullmatch(changed, name))] == [], row.name
        assert (found.tensors_ours, found.tensors_theirs) == (OUTPUT.get(row.name, ()), ()), row.name
        assert set(found.keys) <= {"general.name", *ASSUMED.get(row.name, ())}, (
            row.name
        )  # a directory's name here, words made of it there
        theirs = set(found.keys_theirs) - LATER
        assert [name for name in theirs if not WITHOUT_EFFECT.fullmatch(name)] == [], row.name
        assert [name for name in found.keys_ours if not DEFAULTS.fullmatch(name)] == [], row.name
