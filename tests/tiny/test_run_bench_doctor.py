"""The commands run, bench and doctor on a tiny random model, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgelm.cli.app import run_cli
from edgelm.errors import BundleError
from edgelm.report import read_report
from runtime.bench import BenchOptions, bench
from runtime.engine import EngineOptions
from runtime.model import generation_end, open_model
from runtime.probe import ProbeError, probe, write_tiny_gguf
from runtime.shortfall import build_findings
from tests.fake_engine import CHATML

pytestmark = pytest.mark.tiny


@pytest.fixture(scope="module")
def chat_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template in its header."""
    import gguf as library

    directory = tmp_path_factory.mktemp("chat")
    write_tiny_gguf(directory / "plain.gguf", context=4096)
    reader = library.GGUFReader(directory / "plain.gguf")
    path = directory / "chat.gguf"
    writer = library.GGUFWriter(str(path), "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=kind)
    writer.add_chat_template(CHATML)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def edgelm(*arguments: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = run_cli(list(arguments))
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_one_answer_as_json(chat_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", str(chat_gguf), "hello", "-n", "5", "--threads", "1", "--json", "--seed", "1")
    code, out, err = edgelm(*arguments, capfd=capfd)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["model"] == "chat"
    # <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n: three special tokens, bytes, "he" merged into one
    assert document["prompt_tokens"] == 3 + len("user\nhello") - 1 + len("\n") + len("assistant\n")
    assert document["completion_tokens"] <= 5
    assert document["decode_tps"] > 0
    assert document["rss_bytes"] > 0


def test_a_schema_holds_the_answer(chat_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": ["on", "off"]}, "minItems": 2, "maxItems": 3}')
    arguments = ("run", str(chat_gguf), "hello", "--threads", "1", "--json-schema", str(schema))
    code, out, _ = edgelm(*arguments, capfd=capfd)
    assert code == 0
    assert set(json.loads(out)) <= {"on", "off"}
    for text, told in (("{", "not JSON"), ("[]", "not a JSON schema"), ('{"type": "banana"}', "Invalid type")):
        schema.write_text(text)
        code, out, err = edgelm(*arguments, capfd=capfd)
        assert (code, out) == (2, "")
        assert told in err
        assert "schema.json" in err


def test_raw_text_is_continued_and_the_last_line_tells_the_speed(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = edgelm("run", str(gguf), "hello", "--raw", "-n", "4", "--threads", "1", capfd=capfd)
    assert code == 0
    assert out.endswith("\n")
    assert "decode" in err
    assert "prefill" in err
    assert "TTFT" in err
    assert "RSS" in err


def test_a_chat_reuses_its_prefix_and_survives_overflow(
    chat_gguf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", "", "again", "x" * 300, "more", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda _prompt="": next(lines))
    arguments = ("run", str(chat_gguf), "-n", "4", "--threads", "1", "--context", "200")
    code, _, err = edgelm(*arguments, capfd=capfd)
    assert code == 0
    told = [line for line in err.splitlines() if line.startswith("decode")]
    assert len(told) == 3
    assert " 0 cached" in told[0]
    assert " 0 cached" not in told[1]
    assert "error: the prompt has" in err
    assert next(lines) == "never"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json",), "needs a PROMPT"),
        (("hi", "--raw", "--system", "x"), "exclude each other"),
        (("hi", "--temperature", "-1"), "temperature"),
        (("hi", "--top-p", "0"), "top_p"),
        ((), "no chat template"),
    ],
)
def test_wrong_usage_exits_2(
    gguf: Path, arguments: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = edgelm("run", str(gguf), *arguments, capfd=capfd)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_missing_bundle_is_one_error(tmp_path: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    extra = ("hi",) if command == "run" else ()
    code, out, err = edgelm(command, str(tmp_path / "none"), *extra, capfd=capfd)
    assert (code, out) == (1, "")
    assert err.splitlines()[0].startswith("error: ")
    assert "none" in err


def test_ctrl_c_ends_a_long_answer_at_once(chat_gguf: Path) -> None:
    code = "import sys; from edgelm.cli.app import run_cli; sys.exit(run_cli(sys.argv[1:]))"
    # Greedily this model repeats itself to the limit; a sampled answer can end before the signal arrives.
    arguments = ["run", str(chat_gguf), "hello", "-n", "4000", "--threads", "1", "--raw"]
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, err = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 130
    assert time.monotonic() - started < 10
    assert b"interrupted" in err
    assert b"Traceback" not in err


def test_bench_writes_a_report(gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    arguments = ("bench", str(gguf), "-p", "32", "-n", "8", "-r", "2", "--depth", "16", "--threads", "1")
    code, out, _ = edgelm(*arguments, "--json", "-o", str(path), capfd=capfd)
    assert code == 0
    document: dict[str, Any] = json.loads(out)
    for name in ("prefill_tps", "decode_tps", "ttft_s"):
        assert len(document[name]["samples"]) == 2
        assert document[name]["p5"] <= document[name]["median"] <= document[name]["p95"]
    assert set(document["memory"]) >= {"rss_peak_bytes", "anonymous_bytes", "file_bytes", "kv_bytes", "weights_bytes"}
    assert document["predicted"]["decode_tps"] > 0
    assert document["model"]["quant"] in ("Q4_0", "Q8_0")
    assert document["settings"]["depth"] == 16
    assert document["valid"] == (not document["warnings"])
    assert read_report(path).model_dump(mode="json") == document


def test_a_quantised_cache_is_half_as_large(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kv_bytes = {}
    for kv_type in ("f16", "q8_0"):
        arguments = ["bench", str(gguf), "-p", "8", "-n", "4", "-r", "1", "--threads", "1", "--json"]
        assert run_cli([*arguments, "--kv-type", kv_type]) == 0
        report = json.loads(capfd.readouterr().out)
        assert report["settings"]["kv_type"] == kv_type
        kv_bytes[kv_type] = report["memory"]["kv_bytes"]
    assert kv_bytes["q8_0"] == kv_bytes["f16"] * 34 // 64


def test_reports_tell_the_kind_of_attention(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(gguf), "-p", "8", "-n", "4", "-r", "1", "--threads", "1", "--flash-attention"]
    for kind in ("on", "off"):
        assert run_cli([*arguments, kind, "--json"]) == 0
        engine = json.loads(capfd.readouterr().out)["engine"]
        assert (engine["flash_attention"], engine["attention_reason"]) == (kind == "on", "asked for")
    assert run_cli([*arguments, "off", "--jsonl"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["flash_attn"] for row in rows] == [0, 0]
    assert run_cli([*arguments, "off", "--kv-type", "q8_0"]) == 2
    assert "needs flash attention" in capfd.readouterr().err


def test_answers_hang_on_the_kind_by_rounding_only(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answers = []
    for kind in ("on", "off", "auto"):
        arguments = ["run", str(gguf), "hello", "--raw", "-n", "2", "--json", "--flash-attention", kind]
        assert run_cli(arguments) == 0
        answers.append(json.loads(capfd.readouterr().out)["text"])
    assert answers[0] == answers[1] == answers[2]


def test_bench_as_markdown_and_as_a_table(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("bench", str(gguf), "-p", "8", "-n", "4", "-r", "1", "--threads", "1")
    code, out, _ = edgelm(*arguments, "--markdown", capfd=capfd)
    assert code == 0
    assert out.startswith("| model | size | params | backend | threads | test | t/s |")
    assert "| CPU | 1 | pp8 |" in out
    code, out, _ = edgelm(*arguments, capfd=capfd)
    assert "weights, mapped" in out
    assert "warm start: open" in out
    code, out, _ = edgelm(*arguments, "--jsonl", capfd=capfd)
    assert [json.loads(line)["n_prompt"] for line in out.splitlines()] == [8, 0]
    code, out, _ = edgelm(*arguments, "--csv", capfd=capfd)
    assert '"n_prompt","n_gen","n_depth"' in out.splitlines()[0]
    assert len(out.splitlines()) == 3


def test_a_sweep_with_a_cold_start_is_remembered_and_compared(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("EDGELM_NO_HISTORY", raising=False)
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    sweep = ("-p", "8,16", "-n", "4", "-r", "5", "--depth", "0,32", "--sequences", "1,2", "--threads", "1", "--cold")
    for path in paths:
        assert edgelm("bench", str(gguf), *sweep, "-o", path, "--json", capfd=capfd)[0] == 0
    report = read_report(Path(paths[0]))
    assert len(report.measurements) == 2 * (2 + 2)
    assert {item.kind for item in report.starts} <= {"cold", "warm"}
    assert len(report.starts) == 2
    assert report.model.sha256 is not None
    parts = report.memory.parts
    assert parts is not None
    assert abs(parts.unexplained_bytes) < 0.03 * (report.memory.rss_steady_bytes or 0)
    assert report.conditions is not None
    assert report.conditions.readings > 16
    code, out, _ = edgelm("history", str(gguf), "--json", capfd=capfd)
    runs = json.loads(out)["runs"]
    assert (code, len(runs)) == (0, 2)
    again = tmp_path / "again.json"
    assert edgelm("history", "--run", runs[0]["id"], "-o", str(again), capfd=capfd)[0] == 0
    assert read_report(again) == report
    assert edgelm("bench", str(gguf), *sweep, "--no-history", "--json", capfd=capfd)[0] == 0
    assert len(json.loads(edgelm("history", "--json", capfd=capfd)[1])["runs"]) == 2
    code, out, _ = edgelm("compare", *paths, "--json", capfd=capfd)
    changes = {change["figure"]: change for change in json.loads(out)["changes"]}
    assert code == 0
    assert len(changes) == len(report.measurements) + 1
    # Speeds depend on what else runs here, memory does not.
    assert changes["peak RSS (bytes)"]["verdict"] == "no difference"
    assert changes["tg4 x2 @ d32 (tok/s)"]["p_value"] is not None


def test_bench_refuses_what_does_not_fit_the_model(gguf: Path) -> None:
    with pytest.raises(Exception, match="trained for 512"):
        bench(gguf, BenchOptions(prompts=(600,), generated_tokens=1, threads_decode=(1,)))


def test_doctor_tells_what_it_looked_at(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = edgelm("doctor", str(gguf), "--json", capfd=capfd)
    document = json.loads(out)
    status = {finding["name"]: finding["status"] for finding in document["findings"]}
    assert status["engine"] == status["model"] == "ok"
    assert (code, document["healthy"]) == (0, True)
    assert {"python", "cpu", "threads", "memory"} <= set(status)
    assert "CPU" in document["engine"]["system"]


def test_doctor_exits_1_for_a_broken_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 100)
    code, out, _ = edgelm("doctor", str(broken), capfd=capfd)
    assert code == 1
    assert "broken" in out


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGSEGV, "segmentation fault"), (signal.SIGILL, "instruction"), (signal.SIGKILL, "killed")],
)
def test_a_crash_becomes_a_sentence(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, words: str
) -> None:
    crashing = tmp_path / "python"
    crashing.write_text(f"#!/bin/sh\nkill -{number.value} $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    with pytest.raises(ProbeError, match=rf"{words}.*\({number.name}\)") as caught:
        probe(gguf)
    assert caught.value.hint


def test_a_hanging_engine_is_given_up(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    with pytest.raises(ProbeError, match=r"did not finish .* in 0\.2 s"):
        probe(gguf, timeout_s=0.2)


def test_an_engine_that_crashes_while_it_is_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    code, out, _ = edgelm("doctor", "--json", capfd=capfd)
    told = [item for item in json.loads(out)["findings"] if "ONNX bundles cannot be run here" in item["detail"]]
    assert code == 0
    assert [item["status"] for item in told] == ["warning"]
    assert "segmentation fault (SIGSEGV) while it was imported" in told[0]["detail"]


def test_cpu_features_that_lie_idle_are_told() -> None:
    system = "CPU : SSE3 = 1 | AVX = 1 | AVX2 = 1 | FMA = 1 | F16C = 1 | LLAMAFILE = 1 |"
    assert [item.status for item in build_findings(("avx", "avx2", "fma"), system)] == ["ok"]
    finding, amx = build_findings(("avx", "avx2", "avx512_vnni", "amx_int8"), system)
    assert finding.status == "warning"
    assert "avx512_vnni" in finding.detail
    assert "amx" not in finding.detail
    assert (amx.name, amx.status) == ("amx", "note")
    arm = build_findings(("neon", "dotprod"), "CPU : NEON = 1 | ARM_FMA = 1 | DOTPROD = 1 | BLAS = 1 |")
    assert [(item.name, item.status) for item in arm] == [("cpu features", "ok"), ("blas", "note")]


def test_a_bare_file_gets_a_context_it_was_trained_for(gguf: Path, chat_gguf: Path) -> None:
    for path, context in ((gguf, 512), (chat_gguf, 4096)):
        model = open_model(path, EngineOptions(context=0, threads_decode=1, threads_prefill=1))
        assert model.engine.info.context == context
        assert (model.chat_template is None) == (path == gguf)
        assert model.stop_tokens >= {258}
        model.close()


@pytest.mark.parametrize(
    ("text", "expected"), [("{}", set()), ('{"eos_token_id": 2}', {2}), ('{"eos_token_id": [2, 5]}', {2, 5})]
)
def test_generation_config(tmp_path: Path, text: str, expected: set[int]) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text, encoding="utf-8")
    assert generation_end(path) == expected


@pytest.mark.parametrize("text", ["", '{"eos_token_id": "x"}', '{"eos_token_id": [-1]}'])
def test_malformed_generation_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match="generation_config"):
        generation_end(path)
