"""Ways to train one pruned student side by side, on the same few tokens in the same order.

    python benchmarks/compress_recipes.py --words DIR --recipes 32:2e-3 128:1e-3 [...] [--students DIR ...]

A recipe is SEQUENCES-PER-STEP:LEARNING-RATE. Each starts from the same cut (by KL, or ``--depth-by``) and reads the
corpus that ``compress_gpu.py`` of the same options trains on, whose words the teacher writes into ``--words`` unless
they are there. KL to the teacher on text that none of them read, and tokens per second, go to
``results/compress_recipes.jsonl``; those of finished ``--students``, ours or others', on the same texts, too. What few
tokens say of many is a guess: ways that win early may lose late.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import append, machine

from edgelm.progress import SILENT
from exporter.compress import pipeline, surgery
from exporter.compress.decoders import Decoders
from exporter.compress.run import CompressOptions, Run
from exporter.compress.training import Trainer, TrainingOptions
from exporter.device import resolve_device
from exporter.reference import open_torch_model

NAME = "compress_recipes"


def options(arguments: argparse.Namespace) -> CompressOptions:
    """The run whose corpus and cut all recipes share."""
    return CompressOptions(
        source=arguments.source,
        layers=arguments.layers,
        neurons=arguments.neurons,
        depth=arguments.depth_by,
        texts=tuple(arguments.text),
        own_share=arguments.own_share,
        own_tokens=arguments.own_tokens,
        tokens=arguments.tokens,
        length=arguments.length,
        device=arguments.device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="demo:smollm2")
    parser.add_argument("--words", type=Path, required=True, help="directory of the corpus, kept")
    parser.add_argument("--recipes", nargs="*", default=["32:1e-3"])
    parser.add_argument("--students", nargs="*", default=[], help="checkpoints to measure on the same texts")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--neurons", type=int, default=1280)
    parser.add_argument("--depth-by", choices=["influence", "kl"], default="kl")
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--tokens", type=int, default=64_000_000, help="of the corpus, as for compress_gpu.py")
    parser.add_argument("--recipe-tokens", type=int, default=4_000_000, help="that each recipe reads of them")
    parser.add_argument("--own-share", type=float, default=0.75)
    parser.add_argument("--own-tokens", type=int)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no recipe after so long")
    arguments = parser.parse_args()
    started = time.perf_counter()
    asked = options(arguments)
    checkpoint = pipeline.open_checkpoint(pipeline.open_source(asked.source))
    run = Run(asked, checkpoint, pipeline.tokenizer.read_tokenizer(checkpoint), arguments.words, SILENT)
    kind = Decoders(run)
    arguments.words.mkdir(parents=True, exist_ok=True)
    append(NAME, {"machine": machine(), "device": resolve_device(arguments.device).reason, "depth": asked.depth})
    with pipeline._models(run, kind, checkpoint) as (teacher, _):
        _full, wanted, _found = pipeline._shape(asked, checkpoint, teacher.config)
        corpus, held_out = kind.corpus(teacher)
        lessons = pipeline.Lessons(run, kind, teacher, corpus, held_out)
        note(stage="corpus", tokens=int(corpus.windows.size), wall_s=time.perf_counter() - started)
        kept = pipeline._kept(lessons, teacher, wanted, arguments.words / "kept.json")
        note(stage="cut", layers=kept.layers, wall_s=time.perf_counter() - started)
        for recipe in arguments.recipes:
            if time.perf_counter() - started > arguments.seconds:
                note(recipe=recipe, left_out=f"after {arguments.seconds:g} s")
                continue
            student = surgery.cut(teacher, wanted, kept)
            train(run, teacher, student, corpus, recipe, arguments)
            compare(lessons, recipe, student)
            del student
        for source in arguments.students:
            opened = pipeline.open_checkpoint(pipeline.open_source(source))
            with open_torch_model(opened, SILENT, device=arguments.device) as student:
                compare(lessons, opened.source.location, student)


def compare(lessons: pipeline.Lessons, name: str, student: Any) -> None:
    """KL of a student to the teacher on every text that nobody learned from."""
    lessons.run.comparisons.clear()
    lessons.compare(name, student)
    for item in lessons.run.comparisons:
        note(**item.model_dump())


def train(run: Any, teacher: Any, student: Any, corpus: Any, recipe: str, arguments: argparse.Namespace) -> None:
    """One recipe from the cut on, nothing kept of it."""
    batch, rate = recipe.split(":")
    tokens_of_a_step = int(batch) * corpus.windows.shape[1]
    training = TrainingOptions(
        steps=arguments.recipe_tokens // tokens_of_a_step,
        batch=int(batch),
        micro_batch=min(int(batch), arguments.micro_batch),
        learning_rate=float(rate),
        temperature=1.0,
        hidden_weight=0.0,
        attention_weight=0.0,
        matched=(),
        seed=0,
        save_every_s=1e9,
    )
    directory = arguments.words / "recipe"
    shutil.rmtree(directory, ignore_errors=True)
    trainer = Trainer(teacher, student, corpus, training, directory)
    started = time.perf_counter()
    trainer.run(SILENT)
    wall_s = time.perf_counter() - started
    last = float(np.mean([item.kl for item in trainer.curve[-20:]]))
    note(recipe=recipe, tokens=training.steps * tokens_of_a_step, training_kl=last, wall_s=wall_s,
         tps=training.steps * tokens_of_a_step / wall_s)  # fmt: skip
    shutil.rmtree(directory, ignore_errors=True)


def note(**row: Any) -> None:
    append(NAME, row)
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


if __name__ == "__main__":
    main()
