"""What a sentence model makes of its tokens' vectors: pooling and normalisation, from the files beside its weights.

These are the files of the sentence-transformers library: ``modules.json`` lists the steps, ``1_Pooling/config.json``
says how to pool, ``sentence_bert_config.json`` how long a text may be. Knows no tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import Keys, PoolingType

from edgelm.bundle import EncoderRecord, Pooling
from edgelm.errors import CheckpointError
from exporter.architectures.base import Dimensions, EncoderDescription, TensorDescription
from exporter.checkpoint import Checkpoint

_LIMIT_BYTES = 2**20
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_POOLING: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_SQUARE_ROOT = "pooling_mode_mean_sqrt_len_tokens"
GGUF_POOLING: Mapping[Pooling, int] = {
    "mean": PoolingType.MEAN.value,
    "cls": PoolingType.CLS.value,
    "last": PoolingType.LAST.value,
}


def describe_encoder(checkpoint: Checkpoint, dimensions: Dimensions) -> tuple[EncoderDescription, tuple[str, ...]]:
    """Pooling, normalisation and length of a Hugging Face checkpoint, and notes on what was assumed.

    Raises ``CheckpointError`` for steps that no engine here can do.
    """
    directory, notes = checkpoint.source.path, list[str]()
    modules = _read(directory / "modules.json")
    pooling: Pooling = "mean"
    normalized = True
    if modules is None:
        notes.append(
            "the checkpoint has no modules.json: its vectors are taken as the mean of all tokens, scaled to length one"
        )
    else:
        pooling, normalized = _steps(directory, modules)
    prompts = (_read(directory / "config_sentence_transformers.json") or {}).get("prompts")
    if isinstance(prompts, Mapping) and any(prompts.values()):
        named = ", ".join(f"{name}: {text!r}" for name, text in list(prompts.items())[:4] if text)
        notes.append(f"the model was trained on texts that begin with a prompt ({named}); put it in front yourself")
    record = EncoderRecord(pooling=pooling, normalized=normalized, dimensions=dimensions.hidden)
    longest = (_read(directory / "sentence_bert_config.json") or {}).get("max_seq_length")
    context = dimensions.context_trained
    if isinstance(longest, int) and not isinstance(longest, bool) and 0 < longest < context:
        context = longest
    return EncoderDescription(record, context), tuple(notes)


def sentence_files(directory: Path) -> tuple[Path, ...]:
    """The files of sentence-transformers that ``describe_encoder`` reads, those that are there.

    Raises ``CheckpointError``, also for names that lead out of the directory.
    """
    modules = _read(directory / "modules.json")
    if modules is None:
        return ()
    _steps(directory, modules)
    names = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    files = (*(directory / name for name in names), directory / modules[1]["path"] / "config.json")
    return tuple(path for path in files if path.is_file())


def encoder_metadata(encoder: EncoderDescription, tensors: Sequence[TensorDescription]) -> dict[str, Any]:
    """GGUF keys that only encoders have."""
    types = next((item.shape[0] for item in tensors if item.name == "token_types.weight"), 1)
    return {
        Keys.Attention.CAUSAL: False,
        Keys.LLM.POOLING_TYPE: GGUF_POOLING[encoder.record.pooling],
        Keys.Tokenizer.TOKEN_TYPE_COUNT: types,
    }


def encoder_of_gguf(checkpoint: Checkpoint, dimensions: Dimensions) -> EncoderDescription | None:
    """What a GGUF file says of itself as an encoder, None for a decoder. Its vectors are taken as normalised.

    Raises ``CheckpointError`` for a kind of pooling that is not supported.
    """
    name = checkpoint.architecture
    if checkpoint.config.get(Keys.Attention.CAUSAL.format(arch=name)) is not False:
        return None
    value = checkpoint.config.get(Keys.LLM.POOLING_TYPE.format(arch=name))
    pooling = next((kind for kind, number in GGUF_POOLING.items() if number == value), None)
    if pooling is None:
        raise CheckpointError(
            f"{checkpoint.source.location}: metadata {name}.pooling_type is {value!r}: "
            f"it does not say how the vectors of its tokens become one"
        )
    record = EncoderRecord(pooling=pooling, normalized=True, dimensions=dimensions.hidden)
    return EncoderDescription(record, dimensions.context_trained)


def _steps(directory: Path, modules: Any) -> tuple[Pooling, bool]:
    """Pooling, and whether vectors are normalised, of the steps that modules.json lists."""
    path = directory / "modules.json"
    if not isinstance(modules, list) or not all(isinstance(item, Mapping) for item in modules):
        raise CheckpointError(f"{path} is no list of steps")
    kinds = [str(item.get("type")).rsplit(".", 1)[-1] for item in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise CheckpointError(
            f"{path} lists the steps {', '.join(kinds)}; only Transformer, Pooling and Normalize are supported"
        )
    name = modules[1].get("path")
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise CheckpointError(f"{path} names the directory {name!r}, which is no plain name")
    normalized = len(kinds) == 3
    return _pooling(directory / name / "config.json", normalized=normalized), normalized


def _pooling(path: Path, *, normalized: bool) -> Pooling:
    settings = _read(path)
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{path} is missing or no table of settings", hint="download the checkpoint completely")
    chosen = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if normalized and chosen == [_SQUARE_ROOT]:
        return "mean"  # differs by a factor only, which normalisation removes
    if len(chosen) != 1 or chosen[0] not in _POOLING:
        raise CheckpointError(
            f"{path} asks for {' and '.join(chosen) or 'no way to pool'}, which is not supported",
            hint=f"there are: {', '.join(_POOLING)}",
        )
    return _POOLING[chosen[0]]


def _read(path: Path) -> Any:
    """The document in a small JSON file, None when there is none. Raises ``CheckpointError``."""
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _LIMIT_BYTES:
            raise CheckpointError(f"{path} is larger than {_LIMIT_BYTES} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from error
