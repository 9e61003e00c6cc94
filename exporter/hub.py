"""Checkpoints by hub id: the files that are needed and no others, fetched into the hub's own cache and checked.

A plan reads headers only: weights that are not here stay on the hub, and their headers are read by range requests.
Files come with the hashes that the hub lists for them, and none is used before its content has the listed one. Knows
which files a checkpoint has, not what they mean.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.errors import CheckpointError, MissingDependencyError
from edgelm.progress import Progress, Stage
from exporter import cache
from exporter.safetensors_header import FINISHED, INDEX, SINGLE, header_length, read_index

# What a checkpoint needs beside its weights, and nothing that executes: no pickle, no Python.
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", INDEX,
)  # fmt: skip
_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,127}))?"
)
_SMALL_LIMIT_BYTES = 128 * 2**20
_FIRST_BYTES = 2**18  # of a shard: holds the headers of nearly all
_CONNECTIONS = 8
_TIMEOUT_S = 30
_WATCH_S = 0.5
_AGAIN = "run the command again: it goes on where it stopped"


@dataclass(frozen=True, slots=True)
class RemoteHeader:
    """The JSON header of a safetensors file that is not here, and the size of its data part."""

    raw: bytes
    data_bytes: int


@dataclass(frozen=True, slots=True)
class HubCheckpoint:
    """A directory of the hub's cache. ``revision`` is the commit, ``headers`` those of weights that are not here."""

    directory: Path
    repository: str
    revision: str
    headers: Mapping[str, RemoteHeader]


@dataclass(frozen=True, slots=True)
class _Listed:
    """One file as the hub lists it; ``digest`` is SHA-256, or git's SHA-1 for small files."""

    name: str
    size_bytes: int
    digest: str


def is_hub_id(text: str) -> bool:
    """Whether a text has the form ``org/name`` or ``org/name@revision``."""
    return _ID.fullmatch(text) is not None


