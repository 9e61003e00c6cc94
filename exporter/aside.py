"""What an export does in threads beside quantising: hashes of the source's files, and the proof of the tokens.

Knows neither plans nor how an artefact is written.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from edgelm.bundle import FileRecord, TokenIdentity, file_record
from edgelm.errors import ProofError
from edgelm.progress import Progress
from exporter import tokenizer
from exporter.token_identity import compare_files
from exporter.tokenizer import SourceTokenizer


def _prove_tokens(words: SourceTokenizer, artifact: Path) -> TokenIdentity:
    if artifact.suffix == ".onnx":
        identity = compare_files(words.tokenizer_json, artifact.parent / "tokenizer.json")
    else:
        identity = tokenizer.prove_identity(words, artifact)
    if not identity.identical:
        raise ProofError(
            f"the artefact's tokenizer gives other ids than the source's: {identity.first_difference}",
            hint="no bundle was written: wrong tokens would silently spoil every answer",
        )
    return identity


class Aside(AbstractContextManager["Aside"]):
    """Hashes of the source and the proof of the tokens, taken in threads while the plan is made and tensors quantised.

    Leaving the context stops what is still under way.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="aside")
        self._proof: Future[TokenIdentity] | None = None
        self._hashes: Future[tuple[FileRecord, ...]] | None = None
        self._written: dict[Path, FileRecord] = {}

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def hash(self, files: Sequence[Path], known: tuple[FileRecord, ...] | None = None) -> None:
        """Begin to hash the source's files, once, unless their records are ``known``."""
        self._hashes = self._hashes or self._pool.submit(lambda: known or self._hash(files))

    def note(self, directory: Path, records: Sequence[FileRecord]) -> None:
        """Files whose records came out of writing them."""
        self._written |= {directory / record.name: record for record in records}

    def prove(self, words: SourceTokenizer, artifact: Path) -> None:
        """Begin the proof of an artefact whose vocabulary is written, once."""
        self._proof = self._proof or self._pool.submit(_prove_tokens, words, artifact)

    def identity(self, words: SourceTokenizer, artifact: Path) -> TokenIdentity:
        """The result of the proof, which begins now if it has not. Raises ``ProofError``."""
        return self._proof.result() if self._proof else _prove_tokens(words, artifact)

    def source_hashes(self, progress: Progress) -> tuple[FileRecord, ...]:
        """Records of the source's files, in their order. ``hash`` came before."""
        assert self._hashes is not None
        with progress.stage("hashing the source", 1) as stage:
            hashes = self._hashes.result()
            stage.advance()
        return hashes

    def file_records(self, paths: Sequence[Path], progress: Progress) -> tuple[FileRecord, ...]:
        """Records of files as they are now: those that were noted, if the size is still theirs, and the rest hashed."""
        known = {path: record for path, record in self._written.items() if path.stat().st_size == record.size_bytes}
        others = [path for path in paths if path not in known]
        found = known | dict(zip(others, hashed_files(others, progress), strict=True))
        return tuple(found[path] for path in paths)

    def _hash(self, files: Sequence[Path]) -> tuple[FileRecord, ...]:
        return tuple(file_record(path, stopped=self._stopped.is_set) for path in files)


def hashed_files(paths: Sequence[Path], progress: Progress) -> tuple[FileRecord, ...]:
    """Records of files, in their order."""
    records = []
    with progress.stage("hashing", len(paths), unit="files") as stage:
        for path in paths:
            records.append(file_record(path))
            stage.advance()
    return tuple(records)
