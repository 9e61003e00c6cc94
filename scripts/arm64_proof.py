"""Prove the ARM images: doctor, logits against this machine, chats, memory limits, wrong kernels, large pages, export.

Runs the image built by ``arm64_image.py`` in locked-down containers, emulated by qemu on other machines, once for every
processor that stands for a kind of board. Writes what it saw to a JSON file and prints a table; exits 1 when a figure
misses its limit. Every row is kept as soon as it is there: a run that was cut off goes on where it stopped. Needs an
environment with EdgeLM itself (the reference is its engine on this machine).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import numpy.typing as npt
from arm64_image import (
    CACHE,
    EXPORTER_IMAGE,
    IMAGE,
    REPOSITORY,
    container_options,
    enable_emulation,
    engine,
    image_bytes,
    image_id,
    is_arm,
)
from arm64_kept import Kept, fingerprint

# qemu's processor, the kernels that must be chosen on it, and the boards it stands for.
PROCESSORS = {
    "cortex-a53": ("armv8.0_1", "Raspberry Pi 3, Zero 2"),
    "cortex-a72": ("armv8.0_1", "Raspberry Pi 4"),
    "cortex-a76": ("armv8.2_2", "Raspberry Pi 5, RK3588"),
    "max,sve=off": ("armv8.6_0", "i8mm without SVE"),
    "max,sve256=on": ("armv8.6_2", "SVE2 and i8mm"),
}
# Part number and features as each one's Linux would show them.
_PLAIN = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_A76 = f"{_PLAIN} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
CPUINFO = {
    "cortex-a53": ("0xd03", _PLAIN),
    "cortex-a72": ("0xd08", _PLAIN),
    "cortex-a76": ("0xd0b", _A76),
    "max,sve=off": ("0xd4b", f"{_A76} i8mm bf16"),
    "max,sve256=on": ("0xd4f", f"{_A76} i8mm bf16 sve sve2"),
}
QUANTS = {"gguf": ("F32", "Q8_0", "Q4_0", "Q4_K_M"), "onnx": ("fp32", "int8")}
SERVED = ("tiny-gguf-q8_0", "tiny-onnx-int8", "smollm2-gguf-q4_k_m", "smollm2-onnx-int8")
KL_LIMIT_EXACT = 1e-4
# Kernels of different width add int8 products in different order and group scales differently.
KL_LIMIT_QUANTISED = 1e-2
SAME_BYTES = 0.99
TINY_TOKENS, REAL_TOKENS = 160, 32
# qemu computes SVE at a fourteenth of its speed without: SmolLM2 sees the first tokens only there.
SLOW, REAL_TOKENS_SLOW = ("max,sve256=on",), 8
QUESTION = "What is the capital of France?"
MEMORY = "1g"
TIMEOUT_S = 7200.0
HELPERS = REPOSITORY / "scripts" / "arm64"


def processor_file(processor: str) -> Path:
    """``/proc/cpuinfo`` as Linux shows it on an imitated processor.

    qemu shows this machine's own file, in which ONNX Runtime finds no ARM core and crashes while it is imported.
    """
    part, features = CPUINFO[processor]
    path = CACHE / f"cpuinfo-{part}"
    lines = [f"Features\t: {features}", "CPU implementer\t: 0x41", "CPU architecture: 8", "CPU variant\t: 0x0"]
    lines += [f"CPU part\t: {part}", "CPU revision\t: 0", ""]
    text = "".join(f"processor\t: {number}\n" + "\n".join(lines) + "\n" for number in range(os.cpu_count() or 1))
    path.write_text(text, encoding="ascii")
    return path


def options_on(processor: str, memory: str, mounts: Sequence[str]) -> list[str]:
    """``container_options`` with the imitated processor's own ``/proc/cpuinfo``."""
    if not is_arm():
        mounts = [*mounts, f"{processor_file(processor)}:/proc/cpuinfo:ro"]
    return container_options(memory=memory, cpu=processor, mounts=mounts)


