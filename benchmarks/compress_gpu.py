"""Distilling on one data-centre GPU: 15 layers, 1280 neurons, 64 M tokens, a share of them the teacher's own.

    python benchmarks/compress_gpu.py --work DIR --peak-tflops 989 [--tokens N] [--finish Q4_0 --finish-tokens N]
    python benchmarks/compress_gpu.py --work DIR --student DIR --finish Q4_0 --finish-tokens N

``compress_recipes.py --students`` measures other students on the same texts. ``--finish`` trains on through a
quantisation and compares with the same student quantised afterwards at the same bytes; the goal is at most 0.6 of its
KL. With ``--student`` one that is there is finished, nothing pruned. Tells tokens/s of writing and of training and the
share of the GPU's peak: 6 operations per token and student's weight and 2 per teacher's (forward, backward; forward
alone), attention left out, over the dense bfloat16 peak that is given. ``--seconds`` ends a run in time; the same
command goes on where it was. Raw rows are appended to ``results/compress_gpu.jsonl`` as they come, so that a killed run
leaves what it knew.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import append, machine

from edgelm.progress import Stage
from exporter.compress.pipeline import compress
from exporter.compress.run import CompressOptions

FINISH_GOAL = 0.6
_TELL_EVERY_S = 15.0


@dataclass
class Timed:
    """A stage under way. What is advanced first was done before (a resumed run): the rate begins after it."""

    name: str
    unit: str
    started_s: float = field(default_factory=time.perf_counter)
    done: int = 0
    before: int | None = None
    begun_s: float = 0.0
    told_s: float = field(default_factory=time.perf_counter)
    latest: str = ""

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if self.before is None:
            self.before, self.begun_s = self.done, time.perf_counter()
        if time.perf_counter() - self.told_s > _TELL_EVERY_S:
            self.told_s = time.perf_counter()
            self.note()

    def tell(self, text: str) -> None:
        self.latest = text

    def note(self, **more: Any) -> float:
        """A row of how far it is; the units per second so far."""
        now = time.perf_counter()
        rate = (self.done - (self.before or 0)) / max(now - self.begun_s, 1e-9) if self.before is not None else 0.0
        row = {"stage": self.name, "unit": self.unit, "done": self.done, "wall_s": now - self.started_s, "rate": rate}
        append("compress_gpu", {**row, "latest": self.latest, **more})
        print(f"{self.name}: {self.done} {self.unit} in {row['wall_s']:.1f} s, {rate:.0f}/s {self.latest}", flush=True)
        return rate


class Stopwatch:
    """A progress that notes how long stages took, and comparisons as soon as they are on disk."""

    def __init__(self, comparisons: Path) -> None:
        self.rates: dict[str, float] = {}
        self._comparisons, self.told = comparisons, 0

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        self._tell_comparisons()
        stage = Timed(name, unit)
        try:
            yield stage
        finally:
            rate = stage.note(ended=True, total=total)
            if rate > 0:  # finishing has the name of distilling and comes second
                self.rates.setdefault(name, rate)

    def _tell_comparisons(self) -> None:
        if not self._comparisons.is_file():
            return
        found = json.loads(self._comparisons.read_text(encoding="utf-8"))
        for item in found[self.told :]:
            append("compress_gpu", item)
            print(f"{item['stage']}, {item['text']}: KL {item['kl_mean']:.4f}", flush=True)
        self.told = len(found)


def _options(arguments: argparse.Namespace) -> CompressOptions:
    there = arguments.student is not None
    return CompressOptions(
        source=arguments.student if there else arguments.source,
        teacher=arguments.source if there else None,
        layers=None if there else arguments.layers,
        neurons=None if there else arguments.neurons,
        own_share=arguments.own_share,
        own_tokens=arguments.own_tokens,
        texts=tuple(arguments.text),
        depth=arguments.depth_by,
        tokens=0 if there else arguments.tokens,
        length=arguments.length,
        batch=arguments.batch,
        micro_batch=arguments.micro_batch,
        learning_rate=arguments.learning_rate,
        finish=arguments.finish,
        finish_tokens=arguments.finish_tokens,
        device=arguments.device,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="demo:smollm2", help="the teacher")
    parser.add_argument("--student", help="a student to finish; nothing is pruned or distilled")
    parser.add_argument("--work", type=Path, default=Path("compress-gpu"))
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--neurons", type=int, default=1280)
    parser.add_argument("--tokens", type=int, default=64_000_000)
    parser.add_argument("--own-share", type=float, default=0.75)
    parser.add_argument("--own-tokens", type=int, help="how many the teacher writes; fewer are read repeatedly")
    parser.add_argument("--text", type=Path, action="append", default=[], help="instead of the built-in documentation")
    parser.add_argument("--depth-by", choices=["influence", "kl"], default="kl")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--finish", help="a mix, or a bundle whose types are taken")
    parser.add_argument("--finish-tokens", type=int, default=4_000_000)
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long and keep the state; 0: never")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries this script out")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16, of the GPU's data sheet")
    arguments = parser.parse_args()
    if arguments.student and not arguments.finish:
        parser.error("--student needs --finish")
    return arguments


def _tell_results(record: Any, finish: str | None) -> None:
    found = {(item.stage, item.text): item.kl_mean for item in record.comparisons}
    texts = list(dict.fromkeys(item.text for item in record.comparisons))
    if any(stage == "distilled" for stage, _ in found):
        print("| text | KL pruned | KL distilled |\n" + "|---" * 3 + "|")
        for text in texts:
            print(f"| {text} | {found['pruned', text]:.4f} | {found['distilled', text]:.4f} |")
    if finish:
        print("| text | KL quantised afterwards | KL finished | ratio | goal |\n" + "|---" * 5 + "|")
        for text in texts:
            after, through = (
                next(kl for (stage, name), kl in found.items() if name == text and stage.startswith(start))
                for start in ("quantised to", "finished for")
            )
            met = "met" if through <= FINISH_GOAL * after else "missed"
            print(f"| {text} | {after:.4f} | {through:.4f} | {through / after:.2f} | {met} |")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    arguments = _arguments()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here: this measures training on a GPU")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    options, student = (
        _options(arguments),
        arguments.work / (f"finished-{Path(arguments.finish).name}" if arguments.student else "student"),
    )
    arguments.work.mkdir(parents=True, exist_ok=True)
    versions = {"device": device, "torch": torch.__version__, "options": str(asdict(options))}
    append("compress_gpu", {"machine": machine(), **versions})
    watch = Stopwatch(student.with_name(f".{student.name}.training") / "comparisons.json")
    if arguments.seconds > 0:
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, arguments.seconds)
    started = time.perf_counter()
    try:
        record = compress(options, student, force=True, progress=watch).record
    except KeyboardInterrupt:
        raise SystemExit(
            f"stopped after {time.perf_counter() - started:.0f} s; the same command goes on from what is kept"
        ) from None
    finally:
        if arguments.device == "cuda":
            append("compress_gpu", {"peak_gpu_bytes": torch.cuda.max_memory_allocated()})
    operations = 6 * record.parameters + 2 * record.parameters_teacher
    rate = watch.rates.get("distilling", 0.0)
    share = rate * operations / (arguments.peak_tflops * 1e12)
    writing = watch.rates.get("the teacher writes", 0.0)
    append("compress_gpu", {"training_tps": rate, "writing_tps": writing, "share_of_peak": share})
    for item in record.comparisons[watch.told :]:
        append("compress_gpu", item.model_dump())
    _tell_results(record, arguments.finish)
    print(f"training {rate:.0f} tokens/s, {share:.1%} of the peak; writing {writing:.0f} tokens/s")


if __name__ == "__main__":
    main()
