"""What every matrix of a large model reads, on disk: a tensor at a time in memory, and a run that was killed goes on.

One directory in the cache's folder holds the statistics of one model under one text; only the latest is kept, so the
room it takes is bounded by the largest model. A tensor has its statistics first, then, in their place, what rounds it.
Files appear complete or not at all. Knows neither models nor types.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelm.errors import DoesNotFitError
from exporter import cache
from exporter.damage import Quantizer
from exporter.rounding import Compensation
from exporter.sensitivity import TensorStatistics
from exporter.upper_file import UpperFile, write_upper

Floats = npt.NDArray[np.float32]
_PREFIX = "layers-"
_MEASURED, _LOCK = "measured", "lock"
_MAPPED = 4  # tensors whose factors are mapped at the same time


class DamagedStoreError(Exception):
    """A file of a store is missing or not what was written: whoever has the store clears it and begins anew."""


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedStoreError(f"{name}: {error}") from error


@dataclass(frozen=True)
class StoredCompensation:
    """``rounding.Compensating`` whose factor is a mapped file."""

    factor: UpperFile
    importance: Floats

    def rows(self, start: int, stop: int) -> Floats:
        return self.factor.rows(start, stop)


class StatisticsStore:
    """A directory of statistics. States are whatever those who measure need to go on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._mapped: dict[str, Quantizer] = {}

    def clear(self) -> None:
        """Forget everything, to begin anew."""
        self._mapped = {}
        for path in self.directory.iterdir():
            if path.name != _LOCK:
                path.unlink()

    # --- while statistics are measured

    @property
    def measured(self) -> bool:
        """Whether the statistics of all tensors are there, or were until something better replaced them."""
        return self._path(_MEASURED).exists()

    def finish_measuring(self) -> None:
        """All statistics are there: what was kept to go on with is not needed any more."""
        self._write(_MEASURED, b"")
        for path in self.directory.glob("state-*"):
            path.unlink()

    def put_state(self, name: str, values: Sequence[Floats]) -> None:
        """Keep arrays of one shape under a name, until all is measured or ``drop_state``."""
        with self._writing(f"state-{name}.npy") as path, path.open("wb") as stream:
            np.save(stream, np.stack(values), allow_pickle=False)

    def state(self, name: str) -> list[Floats] | None:
        """What was kept under a name, None when there is nothing."""
        try:
            return list(np.load(self._path(f"state-{name}.npy"), allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return None

    def drop_state(self, name: str) -> None:
        """Forget what was kept under a name."""
        self._path(f"state-{name}.npy").unlink(missing_ok=True)

    # --- statistics, then what they are for

    def put(self, name: str, statistics: TensorStatistics) -> None:
        """Keep the statistics of a tensor, whole or not at all."""
        if statistics.moment is not None:
            with self._writing(f"{name}.moment") as path:
                write_upper(path, statistics.moment)
        vectors = {
            field.name: np.asarray(getattr(statistics, field.name))
            for field in fields(statistics)
            if field.name != "moment" and getattr(statistics, field.name) is not None
        }
        with self._writing(f"{name}.npz") as path, path.open("wb") as stream:
            np.savez(stream, **vectors)  # type: ignore[arg-type]

    def statistics(self, name: str) -> TensorStatistics:
        """The statistics of a tensor, in memory. Raises ``DamagedStoreError``."""
        with _reading(name):
            with np.load(self._path(f"{name}.npz"), allow_pickle=False) as arrays:
                values: dict[str, Any] = {key: arrays[key] for key in arrays.files}
            values["tokens"] = int(values["tokens"])
            path = self._path(f"{name}.moment")
            if "input_squares" in values:  # of all but an embedding that is no head
                values["moment"] = UpperFile(path, len(values["input_squares"])).symmetric()
            return TensorStatistics(**values)

    def put_quantizer(self, name: str, given: Quantizer, damages: Mapping[str, float]) -> None:
        """Keep what rounds a tensor and what it loses in each type, in place of its statistics."""
        arrays: dict[str, Any] = {}
        if given.importance is not None:
            arrays["importance"] = given.importance
        if isinstance(given.compensation, Compensation):
            arrays["compensated"] = given.compensation.importance
            with self._writing(f"{name}.factor") as path:
                write_upper(path, given.compensation.factor)
        self._write(f"{name}.json", json.dumps(damages).encode())
        with self._writing(f"{name}.rounding") as path, path.open("wb") as stream:
            np.savez(stream, **arrays)
        for suffix in (".moment", ".npz"):
            self._path(f"{name}{suffix}").unlink(missing_ok=True)

    def has_quantizer(self, name: str) -> bool:
        """Whether ``put_quantizer`` was done for a tensor."""
        return self._path(f"{name}.rounding").exists()

    def damages(self, name: str) -> dict[str, float]:
        """By type, of a tensor with a quantiser. Raises ``DamagedStoreError``."""
        with _reading(name):
            document = json.loads(self._path(f"{name}.json").read_text(encoding="utf-8"))
            return {str(kind): float(lost) for kind, lost in document.items()}

    def quantizer(self, name: str) -> Quantizer:
        """What rounds a tensor, its factor mapped. Raises ``DamagedStoreError``."""
        held = self._mapped.get(name)
        if held is None:
            with _reading(name):
                with np.load(self._path(f"{name}.rounding"), allow_pickle=False) as arrays:
                    found: dict[str, Floats] = {key: arrays[key] for key in arrays.files}
                compensation = None
                if "compensated" in found:
                    factor = UpperFile(self._path(f"{name}.factor"), len(found["compensated"]))
                    compensation = StoredCompensation(factor, found["compensated"])
            held = Quantizer(found.get("importance"), compensation)
            self._mapped = {**dict(list(self._mapped.items())[1 - _MAPPED :]), name: held}
        return held

    def _path(self, name: str) -> Path:
        return self.directory / name

    def _write(self, name: str, content: bytes) -> None:
        with self._writing(name) as path:
            path.write_bytes(content)

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        fresh = self._path(f"{name}.new")
        try:
            yield fresh
            fresh.replace(self._path(name))
        except OSError as error:
            fresh.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DoesNotFitError(
                    f"no room left for the statistics of every matrix in {self.directory.parent}",
                    hint="free some space, or let EDGELM_CACHE name a folder with more",
                ) from error
            raise


class StoredQuantizers(Mapping[str, Quantizer]):
    """The quantisers of a store by tensor name, each read when it is asked for."""

    def __init__(self, store: StatisticsStore, names: Sequence[str]) -> None:
        self._store, self._names = store, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Quantizer:
        if name not in self._names:
            raise KeyError(name)
        return self._store.quantizer(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def store_directory() -> Path:
    """Where stores are kept; it need not exist."""
    return cache.cache_directory()


def open_store(key: str) -> StatisticsStore:
    """The store of a key for this process alone, with what an earlier process left in it; others are removed.

    While another process has it, or where the cache cannot be written, it is a temporary one, gone with this process.
    """
    root = store_directory()
    try:
        root.mkdir(parents=True, exist_ok=True)
        directory = root / f"{_PREFIX}{key}"
        for path in root.glob(f"{_PREFIX}*"):
            if path != directory and _lock(path, None):
                shutil.rmtree(path, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        store = StatisticsStore(directory)
        if _lock(directory, store):
            return store
        directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{key}-", dir=root))
    except OSError:
        directory = Path(tempfile.mkdtemp(prefix=f"edgelm-{_PREFIX}"))
    store = StatisticsStore(directory)
    _lock(directory, store)
    weakref.finalize(store, shutil.rmtree, directory, ignore_errors=True)
    return store


def _lock(directory: Path, owner: StatisticsStore | None) -> bool:
    """Lock a store as long as its owner lives, without one for a moment; False when another process has it."""
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # where there are no such locks nobody has it
    except OSError:
        os.close(descriptor)
        return False
    if owner is None:
        os.close(descriptor)
    else:
        weakref.finalize(owner, os.close, descriptor)
    return True
