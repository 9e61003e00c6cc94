"""Everything that stands in a checkpoint's way, told at once instead of one failure after the other."""

from __future__ import annotations

from types import TracebackType

from edgelm.errors import CheckpointError

SHOWN = 12
"""Problems that are spelt out; more are only counted."""


class SeveralProblemsError(CheckpointError):
    """More than one thing is wrong with a source; ``problems`` are (what, hint)."""

    def __init__(self, message: str, problems: tuple[tuple[str, str | None], ...], hint: str | None) -> None:
        super().__init__(message, hint=hint)
        self.problems = problems


class Problems:
    """Collects problems of one source, then raises one error with all of them."""

    def __init__(self, location: str) -> None:
        self._location = location
        self._found: list[tuple[str, str | None]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, message: str, hint: str | None = None) -> None:
        """One more problem; ``hint`` is shown when it is the first that has one."""
        if message not in {known for known, _ in self._found}:
            self._found.append((message, hint))

    def collect(self) -> _Collected:
        """A ``CheckpointError`` inside the block becomes a problem; what the block would have set must be preset."""
        return _Collected(self)

    def take(self, error: CheckpointError) -> None:
        """The problem or problems that an error tells of."""
        if isinstance(error, SeveralProblemsError):
            for message, hint in error.problems:
                self.add(message, hint)
        else:
            self.add(error.message.removeprefix(f"{self._location}: "), error.hint)

    def raise_all(self) -> None:
        """Raises ``CheckpointError`` when there is any problem."""
        if not self._found:
            return
        hint = next((hint for _, hint in self._found if hint), None)
        if len(self._found) == 1:
            raise CheckpointError(f"{self._location}: {self._found[0][0]}", hint=hint)
        listed = "; ".join(f"({number}) {told}" for number, (told, _) in enumerate(self._found[:SHOWN], 1))
        more = f"; and {len(self._found) - SHOWN} more" if len(self._found) > SHOWN else ""
        told = f"{self._location} has {len(self._found)} problems: {listed}{more}"
        raise SeveralProblemsError(told, tuple(self._found), hint)


class _Collected:
    """The context of ``Problems.collect``."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, CheckpointError):
            self._problems.take(error)
            return True
        return False