def tool(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edgelm", *arguments]


def checked(command: Sequence[str], what: str) -> str:
    """Output of a command that has to succeed, within two hours."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=TIMEOUT_S)
    if result.returncode != 0:
        sys.exit(f"{result.stdout[-2000:]}{result.stderr[-3000:]}\nerror: {what} failed (exit {result.returncode})")
    return result.stdout


def prepare_models() -> list[Path]:
    """Bundles of a tiny random model and of SmolLM2-135M in every type, made by this machine's exporter."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from tiny_models import make_tiny_llama  # type: ignore[import-not-found,unused-ignore]

    models = CACHE / "models"
    models.mkdir(parents=True, exist_ok=True)
    tiny = models / "tiny-checkpoint"
    if not tiny.is_dir():
        make_tiny_llama(tiny, hidden=256, ffn=512)
    bundles = []
    for family, source in (("tiny", str(tiny)), ("smollm2", "demo:smollm2")):
        for kind, quant in ((kind, quant) for kind, quants in QUANTS.items() for quant in quants):
            bundle = models / f"{family}-{kind}-{quant.lower()}"
            if not (bundle / "manifest.json").is_file():
                arguments = ("export", source, "--format", kind, "--quant", quant, "--no-verify", "--force")
                checked(tool(*arguments, "-o", str(bundle)), f"exporting {bundle.name}")
            bundles.append(bundle)
    return bundles


def tokens_for(processor: str | None) -> str:
    """Name of the file with the tokens that a processor computes, None for this machine's own."""
    return "tokens-slow.json" if processor in SLOW else "tokens.json"


def write_tokens(work: Path, bundles: Sequence[Path]) -> None:
    """The same tokens for every run: a plain English text in each family's vocabulary."""
    from pydoc_data.topics import topics

    from runtime.tokenizer import JsonTokenizer

    text = topics["assert"]
    for name, real in ((tokens_for(None), REAL_TOKENS), (tokens_for(SLOW[0]), REAL_TOKENS_SLOW)):
        tokens = {}
        for family, count in (("tiny", TINY_TOKENS), ("smollm2", real)):
            bundle = next(path for path in bundles if path.name.startswith(family))
            tokens[family] = JsonTokenizer(bundle / "tokenizer.json").encode(text)[:count]
        (work / name).write_text(json.dumps(tokens), encoding="ascii")


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def agreement(reference: Path, measured: Path) -> dict[str, float]:
    """Mean and largest KL divergence (nats per token), share of equal first choices, largest difference of a logit.

    Over the tokens that were measured; what a token's logits are does not depend on those after it.
    """
    got = np.load(measured)
    expected = np.load(reference)[: len(got)]
    p, q = log_softmax(expected), log_softmax(got)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    return {
        "tokens": len(got),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1_agreement": float((p.argmax(axis=1) == q.argmax(axis=1)).mean()),
        "logit_difference_max": float(np.abs(expected - got).max()),
    }


def fresh(directory: Path) -> Path:
    """An empty directory that the container's user may write to."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    return directory


def logits_in_container(
    work: Path, output: Path, bundles: Sequence[Path], processor: str, *, page_bytes: int | None = None
) -> Iterator[dict[str, Any]]:
    """Facts about each bundle as soon as it was computed in the image; its logits lie in ``output`` then."""
    mounts = [f"{work}:/given:ro", f"{CACHE / 'models'}:/models:ro", f"{HELPERS}:/proof:ro", f"{output}:/output"]
    options = options_on(processor, "3g", mounts)
    if page_bytes is not None:
        options += ["--env", f"QEMU_PAGESIZE={page_bytes}"]
    inside = [
        "/proof/logits.py",
        f"/given/{tokens_for(processor)}",
        "/output",
        *(f"/models/{bundle.name}" for bundle in bundles),
    ]
    run = [*engine(), "run", "--rm", *options, "--entrypoint", "python3", IMAGE, *inside]
    log = work / "logits.log"
    with log.open("wb") as sink, subprocess.Popen(run, stdout=subprocess.PIPE, stderr=sink, text=True) as child:
        assert child.stdout is not None
        deadline = Timer(TIMEOUT_S, child.kill)
        deadline.start()
        try:
            yield from (json.loads(line) for line in child.stdout)
        finally:
            deadline.cancel()
    if child.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        sys.exit(f"{tail}\nerror: computing logits on {processor} failed (exit {child.returncode})")


@dataclass(frozen=True)
class Proof:
    """What every part works with. ``image`` and ``exporter`` are the ids of the images."""

    work: Path
    bundles: Sequence[Path]
    kept: Kept
    image: str
    exporter: str

    @cached_property
    def reference(self) -> Path:
        """This machine's logits of all bundles."""
        reference = fresh(self.work / "reference")
        command = [sys.executable, str(HELPERS / "logits.py"), str(self.work / tokens_for(None)), str(reference)]
        checked([*command, *map(str, self.bundles)], "the reference run on this machine")
        return reference

    def origins(self, bundle: Path, processor: str) -> tuple[str, ...]:
        """What the logits of a bundle depend on, here and in the image."""
        tokens = self.work / tokens_for(processor)
        files = (bundle / "manifest.json", tokens, HELPERS / "logits.py", *self.computing)
        engines = (f"{name} {version(name)}" for name in ("llama_cpp_python", "onnxruntime"))
        return (processor, bundle.name, fingerprint(files), *engines)

    @cached_property
    def computing(self) -> Sequence[Path]:
        """Files that decide what logits come out of the image: its recipe, and every module that an engine loads.

        Not the whole image: a change of the command line would have hours of emulation done again for nothing.
        """
        for name in ("runtime.engines.llamacpp", "runtime.engines.onnx", "runtime.model"):
            import_module(name)
        loaded = (module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None))
        modules = {Path(name) for name in loaded if name is not None}
        rooms = [REPOSITORY / name for name in ("edgelm", "runtime", "targets")]
        own = [path for path in modules if any(room in path.parents for room in rooms)]
        recipe = ["Dockerfile.arm64", "constraints.txt", "scripts/build_arm64_wheel.py", "scripts/build_llama_wheel.py"]
        return sorted([*own, *(REPOSITORY / name for name in recipe), *(REPOSITORY / "docker").iterdir()])

    def once(self, part: str, compute: Callable[[], dict[str, Any]], *origins: str) -> dict[str, Any]:
        """The row that was kept, or a new one, which is kept when nothing in it misses its limit."""
        row = self.kept.find(part, *origins)
        if row is None:
            started = time.perf_counter()
            row = compute()
            row = {"seconds": round(time.perf_counter() - started, 1), **row}
            if not failures({part: [row] if part in MANY else row}):
                self.kept.add(row, part, *origins)
        return row


