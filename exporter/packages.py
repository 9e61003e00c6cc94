"""Packages that only some exports need: what is missing is told before the work begins. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec

from edgelm.errors import MissingDependencyError


def require(*packages: str) -> None:
    """Raise ``MissingDependencyError`` for packages of the extra ``export`` that are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingDependencyError(
            f"{' and '.join(missing)} {verb} not installed", hint='pip install "edgelm[export]", or make setup-export'
        )