def fetch(text: str, *, headers_only: bool, progress: Progress) -> HubCheckpoint:
    """Everything that a checkpoint needs, in the hub's cache.

    With ``HF_HUB_OFFLINE`` set, what was fetched before. ``headers_only`` leaves weights on the hub. Raises
    ``CheckpointError``, ``MissingDependencyError`` without huggingface_hub.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingDependencyError(
            f"{text} is no directory here, and loading it from the hub needs huggingface_hub",
            hint='pip install "edgelm[export]"',
        )
    from huggingface_hub import constants

    found = _ID.fullmatch(text)
    assert found is not None
    repository, revision = found["repository"], found["revision"]
    if constants.HF_HUB_OFFLINE:
        return _fetched_before(text, repository, revision)
    with _errors(text, repository, revision), _no_bars():
        commit, listed = _listing(repository, revision)
        directory = _fetch_small(repository, commit, listed, progress)
        _remember(repository, revision or "main", commit)
        weights = [listed[name] for name in _weight_files(text, directory, listed)]
        away = [item for item in weights if _in_cache(repository, commit, item.name) is None]
        if headers_only:
            return HubCheckpoint(directory, repository, commit, _remote_headers(text, repository, commit, away))
        _fetch(repository, commit, away, progress)
        _check(repository, directory, weights, progress)
    return HubCheckpoint(directory, repository, commit, {})


def _fetched_before(text: str, repository: str, revision: str | None) -> HubCheckpoint:
    import huggingface_hub

    try:
        directory = Path(huggingface_hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{text} was not fetched before, and HF_HUB_OFFLINE keeps it from being fetched now",
            hint="unset HF_HUB_OFFLINE, or copy the model here and name its directory",
        ) from error
    return HubCheckpoint(directory, repository, directory.name, {})


# --- what there is


def _listing(repository: str, revision: str | None) -> tuple[str, dict[str, _Listed]]:
    """The commit of a revision and its files by name. Raises errors of the hub."""
    import huggingface_hub

    info = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
    files = {}
    for item in info.siblings or ():
        digest = item.lfs.sha256 if item.lfs is not None else item.blob_id
        if item.size is not None and digest is not None:
            files[item.rfilename] = _Listed(item.rfilename, item.size, digest)
    if info.sha is None:
        raise CheckpointError(f"the hub names no commit of {repository}", hint="name a revision: org/name@revision")
    return info.sha, files


def _weight_files(text: str, directory: Path, listed: Mapping[str, _Listed]) -> list[str]:
    if SINGLE in listed:
        return [SINGLE, *([FINISHED] if FINISHED in listed else [])]
    if INDEX not in listed:
        raise _no_weights(text, listed)
    shards = sorted(set(read_index(directory / INDEX).values()))
    missing = [name for name in shards if name not in listed]
    if missing:
        raise CheckpointError(f"{text} has no {missing[0]}, which its {INDEX} names")
    return shards


def _no_weights(text: str, listed: Mapping[str, _Listed]) -> CheckpointError:
    told = f"{text} has no {SINGLE}"
    gguf = sorted(name for name in listed if name.endswith(".gguf"))
    if gguf:
        return CheckpointError(f"{told}, but GGUF files", hint=f"hf download {text.split('@')[0]} {gguf[0]}; name that")
    pickles = sorted(name for name in listed if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        return CheckpointError(
            f"{told}: its weights are pickle ({pickles[0]}), which can run code and is not read",
            hint="convert it to safetensors, for example with save_pretrained(..., safe_serialization=True)",
        )
    return CheckpointError(told, hint="is it a model in the form of transformers?")


# --- files


def _fetch_small(repository: str, commit: str, listed: Mapping[str, _Listed], progress: Progress) -> Path:
    wanted = [listed[name] for name in SMALL_FILES if name in listed]
    if "config.json" not in listed:
        raise CheckpointError(f"{repository} is not a checkpoint: it has no config.json")
    huge = next((item for item in wanted if item.size_bytes > _SMALL_LIMIT_BYTES), None)
    if huge is not None:
        raise CheckpointError(f"{huge.name} of {repository} has {huge.size_bytes} bytes")
    _fetch(repository, commit, [item for item in wanted if not _in_cache(repository, commit, item.name)], progress)
    config = _in_cache(repository, commit, "config.json")
    assert config is not None
    _check(repository, config.parent, wanted, progress)
    return config.parent


def _remember(repository: str, revision: str, commit: str) -> None:
    """Files are fetched by commit; the cache's note of what a branch or tag stood for serves when offline."""
    if revision == commit:
        return
    note = _storage(repository) / "refs" / revision
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(commit)


