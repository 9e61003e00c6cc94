"""Folders with an ONNX decoder that others exported: which file is the model, and what stands beside it of tokens.

Knows optimum's and onnxruntime-genai's layouts. The engine itself is in ``engines.onnx_foreign``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm.bundle import MANIFEST_NAME
from edgelm.errors import BundleError
from runtime.engines.onnx_foreign import end_tokens

_NAMES = ("model.onnx", "decoder_model.onnx")
_LIMIT_BYTES = 2**24
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True)
class ForeignTexts:
    """The tokenizer file, and what is known of chats and of ends of answers."""

    tokenizer: Path
    template: str
    special_tokens: dict[str, str]
    stop_tokens: frozenset[int]
    adds_bos: bool


def foreign_model(directory: Path) -> Path | None:
    """The model file of a folder that is no bundle of ours, None when there is none."""
    if (directory / MANIFEST_NAME).exists():
        return None
    if (directory / "genai_config.json").is_file():
        decoder = _table(directory / "genai_config.json").get("model", {})
        name = decoder.get("decoder", {}).get("filename") if isinstance(decoder, dict) else None
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise BundleError(f"{directory / 'genai_config.json'} names no model file in its folder: {name!r}")
        return directory / name
    return next((directory / name for name in _NAMES if (directory / name).is_file()), None)


def foreign_texts(model: Path) -> ForeignTexts:
    """What stands beside a model. Raises ``BundleError`` without a ``tokenizer.json``."""
    directory = model.parent
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        raise BundleError(f"{model} has no tokenizer.json beside it", hint="give a bundle, or a folder that has one")
    config = directory / "tokenizer_config.json"
    table = _table(config) if config.is_file() else {}
    template, file = table.get("chat_template"), directory / "chat_template.jinja"
    if file.is_file():
        template = _text(file)
    texts = {role: _content(table.get(role)) for role in _ROLES}
    return ForeignTexts(
        tokenizer=tokenizer,
        template=template if isinstance(template, str) else "",
        special_tokens={role: text for role, text in texts.items() if text is not None},
        stop_tokens=end_tokens(directory),
        adds_bos=table.get("add_bos_token") is True,
    )


def _content(entry: Any) -> str | None:
    """A special token is a text or a table with its ``content``."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no JSON: {error}") from error
    if not isinstance(table, dict):
        raise BundleError(f"{path} is no table of settings")
    return table


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise BundleError(f"{path} has more than {_LIMIT_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {path}: {error}") from error
