"""Prune, distil, kill -9 in the middle, resume: is the curve the same, how near is the student, how long did it take?

    python benchmarks/compress_run.py --work DIR

Wants a quiet machine and about twice the time of one training. One run goes through; another is killed once half of its
steps are on disk, and repeated. Raw rows (both runs, the comparisons, every step) go to ``results/compress_run.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from measure import edgelm, row, run, save


def killed_in_the_middle(command: list[str], state: Path, step: int) -> int:
    """Run until a state of at least ``step`` is on disk, then SIGKILL; the step that was on disk."""
    # Files would fill with nobody reading: what it prints is of no interest here.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if state.is_file() and (reached := int(json.loads(state.read_text())["step"])) >= step:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return reached
        time.sleep(0.2)
    raise SystemExit(f"{' '.join(command)}\nended with {process.returncode} before a state of step {step} was on disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="demo:smollm2")
    parser.add_argument("--work", type=Path, default=Path("compress-run"))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=196_608)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--kill-after", type=int, help="step whose state has to be on disk (half of all)")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    wanted = {"layers": arguments.layers, "tokens": arguments.tokens, "length": arguments.length}
    wanted |= {"batch": arguments.batch, "micro-batch": arguments.batch, "learning-rate": arguments.learning_rate}
    typed = ["compress", arguments.source, "--device", "cpu", "--json"]
    typed += [text for name, value in wanted.items() for text in (f"--{name}", str(value))]
    commands = {name: edgelm(*typed, "-o", str(arguments.work / name)) for name in ("whole", "killed")}
    steps = arguments.tokens // (arguments.batch * arguments.length)
    state = arguments.work / ".killed.training/distil/state.json"

    through = run(commands["whole"])
    reached = killed_in_the_middle(commands["killed"], state, arguments.kill_after or steps // 2)
    resumed = run(commands["killed"])

    curves, weights = (
        [(arguments.work / name / file).read_bytes() for name in ("whole", "killed")]
        for file in ("training.jsonl", "model.safetensors")
    )
    same = {
        "curve_same": curves[0] == curves[1],
        "weights_same": weights[0] == weights[1],
        "killed_after_step": reached,
    }
    comparisons = json.loads(through.stdout)["comparisons"]
    rows: list[dict[str, Any]] = [row("edgelm", "whole", through), row("edgelm", "resumed", resumed), same]
    save("compress_run", [*rows, *comparisons, *(json.loads(line) for line in curves[0].splitlines())])
    print("| stage | KL | p99 KL | same top token | perplexity | teacher's |\n" + "|---" * 6 + "|")
    for item in comparisons:
        kl = f"{item['kl_mean']:.4f} | {item['kl_p99']:.3f} | {item['top1_agreement']:.1%}"
        print(f"| {item['stage']} | {kl} | {item['ppl']:.3f} | {item['ppl_teacher']:.3f} |")
    print(f"{steps} steps in {through.wall_s:.0f} s, peak RSS {through.peak_rss_bytes / 2**20:.0f} MiB")
    told = f"curve {'the same' if same['curve_same'] else 'DIFFERS'}, weights "
    print(f"killed after step {reached} and resumed: {told}{'the same' if same['weights_same'] else 'DIFFER'}")
    if not (same["curve_same"] and same["weights_same"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
