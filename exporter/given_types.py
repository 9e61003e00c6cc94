"""The types of an earlier export, taken again tensor by tensor: what a student was trained for is what is stored.

They stand in the manifest of a bundle and in the record of a student that ``edgelm compress`` finished. Knows both
files; does not know what is done with the types.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgelm.bundle import MANIFEST_NAME, read_manifest
from edgelm.errors import UsageError

STUDENT_RECORD = "compress.json"


def read_types(directory: Path) -> tuple[tuple[str, str], ...]:
    """(GGUF name, type) of every tensor. Raises ``UsageError`` and, for a damaged manifest, ``BundleError``."""
    if (directory / MANIFEST_NAME).is_file():
        manifest = read_manifest(directory)
        if manifest.format != "gguf":
            raise UsageError(f"{directory} is a bundle of {manifest.format}: only types of GGUF can be taken again")
        return tuple((item.name, item.type) for item in manifest.plan.tensors)
    path = directory / STUDENT_RECORD
    if not path.is_file():
        raise UsageError(
            f"{directory} names no types: it is neither a bundle nor a student of edgelm compress",
            hint="name the directory that edgelm export or edgelm compress --finish wrote",
        )
    try:
        types = json.loads(path.read_bytes())["types"]
        if types is None:
            raise UsageError(f"{directory} was trained for no types", hint="edgelm compress --finish QUANT does that")
        return tuple((str(name), str(kind)) for name, kind in types.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
