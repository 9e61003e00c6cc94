"""Scripted models with a task: answers that a test can foresee, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from edgelm.bundle import TaskKind
from edgelm.errors import ContextOverflowError, UsageError
from runtime.tasks import Asked, TaskAnswer


@dataclass
class FakeTask:
    """``runtime.tasks.TaskModel`` whose tokens are bytes: a translation is the text reversed."""

    kind: TaskKind = "translate"
    name: str = "fake"
    context: int = 64
    system: str = "fake"

    @property
    def facts(self) -> Any:
        return SimpleNamespace(architecture="fake", parameters=1000)

    def answer(self, asked: Asked) -> TaskAnswer:
        count = len(asked.text.encode())
        if count > self.context:
            raise ContextOverflowError(f"{count} tokens do not fit the context of {self.context}")
        if self.kind == "translate":
            written = asked.text[::-1][: asked.max_tokens or None]
            reason = "stop" if len(written) == len(asked.text) else "length"
            return TaskAnswer({"text": written, "finish_reason": reason}, (), count, len(written))
        if self.kind == "classify":
            return TaskAnswer(
                {"labels": [{"label": "good", "score": 0.75}, {"label": "bad", "score": 0.25}]}, (), count
            )
        if "?" not in asked.text:
            raise UsageError("the text has no mask")
        words = [{"token": index, "word": "x", "score": 1 / (index + 2)} for index in range(min(asked.top, 3))]
        return TaskAnswer({"masks": [words] * asked.text.count("?")}, (), count)

    def warm_up(self) -> None:
        self.answer(Asked("?"))

    def interrupt(self) -> None:
        """Nothing takes long enough."""

    def close(self) -> None:
        """Nothing is held."""
