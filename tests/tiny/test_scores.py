"""Task scores: log-likelihoods judged by transformers on the same tiny model, tasks by hand, and the whole command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_tiny_llama

from edgelm.cli.app import run_cli
from edgelm.errors import UsageError
from exporter.options import ExportOptions
from exporter.pipeline import export
from exporter.texts import Text, evaluation_text
from runtime.engine import EngineOptions
from runtime.model import open_model

pytestmark = [pytest.mark.tiny, pytest.mark.reference]

CONTEXT = 128


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("source") / "model", layers=2)


@pytest.fixture(scope="module")
def bundle(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "bundle"
    export(ExportOptions(source=str(source), quant="F32", verify=False), path)
    return path


@pytest.fixture(scope="module")
def judged(bundle: Path) -> Iterator[Any]:
    """Our model as lm-eval sees it."""
    from exporter.scores.engine_lm import ROWS, EngineLM

    model = open_model(bundle, EngineOptions(context=CONTEXT, logits_rows=ROWS))
    yield EngineLM(model)
    model.close()


@pytest.fixture(scope="module")
def reference(source: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)


def request(*arguments: Any, kind: str = "loglikelihood") -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def expected(reference: Any, context: str, continuation: str) -> tuple[float, bool]:
    """By transformers, one text at a time."""
    import torch

    model, tokenizer = reference
    first = tokenizer.encode(context, add_special_tokens=False)
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
    places = range(len(first), len(whole))
    greedy = all(int(rows[place - 1].argmax()) == whole[place] for place in places)
    return sum(float(rows[place - 1, whole[place]]) for place in places), greedy


PAIRS = [
    ("The first rule of a class is", " that its name stands first."),
    ("The first rule of a class is", " a function"),
    ("The first rule", " of a class is"),
    ("Something else entirely", " " + "and a long tail of words " * 4),
    ("x", "y"),
]


def test_loglikelihood_is_that_of_transformers(judged: Any, reference: Any) -> None:
    found = judged.loglikelihood([request(*pair) for pair in PAIRS])
    for pair, (logprob, greedy) in zip(PAIRS, found, strict=True):
        wanted, wanted_greedy = expected(reference, *pair)
        # Flash attention rounds to 16 bits: a few thousandths of a nat for each token.
        assert logprob == pytest.approx(wanted, abs=0.05), pair
        assert greedy == wanted_greedy, pair


def test_greedy_is_told_when_it_is(judged: Any, reference: Any) -> None:
    import torch

    model, tokenizer = reference
    context = "The first rule of a class is"
    ids = tokenizer.encode(context, add_special_tokens=False)
    with torch.no_grad():
        best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    text = tokenizer.decode([best])
    if tokenizer.encode(context + text, add_special_tokens=False) != [*ids, best]:
        pytest.fail("choose another context: this one's best token does not stand alone")
    ((_logprob, greedy),) = judged.loglikelihood([request(context, text)])
    assert greedy is True


def test_blanks_at_the_end_of_a_context_count_for_the_continuation(judged: Any) -> None:
    ours = judged.loglikelihood([request("The first rule of a class is ", "a function")])
    assert ours == judged.loglikelihood([request("The first rule of a class is", " a function")])


def test_order_of_requests_changes_nothing(judged: Any) -> None:
    forwards = judged.loglikelihood([request(*pair) for pair in PAIRS])
    backwards = judged.loglikelihood([request(*pair) for pair in reversed(PAIRS)])
    for one, other in zip(forwards, reversed(backwards), strict=True):
        assert one[0] == pytest.approx(other[0], abs=0.02)


def test_rolling_reads_every_token_once(judged: Any, reference: Any) -> None:
    """A text of several windows: each window is judged by transformers from its own beginning."""
    import torch
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model, tokenizer = reference
    text = evaluation_text().content[:1200]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 2 * CONTEXT
    (found,) = judged.loglikelihood_rolling([request(text, kind="loglikelihood_rolling")])
    start, wanted, counted = judged._start_token(), 0.0, 0
    for context, tail in map(make_disjoint_window, get_rolling_token_windows(ids, start, CONTEXT, 1)):
        whole = [*context, *tail]
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
        wanted += sum(float(rows[place - 1, whole[place]]) for place in range(len(context), len(whole)))
        counted += len(tail)
    assert counted == len(ids)
    assert found == pytest.approx(wanted, rel=2e-3)


def test_generation_stops_where_the_task_says(judged: Any) -> None:
    settings = {"until": ["\n"], "max_gen_toks": 24, "do_sample": False}
    (answer,) = judged.generate_until([request("The first rule of a class is", settings, kind="generate_until")])
    assert "\n" not in answer
    (again,) = judged.generate_until([request("The first rule of a class is", settings, kind="generate_until")])
    assert again == answer
    with pytest.raises(UsageError, match="num_beams"):
        judged.generate_until([request("x", {"num_beams": 4}, kind="generate_until")])


def test_an_answer_longer_than_the_context_is_refused(judged: Any) -> None:
    with pytest.raises(UsageError, match="longer than the context"):
        judged.loglikelihood([request("x", " word" * 2 * CONTEXT)])


def test_questions_hold_their_answer_once() -> None:
    from exporter.scores.offline_tasks import CHOICES, ending_questions, word_questions

    questions = ending_questions(evaluation_text())
    assert len(questions) > 100
    content = " ".join(evaluation_text().content.split())
    for row in questions:
        assert len(set(row["choices"])) == CHOICES
        right = row["choices"][row["answer"]]
        assert row["context"] + right in content
    # Neither position nor length gives the answer away.
    positions = np.bincount([row["answer"] for row in questions], minlength=CHOICES) / len(questions)
    assert positions.max() < 0.35
    longest = [max(range(CHOICES), key=lambda i, row=row: len(row["choices"][i])) for row in questions]
    assert sum(a == row["answer"] for a, row in zip(longest, questions, strict=True)) / len(questions) < 0.4
    words = word_questions(evaluation_text())
    assert len(words) > 100
    assert all(row["context"] + row["word"] + "." in content for row in words)
    assert questions == ending_questions(evaluation_text())


def test_questions_of_another_text() -> None:
    from exporter.scores.offline_tasks import ending_questions

    assert ending_questions(Text("short", "One line only.")) == []


def test_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["score", str(bundle), "--limit", "8", "--context", "512", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    figures = {(item["task"], item["metric"]): item for item in document["scores"]}
    assert set(figures) == {
        ("doc-ending", "acc"),
        ("doc-ending", "acc_norm"),
        ("doc-word", "acc"),
        ("doc-word", "perplexity"),
    }
    assert all(item["questions"] == 8 for item in document["scores"])
    assert figures["doc-word", "perplexity"]["value"] > 1
    assert math.isfinite(figures["doc-ending", "acc"]["stderr"])
    assert run_cli(["score", str(bundle), "--task", "doc-ending", "--limit", "2", "--context", "512", "--chat"]) == 0
    assert "doc-ending" in capsys.readouterr().out


def test_tasks_that_cannot_be_had(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["score", str(bundle), "--task", "no-such-task"]) == 2
    assert "there is no task 'no-such-task'" in capsys.readouterr().err
    assert run_cli(["score", str(bundle), "--task", "arc_easy"]) == 2
    told = capsys.readouterr().err
    assert "the data of task 'arc_easy' are not here" in told
    assert "doc-ending" in told
