"""How long work tells that it advances, without knowing who listens.

The command line passes an implementation that draws a bar on stderr; tests and scripts pass nothing and get ``SILENT``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """One named piece of work under way."""

    def advance(self, amount: int = 1) -> None:
        """Tell that ``amount`` more units of the stage's total are done."""

    def tell(self, text: str) -> None:
        """Show a short figure beside the stage, in place of the last one."""


class Progress(Protocol):
    """Receives stages: ``with progress.stage("quantising", total_bytes, unit="bytes") as stage: stage.advance(n)``."""

    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> AbstractContextManager[Stage]:
        """Open a stage. ``total`` is None when unknown; ``unit`` is ``"bytes"`` for sizes, else a noun or empty."""
        ...


class _Silent:
    def advance(self, amount: int = 1) -> None:
        """Nobody listens."""

    def tell(self, text: str) -> None:
        """Nobody listens."""

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Stage]:
        yield self


SILENT: Progress = _Silent()