def _storage(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _in_cache(repository: str, commit: str, name: str) -> Path | None:
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(repository, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _fetch(repository: str, commit: str, files: list[_Listed], progress: Progress) -> None:
    """Files into the cache. What an interruption leaves there is continued. Raises errors of the hub."""
    import huggingface_hub

    if not files:
        return
    with progress.stage("downloading", sum(item.size_bytes for item in files), unit="bytes") as stage:
        for item in files:
            with _watched(repository, item, stage):
                huggingface_hub.hf_hub_download(repository, item.name, revision=commit)


@contextmanager
def _watched(repository: str, item: _Listed, stage: Stage) -> Iterator[None]:
    """Advance a stage while the hub's library writes the file, which it tells nobody in a form of its own."""
    growing, finished, told = _storage(repository) / "blobs" / f"{item.digest}.incomplete", threading.Event(), 0

    def watch() -> None:
        nonlocal told
        while not finished.wait(_WATCH_S):
            try:
                size_bytes = growing.stat().st_size
            except OSError:
                continue
            if size_bytes > told:
                stage.advance(size_bytes - told)
                told = size_bytes

    watcher = threading.Thread(target=watch, name="download", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    stage.advance(item.size_bytes - told)


def _check(repository: str, directory: Path, files: list[_Listed], progress: Progress) -> None:
    """Content against the hub's hashes, once for each file. Raises ``CheckpointError`` and removes what is damaged."""
    with progress.stage("checking hashes", sum(item.size_bytes for item in files), unit="bytes") as stage:
        for item in files:
            path = directory / item.name
            status = path.stat()
            key = cache.key_of("hub file", item.digest, status.st_size, status.st_mtime_ns)
            if cache.find(key) is None:
                if status.st_size != item.size_bytes or _digest(path, item) != item.digest:
                    path.resolve().unlink(missing_ok=True)
                    path.unlink(missing_ok=True)
                    told = f"{item.name} of {repository} is damaged: its content is not what the hub lists"
                    raise CheckpointError(told, hint="it was removed; run the command again to fetch it anew")
                with cache.new_entry(key):
                    pass
            stage.advance(item.size_bytes)


def _digest(path: Path, item: _Listed) -> str:
    if len(item.digest) == 64:
        digest = hashlib.sha256()
    else:  # a git object: its kind and size come first
        digest = hashlib.sha1(b"blob %d\0" % item.size_bytes, usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(4 * 2**20):
            digest.update(piece)
    return digest.hexdigest()


# --- headers


def _remote_headers(text: str, repository: str, commit: str, files: list[_Listed]) -> dict[str, RemoteHeader]:
    with ThreadPoolExecutor(max_workers=_CONNECTIONS, thread_name_prefix="headers") as pool:
        found = pool.map(lambda item: _remote_header(text, repository, commit, item), files)
        return {item.name: header for item, header in zip(files, found, strict=True)}


def _remote_header(text: str, repository: str, commit: str, item: _Listed) -> RemoteHeader:
    import huggingface_hub

    url = huggingface_hub.hf_hub_url(repository, item.name, revision=commit)
    place = Path(text) / item.name
    raw = _range(url, 0, min(_FIRST_BYTES, item.size_bytes))
    length = header_length(raw[:8], place, item.size_bytes)
    if len(raw) < 8 + length:
        raw += _range(url, len(raw), 8 + length)
    return RemoteHeader(raw[8 : 8 + length], item.size_bytes - 8 - length)


def _range(url: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file. Raises errors of the hub, ``CheckpointError`` for another answer."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    answer = get_session().get(url, headers=headers, timeout=_TIMEOUT_S)
    hf_raise_for_status(answer)
    content: bytes = answer.content
    if answer.status_code != 206 or len(content) != stop - start:
        raise CheckpointError(f"{url}: the server gave {len(content)} bytes where {stop - start} were asked for")
    return content


# --- errors


@contextmanager
def _errors(text: str, repository: str, revision: str | None) -> Iterator[None]:
    """Map what can go wrong between here and the hub to ``CheckpointError``."""
    from huggingface_hub import errors

    # What its HTTP library raises for transport alone: that library changed between its major versions.
    transport: tuple[Any, ...] = (*errors.HfHubHTTPError.__bases__, OSError, ValueError)
    try:
        yield
    except errors.GatedRepoError as error:
        told = f"{repository} is gated: the hub gives its files to those only who accepted its terms"
        hint = "accept them on the model's page, then log in with: hf auth login (or set HF_TOKEN)"
        raise CheckpointError(told, hint=hint) from error
    except errors.RevisionNotFoundError as error:
        told = f"{repository} has no revision {revision or 'main'}"
        raise CheckpointError(told, hint="name a branch, a tag or a commit of it") from error
    except errors.RepositoryNotFoundError as error:
        told = f"{text} is no directory here, and the hub has no such model, or it is private"
        hint = "check the name; for a private one log in with: hf auth login (or set HF_TOKEN)"
        raise CheckpointError(told, hint=hint) from error
    except transport as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        told = f"{text} is no directory here and could not be loaded from the hub: {first}"
        hint = f"check the network, then {_AGAIN}; HF_HUB_OFFLINE=1 takes what was fetched before"
        raise CheckpointError(told, hint=hint) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the hub's own bars off stderr: progress is told in one way."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
