"""The one error tree.

Every failure that a user can cause or mend is raised as one of these, with a message that names the thing and a hint
that names the way out. The command line prints both and exits with ``exit_code``; nothing else decides exit codes.
Errors of third-party libraries are mapped to this tree where the library is called. The tree does not know how it is
shown.
"""

from __future__ import annotations


class EdgelmError(Exception):
    """Something went wrong that the user can understand.

    ``message`` says what happened and names the thing, ``hint`` (optional) says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgelmError):
    """An argument or option makes no sense as given (exit 2)."""

    exit_code = 2


class CheckpointError(EdgelmError):
    """The source is missing, unreadable, malformed or of a kind that cannot be exported."""


class BundleError(EdgelmError):
    """A bundle or model file is missing, malformed or does not match its manifest."""


class ProfileError(EdgelmError):
    """A target profile or a report is missing or malformed."""


class EngineError(EdgelmError):
    """The inference engine cannot be loaded or failed while computing."""


class ContextOverflowError(EngineError):
    """A sequence does not fit into the engine's context."""


class DeployError(EdgelmError):
    """A device cannot be reached, or refused a step of a deployment."""


class MissingDependencyError(EdgelmError):
    """An optional package is needed and not installed."""


class ProofError(EdgelmError):
    """The artefact exists but its proof failed: quality limit or token identity (exit 3)."""

    exit_code = 3


class DoesNotFitError(EdgelmError):
    """The plan does not fit the target or a limit that was asked for (exit 4)."""

    exit_code = 4
