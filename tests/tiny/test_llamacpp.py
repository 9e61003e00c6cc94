"""The llama.cpp engine on a tiny random model: sequences, truncation, logits, limits, failures."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelm.bundle import Choice
from edgelm.errors import BundleError, ContextOverflowError, EngineError, UsageError
from runtime.engine import Chunk, EngineInterruptedError, EngineOptions, Logits
from runtime.engines.llamacpp import LlamaCppEngine, load_engine, load_vocabulary
from runtime.tiles import apart
from runtime.waiting import let_helpers_go

pytestmark = pytest.mark.tiny

# One thread: two would spin against whatever else runs on the machine.
ONE = {"threads_decode": 1, "threads_prefill": 1}
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, 320, 60)]


@pytest.fixture(scope="module")
def engine(gguf: Path) -> Iterator[LlamaCppEngine]:
    loaded = load_engine(gguf, EngineOptions(context=100, sequences=3, batch=16, all_logits=True, **ONE))
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def _empty(engine: LlamaCppEngine) -> None:
    for sequence in range(3):
        engine.truncate(0, sequence)


def close_to(actual: Logits, expected: Logits) -> bool:
    """Equal but for the rounding of other batch shapes: attention probabilities pass through f16."""
    return bool(np.allclose(actual, expected, rtol=0, atol=0.02))


def test_info(engine: LlamaCppEngine, gguf: Path) -> None:
    info = engine.info
    assert (info.engine, info.architecture, info.vocabulary) == ("llama.cpp", "llama", 320)
    assert (info.context, info.context_trained, info.sequences) == (100, 512, 3)
    assert (info.threads_decode, info.threads_prefill) == (1, 1)
    # 2 layers x (128 keys + 128 values) x 2 bytes, for 3 sequences padded to 256 tokens each
    assert info.kv_bytes == 2 * 256 * 2 * 3 * 256
    assert 0.8 * gguf.stat().st_size < info.weights_bytes < gguf.stat().st_size
    assert info.parameters > 10**6
    assert "llama-cpp-python" in info.versions


def test_rows_come_in_the_order_of_the_chunks(engine: LlamaCppEngine) -> None:
    all_rows = engine.forward([Chunk(0, TOKENS[:40], "all")]).copy()
    assert all_rows.shape == (40, 320)
    assert all_rows.dtype == np.float32
    rows = engine.forward([Chunk(1, TOKENS[:5], "all"), Chunk(2, TOKENS[:40], "last")])
    assert rows.shape == (6, 320)
    assert close_to(rows[:5], all_rows[:5])
    assert close_to(rows[5], all_rows[39])


def test_no_wanted_logits_give_no_rows(engine: LlamaCppEngine) -> None:
    assert engine.forward([Chunk(0, TOKENS[:20], "none")]).shape == (0, 320)
    assert engine.length() == 20


def test_a_single_step_is_what_the_general_way_computes(engine: LlamaCppEngine) -> None:
    """One token of one sequence goes a shorter way; a second chunk beside it makes the same token go the long one."""
    for wanted in ("last", "all", "none"):
        for sequence in range(3):
            engine.truncate(0, sequence)
            engine.forward([Chunk(sequence, TOKENS[: 5 + sequence], "none")])
        alone = engine.forward([Chunk(1, [7], wanted)]).copy()  # type: ignore[arg-type]
        assert alone.shape == (0 if wanted == "none" else 1, 320)
        assert [engine.length(sequence) for sequence in range(3)] == [5, 7, 7]
        engine.truncate(6, 1)
        beside = engine.forward([Chunk(1, [7]), Chunk(2, [9])])
        assert wanted == "none" or close_to(alone[0], beside[0])


def test_the_view_is_not_writable(engine: LlamaCppEngine) -> None:
    view = engine.forward([Chunk(0, TOKENS[:3])])
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1.0


def test_token_by_token_equals_all_at_once(engine: LlamaCppEngine) -> None:
    at_once = engine.forward([Chunk(0, TOKENS[:30], "all")]).copy()
    stepwise = [engine.forward([Chunk(1, [token])])[0].copy() for token in TOKENS[:30]]
    assert close_to(np.stack(stepwise), at_once)


def test_sequences_do_not_see_each_other(engine: LlamaCppEngine) -> None:
    alone = engine.forward([Chunk(0, TOKENS[:10])])[0].copy()
    engine.truncate(0, 0)
    engine.forward([Chunk(1, TOKENS[20:50]), Chunk(2, TOKENS[50:], "none")])
    beside = engine.forward([Chunk(0, TOKENS[:10]), Chunk(2, TOKENS[:1])])[0]
    assert close_to(beside, alone)


def test_batched_decode_equals_one_by_one(engine: LlamaCppEngine) -> None:
    prompts = [TOKENS[:7], TOKENS[7:20], TOKENS[20:25]]
    expected = []
    for prompt in prompts:
        engine.truncate(0, 0)
        engine.forward([Chunk(0, prompt, "none")])
        expected.append(engine.forward([Chunk(0, [5])])[0].copy())
    engine.truncate(0, 0)
    engine.forward([Chunk(sequence, prompt, "none") for sequence, prompt in enumerate(prompts)])
    together = engine.forward([Chunk(sequence, [5]) for sequence in (2, 0, 1)])
    assert close_to(together, np.stack([expected[2], expected[0], expected[1]]))


def test_truncate_and_compute_again_equals_fresh(engine: LlamaCppEngine) -> None:
    engine.forward([Chunk(0, TOKENS[:40], "none")])
    engine.truncate(10)
    assert engine.length() == 10
    again = engine.forward([Chunk(0, TOKENS[45:50])])[0].copy()
    fresh = engine.forward([Chunk(1, [*TOKENS[:10], *TOKENS[45:50]])])[0]
    assert close_to(again, fresh)


def test_a_copied_prefix_computes_what_the_source_would(engine: LlamaCppEngine) -> None:
    engine.forward([Chunk(2, TOKENS[:7], "none")])  # to be overwritten
    engine.forward([Chunk(0, TOKENS[:40], "none")])
    engine.copy_prefix(0, 2, 30)
    assert (engine.length(0), engine.length(2)) == (40, 30)
    # The source goes on and is cut back before the copy is used: neither may notice the other.
    engine.truncate(10, 0)
    changed = engine.forward([Chunk(0, TOKENS[50:55]), Chunk(2, TOKENS[30:35])]).copy()
    engine.truncate(0, 1)
    assert close_to(changed[0], engine.forward([Chunk(1, TOKENS[:10] + TOKENS[50:55])])[0])
    engine.truncate(0, 1)
    assert close_to(changed[1], engine.forward([Chunk(1, TOKENS[:35])])[0])
    for source, target, length in ((0, 0, 1), (0, 1, 99), (0, 9, 1), (9, 0, 1)):
        with pytest.raises(EngineError):
            engine.copy_prefix(source, target, length)


def test_overflow_is_refused_before_anything_is_computed(engine: LlamaCppEngine) -> None:
    engine.forward([Chunk(0, TOKENS, "none")])
    with pytest.raises(ContextOverflowError, match="holds 60 tokens and cannot take 41 more: the context is 100"):
        engine.forward([Chunk(1, TOKENS[:5]), Chunk(0, TOKENS[:41])])
    assert (engine.length(0), engine.length(1)) == (60, 0)
    assert engine.forward([Chunk(0, TOKENS[:40])]).shape == (1, 320)
    with pytest.raises(ContextOverflowError, match="holds 100 tokens and cannot take 1 more"):
        engine.forward([Chunk(0, [1])])
    assert engine.length(0) == 100


@pytest.mark.parametrize(
    ("chunks", "match"),
    [
        ([Chunk(3, [1])], "no sequence 3"),
        ([Chunk(-1, [1])], "no sequence -1"),
        ([Chunk(0, [])], "no tokens"),
        ([Chunk(0, [1, 320])], "token 320 is outside the vocabulary of 320"),
        ([Chunk(0, [-1])], "token -1 is outside"),
        ([Chunk(0, [1]), Chunk(0, [2])], "given twice"),
    ],
)
def test_senseless_chunks(engine: LlamaCppEngine, chunks: list[Chunk], match: str) -> None:
    with pytest.raises(EngineError, match=match):
        engine.forward(chunks)
    assert [engine.length(sequence) for sequence in range(3)] == [0, 0, 0]


def test_senseless_truncation(engine: LlamaCppEngine) -> None:
    engine.forward([Chunk(0, TOKENS[:5], "none")])
    for length in (-1, 6):
        with pytest.raises(EngineError, match="cannot truncate"):
            engine.truncate(length)
    assert engine.length() == 5


def test_numpy_tokens_are_welcome(engine: LlamaCppEngine) -> None:
    from_array = engine.forward([Chunk(0, np.array(TOKENS[:9]))])[0].copy()  # type: ignore[arg-type]
    assert close_to(engine.forward([Chunk(1, TOKENS[:9])])[0], from_array)


def test_all_logits_have_to_be_asked_for_when_loading(gguf: Path) -> None:
    engine = load_engine(gguf, EngineOptions(context=64, **ONE))
    with pytest.raises(EngineError, match="all_logits"):
        engine.forward([Chunk(0, TOKENS[:5], "all")])
    engine.close()


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
@pytest.mark.parametrize("mmap", [True, False])
def test_cache_types_and_mapping_change_little(engine: LlamaCppEngine, gguf: Path, kv_type: str, mmap: bool) -> None:
    expected = engine.forward([Chunk(0, TOKENS[:30])])[0].copy()
    other = load_engine(gguf, EngineOptions(context=64, kv_type=kv_type, mmap=mmap, **ONE))  # type: ignore[arg-type]
    actual = other.forward([Chunk(0, TOKENS[:30])])[0]
    assert float(np.corrcoef(expected, actual)[0, 1]) > 0.999
    bytes_per_element = {"f32": 4.0, "q8_0": 34 / 32}[kv_type]
    assert other.info.kv_bytes == 512 * bytes_per_element * 256
    other.close()


def test_both_kinds_of_attention_compute_the_same(engine: LlamaCppEngine, gguf: Path) -> None:
    expected = engine.forward([Chunk(0, TOKENS, "all")]).copy()
    for asked, told in (("on", "on"), ("off", "off")):
        other = load_engine(gguf, EngineOptions(context=100, all_logits=True, flash_attention=asked, **ONE))  # type: ignore[arg-type]
        assert other.info.attention == Choice(value=told, reason="asked for")
        rows = other.forward([Chunk(0, TOKENS[:40], "all")]).copy()
        steps = [other.forward([Chunk(0, [token])])[0].copy() for token in TOKENS[40:]]
        # Probabilities pass through f16 with it: logits that spread by 1.3 move by up to 0.06.
        assert np.abs(np.concatenate([rows, steps]) - expected).max() < 0.1
        other.close()


def test_a_cache_of_8_bits_needs_flash_attention(gguf: Path) -> None:
    with pytest.raises(UsageError, match="q8_0 needs flash attention"):
        load_engine(gguf, EngineOptions(context=64, kv_type="q8_0", flash_attention="off", **ONE))
    engine = load_engine(gguf, EngineOptions(context=64, kv_type="q8_0", **ONE))
    assert engine.info.attention == Choice(value="on", reason="a KV cache of 8 bits needs it")
    engine.close()


def _compute_for_ever(engine: LlamaCppEngine) -> None:
    while True:  # one call may be over before the next interruption
        engine.forward([Chunk(0, TOKENS * 8, "none")])
        engine.truncate(20)


def test_interrupt_restores_the_sequences(gguf: Path) -> None:
    engine = load_engine(gguf, EngineOptions(context=512, **ONE))
    engine.forward([Chunk(0, TOKENS[:20], "none")])
    expected = engine.forward([Chunk(0, [7])])[0].copy()
    engine.truncate(20)
    stop = threading.Event()

    def keep_interrupting() -> None:
        while not stop.wait(0.0005):
            engine.interrupt()

    thread = threading.Thread(target=keep_interrupting)
    thread.start()
    try:
        with pytest.raises(EngineInterruptedError):
            _compute_for_ever(engine)
    finally:
        stop.set()
        thread.join()
    assert engine.length() == 20
    assert close_to(engine.forward([Chunk(0, [7])])[0], expected)
    engine.close()


def test_a_closed_engine_refuses_work(gguf: Path) -> None:
    engine = load_engine(gguf, EngineOptions(context=64, **ONE))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.forward([Chunk(0, [1])])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (EngineOptions(context=0), "context must be at least 1"),
        (EngineOptions(batch=0), "batch"),
        (EngineOptions(sequences=0), "sequences"),
        (EngineOptions(sequences=1000), "at most 256 sequences"),
        (EngineOptions(threads_decode=-1), "threads_decode"),
        (EngineOptions(kv_type="q2_k"), "no KV cache type 'q2_k'"),  # type: ignore[arg-type]
    ],
)
def test_senseless_options(gguf: Path, options: EngineOptions, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        load_engine(gguf, options)


def test_a_context_beyond_training_is_refused(gguf: Path) -> None:
    with pytest.raises(EngineError, match=r"513 tokens was asked for, tiny\.gguf was trained for 512"):
        load_engine(gguf, EngineOptions(context=513))


def test_files_that_are_no_models(tmp_path: Path, gguf: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        load_engine(tmp_path / "none.gguf", EngineOptions())
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:5000])
    with pytest.raises(BundleError):
        load_engine(broken, EngineOptions())


def test_llama_cpp_s_own_words_are_in_the_error(tmp_path: Path, gguf: Path) -> None:
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(gguf.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    with pytest.raises(EngineError, match=r"cannot load .*odd\.gguf: .*blk\.1\.attn_q\.weight"):
        load_engine(odd, EngineOptions(context=64))


def test_too_little_memory_is_said_in_words(tmp_path: Path, gguf: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom edgelm.errors import EngineError\n"
        "from runtime.engine import EngineOptions\nfrom runtime.engines.llamacpp import load_engine, load_library\n"
        "load_library()\nused = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20, used + 150 * 2**20))\n"
        "try:\n    load_engine(Path(sys.argv[1]), EngineOptions(context=512, sequences=256, kv_type='f32'))\n"
        "except EngineError as error:\n    print(error.message, '|', error.hint)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(gguf)], capture_output=True, text=True, check=False)
    assert "not enough memory" in result.stdout, result.stderr[-500:]
    assert "smaller" in result.stdout


def test_nothing_is_written_to_the_terminal(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = load_engine(gguf, EngineOptions(context=64, **ONE))
    engine.forward([Chunk(0, TOKENS[:5])])
    engine.close()
    with pytest.raises(EngineError):
        load_engine(gguf, EngineOptions(context=10_000))
    assert capfd.readouterr() == ("", "")


def test_importing_the_engine_does_not_load_the_library() -> None:
    code = "import sys, runtime.engines.llamacpp as module; print('llama_cpp' in sys.modules, module._library)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "None"]


def test_a_vocabulary_needs_no_weights(gguf: Path) -> None:
    vocabulary = load_vocabulary(gguf)
    text = "héllo <|im_end|>\n"
    ids = vocabulary.tokenize(text.encode(), special=True)
    assert 258 in ids
    assert 256 in vocabulary.tokenize(b"he", special=True)
    assert 258 not in vocabulary.tokenize(text.encode(), special=False)
    assert vocabulary.detokenize(ids, special=True).decode() == text
    assert vocabulary.token_bytes(258) == b""
    assert vocabulary.token_bytes(258, special=True) == b"<|im_end|>"
    assert vocabulary.end_of_generation() >= {258}
    with pytest.raises(EngineError, match="token 320"):
        vocabulary.token_bytes(320)
    with pytest.raises(EngineError, match="token -1"):
        vocabulary.detokenize([-1], special=False)
    vocabulary.close()
    vocabulary.close()


def test_a_decode_step_costs_little_python(gguf: Path) -> None:
    engine = load_engine(gguf, EngineOptions(context=512, **ONE))
    engine.forward([Chunk(0, TOKENS[:5])])
    decode = engine._decode
    engine._decode = lambda context, batch: 0

    def seconds() -> float:
        started = time.thread_time()
        for _ in range(20):
            engine.forward([Chunk(0, [5])])
        return (time.thread_time() - started) / 20

    assert min(seconds() for _ in range(15)) < 100e-6  # usually 15 to 20 microseconds
    engine._decode = decode
    engine.close()


def test_helpers_of_one_thread_are_let_go_for_another(gguf: Path) -> None:
    """libgomp counts what every thread keeps; with more than there are CPUs nobody spins."""
    two = load_engine(gguf, EngineOptions(context=64, batch=16, threads_decode=2, threads_prefill=2))
    tasks = Path("/proc/self/task")
    # Helpers belong to the thread that computes, another one beside ONNX Runtime on AMX; earlier models left some.
    apart(let_helpers_go)
    try:
        before = len(list(tasks.iterdir()))
        first = two.forward([Chunk(0, TOKENS[:5], "last")]).copy()
        assert len(list(tasks.iterdir())) == before + 1
        assert apart(let_helpers_go)
        assert len(list(tasks.iterdir())) == before
        two.truncate(0)
        assert np.array_equal(two.forward([Chunk(0, TOKENS[:5], "last")]), first)
    finally:
        two.close()
        apart(let_helpers_go)
