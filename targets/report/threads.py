"""Keeps measured thread counts in a profile file, so that other commands can use them."""

from __future__ import annotations

from pathlib import Path

from edgelm.bundle import Choice
from edgelm.errors import ProfileError
from targets.host import detect_host
from targets.profile import profile_toml, read_profile


def keep_threads(path: Path, decode: int, prefill: int, model: str) -> None:
    """Write ``path`` with these counts into the profile that it holds, else this machine's. Raises ``ProfileError``."""
    profile = read_profile(path) if path.exists() else detect_host()
    reason = f"measured with {model}: the fewest threads that are as fast as the fastest"
    changed = profile.model_copy(
        update={
            "threads_decode": Choice(value=decode, reason=reason),
            "threads_prefill": Choice(value=prefill, reason=reason),
        }
    )
    try:
        path.write_text(profile_toml(changed), encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"cannot write {path}: {error.strerror}") from error