def prove_logits(proof: Proof, bundles: Sequence[Path], processors: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of (processor, model): kernels that were chosen, agreement with this machine, time."""
    rows: list[dict[str, Any]] = []
    for processor in processors:
        output = fresh(proof.work / f"logits-{processor.replace('=', '-').replace(',', '-')}")
        known = {bundle.name: proof.kept.find("logits", *proof.origins(bundle, processor)) for bundle in bundles}
        missing = {bundle.name: bundle for bundle in bundles if known[bundle.name] is None}
        for facts in logits_in_container(proof.work, output, [*missing.values()], processor) if missing else ():
            name, kernels = facts["model"], facts["versions"].get("kernels")
            row = {"processor": processor, "model": name, "kernels": kernels}
            row |= {"seconds": facts["seconds"], "cpu_s": facts["cpu_s"]}
            row |= agreement(proof.reference / f"{name}.npy", output / f"{name}.npy")
            proof.kept.add(row, "logits", *proof.origins(missing[name], processor))
            known[name] = row
        rows += [row for row in known.values() if row is not None]
        for row in rows[-len(bundles) :]:
            print(f"{processor:14} {row['model']:20} {row['kernels']} KL {row['kl_mean']:.2e}", file=sys.stderr)
    return rows


def ask_doctor(processor: str) -> dict[str, Any]:
    """What ``edgelm doctor`` says in the image, on one processor."""
    run = [*engine(), "run", "--rm", *options_on(processor, MEMORY, []), IMAGE, "doctor", "--json"]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    document = json.loads(result.stdout) if result.stdout.startswith("{") else {}
    findings = document.get("findings", [])
    broken = [f"{item['name']}: {item['detail']}" for item in findings if item["status"] == "broken"]
    said = {item["name"]: item for item in findings}
    print(f"{processor:14} doctor healthy: {document.get('healthy', False)} {broken or ''}", file=sys.stderr)
    return {
        "processor": processor,
        "healthy": document.get("healthy", False),
        "broken": broken if document else [result.stderr[-500:]],
        "cpu": said.get("cpu", {}).get("detail"),
        "features": said.get("cpu features", {}),
        "engine": document.get("engine"),
    }


def prove_chat(bundle: Path, processor: str, memory: str) -> dict[str, Any]:
    """Serve a bundle as the image does by default, ask, check health, stop: read-only, no root, no capabilities."""
    options = options_on(processor, memory, [f"{bundle}:/bundle:ro", f"{HELPERS}:/proof:ro"])
    name = f"edgelm-proof-{bundle.name}"
    subprocess.run([*engine(), "rm", "--force", name], capture_output=True, check=False)
    checked([*engine(), "run", "--detach", "--name", name, *options, IMAGE], f"starting {name}")
    try:
        inside = [*engine(), "exec", name, "python3"]
        answer = json.loads(checked([*inside, "/proof/chat.py", QUESTION, "12", "900"], f"chat with {name}"))
        healthy = subprocess.run([*inside, "-I", "/usr/local/bin/edgelm-health"], check=False).returncode == 0
        write = "import os; print(os.getuid()); open('/usr/x', 'w')"
        attempt = subprocess.run([*inside, "-c", write], capture_output=True, text=True, check=False)
        started = time.perf_counter()
        checked([*engine(), "stop", "--time", "60", name], f"stopping {name}")
        stop_s = time.perf_counter() - started
        code = int(checked([*engine(), "inspect", "--format", "{{.State.ExitCode}}", name], "reading the exit code"))
    finally:
        log = subprocess.run([*engine(), "logs", name], capture_output=True, text=True, check=False)
        (CACHE / f"{name}.log").write_text(log.stdout + log.stderr, encoding="utf-8")
        subprocess.run([*engine(), "rm", "--force", name], capture_output=True, check=False)
    facts = {"model": bundle.name, "processor": processor, "memory": memory, **answer, "healthy": healthy}
    facts |= {"uid": attempt.stdout.strip(), "read_only": "Read-only file system" in attempt.stderr}
    return {**facts, "exit_code": code, "stop_s": round(stop_s, 1)}


def prove_wrong_kernels(work: Path) -> dict[str, str]:
    """Kernels with dot products forced onto a processor without them: ``doctor`` has to say it, nobody has to crash.

    The selection of kernels is led astray by renaming the function with which they tell what they need.
    """
    script = (
        "import os, pathlib, shutil, sys, llama_cpp.llama_cpp as c\n"
        "source, target = pathlib.Path(c._lib._name).parent, pathlib.Path('/tmp/lib')\n"
        "target.mkdir()\n"
        "for name in ('libllama.so', 'libggml.so', 'libggml-base.so', 'libgomp.so.1'):\n"
        "    shutil.copy(source / name, target / name)\n"
        "data = (source / 'libggml-cpu-armv8.2_2.so').read_bytes()\n"
        "(target / 'libggml-cpu.so').write_bytes(data.replace(b'ggml_backend_score', b'ggml_backend_scorX'))\n"
        "os.environ['LLAMA_CPP_LIB_PATH'] = str(target)\n"
        "os.execv('/usr/bin/python3', ['python3', '-m', 'edgelm', 'doctor', '--json'])\n"
    )
    (work / "wrong_kernels.py").write_text(script, encoding="ascii")
    options = container_options(memory=MEMORY, cpu="cortex-a72", mounts=[f"{work}:/given:ro"])
    run = [*engine(), "run", "--rm", *options, "--entrypoint", "python3", IMAGE, "/given/wrong_kernels.py"]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    found = json.loads(result.stdout)["findings"] if result.stdout.startswith("{") else []
    said = [item["detail"] for item in found if item["name"] == "engine" and item["status"] == "broken"]
    return {"exit_code": str(result.returncode), "said": said[0] if said else result.stderr[-500:]}


def prove_large_pages(proof: Proof) -> dict[str, Any]:
    """Segments of every ELF file in the image; a GGUF and an ONNX model mapped and computed with pages of 16 KiB.

    qemu imitates the page size for what a program asks and maps; loading by a kernel with such pages is what the
    alignment of the segments stands for.
    """
    options = container_options(memory=MEMORY, cpu="cortex-a76", mounts=[f"{HELPERS}:/proof:ro"])
    run = [*engine(), "run", "--rm", *options, "--entrypoint", "python3", IMAGE, "/proof/segments.py"]
    facts: dict[str, Any] = json.loads(checked(run, "reading the segments of the image"))
    if is_arm():
        return facts
    output = fresh(proof.work / "logits-large-pages")
    bundles = [CACHE / "models" / name for name in SERVED if name.startswith("tiny")]
    for row in logits_in_container(proof.work, output, bundles, "cortex-a76", page_bytes=16384):
        name = row["model"]
        same = agreement(proof.reference / f"{name}.npy", output / f"{name}.npy")
        facts[name] = {"page_bytes": row["page_bytes"], **same}
    return facts


def prove_exporter(work: Path) -> dict[str, Any]:
    """A bundle made and proven in the exporter's image, then checked by this machine; without torch."""
    output = fresh(work / "exported")
    source = CACHE / "models" / "tiny-checkpoint"
    options = container_options(
        memory=MEMORY, cpu="cortex-a76", mounts=[f"{source}:/{source.name}:ro", f"{output}:/output"]
    )
    arguments = ["export", f"/{source.name}", "--quant", "Q4_K_M", "-o", "/output/bundle", "--json"]
    started = time.perf_counter()
    made = checked([*engine(), "run", "--rm", *options, EXPORTER_IMAGE, *arguments], "exporting in the image")
    seconds = time.perf_counter() - started
    checked(tool("verify", str(output / "bundle")), "checking what was exported")
    # Quantisers of two machines round a scale differently here and there: their compilers fuse other multiplications.
    files = (output / "bundle", CACHE / "models" / "tiny-gguf-q4_k_m")
    there, here = (np.fromfile(bundle / "model.gguf", np.uint8) for bundle in files)
    same = float((there == here).mean()) if there.size == here.size else 0.0
    quality = json.loads(made)["quality"]
    facts = {"image_bytes": image_bytes(EXPORTER_IMAGE), "seconds": round(seconds, 1), "share_of_bytes_as_here": same}
    return {**facts, "kl_mean": quality["kl_mean"], "token_identity": quality["token_identity"]}


def failures(report: dict[str, Any]) -> list[str]:
    """Every figure that misses its limit, as a sentence."""
    found = [f"doctor on {row['processor']}: {row['broken']}" for row in report.get("doctor", ()) if not row["healthy"]]
    # The imitated maximum has extensions (SME) that no kernels here are compiled for; doctor is right to say so.
    found += [
        f"doctor on {row['processor']} warns of features: {row['features']}"
        for row in report.get("doctor", ())
        if not row["processor"].startswith("max") and row["features"].get("status") != "ok"
    ]
    for row in report.get("logits", ()):
        where = f"{row['model']} on {row['processor']}"
        limit = KL_LIMIT_EXACT if row["model"].endswith(("-f32", "-fp32")) else KL_LIMIT_QUANTISED
        if not (math.isfinite(row["kl_mean"]) and row["kl_mean"] <= limit):
            found.append(f"{where}: mean KL {row['kl_mean']:.2e} exceeds {limit:g}")
        expected = PROCESSORS[row["processor"]][0] if "-gguf-" in row["model"] else None
        if not is_arm() and row["kernels"] != expected:
            found.append(f"{where}: kernels {row['kernels']}, expected {expected}")
    for row in report.get("chat", ()):
        good = row["healthy"] and row["read_only"] and row["uid"] == "10001" and row["exit_code"] == 0
        if not good:
            found.append(f"container of {row['model']}: {row}")
        if row["model"].startswith("smollm2") and "Paris" not in row["answer"]["message"]["content"]:
            found.append(f"{row['model']} answered: {row['answer']['message']['content']!r}")
    crash = report.get("wrong_kernels")
    if crash and "SIGILL" not in crash["said"]:
        found.append(f"wrong kernels were not recognised: {crash}")
    exported = report.get("exporter")
    if exported and not (exported["token_identity"]["identical"] and exported["share_of_bytes_as_here"] >= SAME_BYTES):
        found.append(f"the exporter's image: {exported}")
    return found + (_page_failures(report["large_pages"]) if "large_pages" in report else [])


def _page_failures(facts: dict[str, Any]) -> list[str]:
    found = []
    if facts["alignment_min_bytes"] < 65536:
        found.append(f"a segment is aligned to {facts['alignment_min_bytes']} bytes, less than a page of 64 KiB")
    for name, row in facts.items():
        if isinstance(row, dict) and (row["page_bytes"] != 16384 or not row["kl_mean"] <= KL_LIMIT_QUANTISED):
            found.append(f"{name} with pages of 16 KiB: {row}")
    return found


MANY = ("doctor", "chat", "logits")  # parts of several rows
PARTS = ("doctor", "wrong_kernels", "large_pages", "chat", "exporter", "logits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processor", action="append", choices=PROCESSORS, help="only this one; repeatable")
    parser.add_argument("--family", choices=["tiny", "smollm2"], help="only the logits of this model")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; repeatable")
    parser.add_argument("--anew", action="store_true", help="compute again what earlier runs have kept")
    parser.add_argument("-o", "--output", type=Path, default=CACHE / "report.json", help="where the figures go")
    arguments = parser.parse_args()
    processors = arguments.processor or list(PROCESSORS)
    wanted = arguments.part or PARTS
    enable_emulation()
    bundles = prepare_models()
    proof = Proof(CACHE / "proof", bundles, Kept(CACHE / "rows.jsonl"), image_id(), image_id(EXPORTER_IMAGE))
    proof.work.mkdir(parents=True, exist_ok=True)
    if arguments.anew:
        proof.kept.forget()
    write_tokens(proof.work, bundles)
    compared = [bundle for bundle in bundles if bundle.name.startswith(arguments.family or "")]
    served = [CACHE / "models" / name for name in SERVED]
    report: dict[str, Any] = {"image": proof.image, "image_bytes": image_bytes(), "emulated": not is_arm()}

    def chat(bundle: Path) -> dict[str, Any]:
        origins = (proof.image, bundle.name, fingerprint([bundle / "manifest.json", HELPERS / "chat.py"]))
        return proof.once("chat", lambda: prove_chat(bundle, "cortex-a76", MEMORY), *origins)

    def doctor(processor: str) -> dict[str, Any]:
        return proof.once("doctor", lambda: ask_doctor(processor), proof.image, processor)

    parts: dict[str, Callable[[], Any]] = {
        "doctor": lambda: [doctor(processor) for processor in processors],
        "wrong_kernels": lambda: (
            {} if is_arm() else proof.once("wrong_kernels", lambda: prove_wrong_kernels(proof.work), proof.image)
        ),
        "large_pages": lambda: proof.once("large_pages", lambda: prove_large_pages(proof), proof.image),
        "chat": lambda: [chat(bundle) for bundle in served],
        "exporter": lambda: proof.once("exporter", lambda: prove_exporter(proof.work), proof.exporter),
        "logits": lambda: prove_logits(proof, compared, processors),
    }
    for part in PARTS:
        if part in wanted:
            report[part] = parts[part]()
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in report.get("chat", ()):
        print(f"{row['model']}: {row['answer']['message']['content']!r} (ready after {row['ready_s']} s)")
    missed = failures(report)
    print("\n".join(f"missed: {sentence}" for sentence in missed) or "every figure is within its limit")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
