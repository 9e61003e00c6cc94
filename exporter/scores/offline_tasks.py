"""Two tasks of lm-eval that need no network, made from the evaluation half of the built-in text.

``doc-ending``: which of four sentences ends this paragraph? Three are ends of other paragraphs, of nearly the same
length. ``doc-word``: the last word of a paragraph, as greedy decoding would write it. They order models and
quantisations of one model; a published leaderboard they are not. Deterministic: the same text gives the same questions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from exporter.texts import Text, evaluation_text

CHOICES = 4
SHORTEST, LONGEST = 20, 200  # characters of an ending: one word is no sentence, a page is no ending
LEAST_CONTEXT = 80  # characters before it, or nothing tells which ending belongs there
NEIGHBOURS = 12  # wrong endings come from so many of the nearest lengths
SEED = 1


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph in two parts, ``ending`` with the blank that stands before it."""

    context: str
    ending: str


def _paragraphs(text: Text) -> list[str]:
    """Running text only: no code, no tables, no headings; a paragraph's lines joined."""
    parts = (part for part in text.content.split("\n\n") if not part.startswith((" " * 5, ">", "|", "*", "+")))
    joined = (" ".join(part.split()) for part in parts)
    return [part for part in joined if part.endswith(".") and not re.search(r"[=|+]{3,}|::", part)]


def ending_questions(text: Text) -> list[dict[str, Any]]:
    """Rows of ``context``, ``choices`` and the number of the right one (``answer``)."""
    cut = []
    for part in _paragraphs(text):
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", part)
        paragraph = Paragraph(" ".join(sentences[:-1]), " " + sentences[-1])
        if len(paragraph.context) >= LEAST_CONTEXT and SHORTEST <= len(paragraph.ending) <= LONGEST:
            cut.append(paragraph)
    cut.sort(key=lambda paragraph: (len(paragraph.ending), paragraph.ending))
    draw = random.Random(SEED)  # noqa: S311 - questions, no secrets
    rows = []
    for index, paragraph in enumerate(cut):
        start = max(0, min(index - NEIGHBOURS // 2, len(cut) - NEIGHBOURS - 1))
        others = [other.ending for other in cut[start : start + NEIGHBOURS + 1] if other.ending != paragraph.ending]
        if len(set(others)) < CHOICES - 1:
            continue
        choices = [paragraph.ending, *draw.sample(sorted(set(others)), CHOICES - 1)]
        draw.shuffle(choices)
        rows.append({"context": paragraph.context, "choices": choices, "answer": choices.index(paragraph.ending)})
    draw.shuffle(rows)  # sorted by length until here: a limit would take the short ones only
    return rows


def word_questions(text: Text) -> list[dict[str, Any]]:
    """Rows of ``context`` and the paragraph's last ``word``, its blank in front and its full stop left out."""
    rows = []
    for part in _paragraphs(text):
        match = re.fullmatch(r"(.+)( [A-Za-z]{4,})\.", part)
        if match and len(match[1]) >= LEAST_CONTEXT:
            rows.append({"context": match[1], "word": match[2]})
    random.Random(SEED).shuffle(rows)  # noqa: S311 - questions, no secrets
    return rows


def _config(name: str, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    data = {"test": datasets.Dataset.from_list(list(rows))}
    return {
        "task": name,
        "custom_dataset": lambda **_metadata: data,
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "target_delimiter": "",
        "metadata": {"version": 1},
        **settings,
    }


def _ending(text: Text) -> dict[str, Any]:
    settings = {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    return _config("doc-ending", ending_questions(text), settings)


def _word(text: Text) -> dict[str, Any]:
    settings = {
        "output_type": "loglikelihood",
        "doc_to_target": "{{word}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    }
    return _config("doc-word", word_questions(text), settings)


OFFLINE = {"doc-ending": _ending, "doc-word": _word}


def offline_task(name: str) -> ConfigurableTask:
    """One of ``OFFLINE`` as lm-eval's task."""
    return ConfigurableTask(config=OFFLINE[name](evaluation_text()))
