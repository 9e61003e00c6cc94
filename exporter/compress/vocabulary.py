"""A smaller vocabulary for the texts of a domain: which tokens stay, and tokenizer and tables without the others.

What stays can be written again: special tokens, bytes or single characters, and every step of merging that leads to a
token. Merging goes by rank, and every step that a text took before is still there, so that a text whose tokens all
stayed is cut as before; WordPiece takes the longest piece first, and the same holds. Other texts become more and
smaller tokens. Ids keep their order. Needs torch for tables only; Unigram, whose pieces compete by score, is refused.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgelm.errors import CheckpointError, UsageError
from exporter.token_identity import open_tokenizer
from exporter.tokenizer import SourceTokenizer
from exporter.tokenizer_sentencepiece import SPACE, is_sentencepiece
from exporter.tokenizer_wordpiece import CONTINUED, is_wordpiece

# Settings beside ..._token_id(s) that name tokens by number.
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_NUMBERED = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class VocabularyCut:
    """The old ids that stay, ascending, which are the new ids' order; and the tokenizer of the new ones.

    ``before`` and ``after`` count tokens of the text that they were chosen by.
    """

    kept: tuple[int, ...]
    tokenizer_json: str
    before: int
    after: int

    @property
    def remark(self) -> str:
        """What became of the text, for the model card."""
        told = "as before" if self.before == self.after else f"{self.after / self.before - 1:+.2%}"
        return (
            f"{len(self.kept)} tokens stayed: the text that chose them has {self.after} tokens, {told}; "
            f"other texts become more tokens"
        )


def check_vocabulary(words: SourceTokenizer, count: int) -> None:
    """Refuse early what cannot be cut. Raises ``UsageError`` and ``CheckpointError``."""
    document = json.loads(words.tokenizer_json)
    _steps_of(document)
    if count > words.vocabulary:
        raise UsageError(f"--vocabulary {count}: the teacher has {words.vocabulary} tokens", hint="give a lower number")
    least = len(_needed(document, words))
    if count < least:
        raise UsageError(
            f"--vocabulary {count}: special tokens and those that any text can be written with are {least} already",
            hint=f"give a number from {least} to {words.vocabulary}",
        )


def choose_tokens(words: SourceTokenizer, texts: Iterable[str], count: int, also: Iterable[int] = ()) -> VocabularyCut:
    """The ``count`` tokens to keep: those that any text needs, then what the texts use most, then the lowest ids.

    Each comes with all tokens that it is merged from. ``also`` are further ids that have to stay. Raises ``UsageError``
    and ``CheckpointError``.
    """
    check_vocabulary(words, count)
    document, texts = json.loads(words.tokenizer_json), tuple(texts)
    tokenizer = open_tokenizer(words.tokenizer_json, "tokenizer.json")
    used = Counter(token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids)
    by_token: Mapping[str, int] = document["model"]["vocab"]
    names = {index: token for token, index in by_token.items()}
    steps = _steps_of(document)
    kept = _needed(document, words) | set(also)
    order = [*(token for token, _ in sorted(used.items(), key=lambda item: (-item[1], item[0]))), *sorted(names)]
    for token in order:
        if len(kept) >= count:
            break
        if token in kept or token not in names:
            continue
        parts = steps.of(names[token])
        if not parts <= by_token.keys():
            continue  # of a character that is no token: merging never gets here
        needed = {by_token[name] for name in parts} - kept
        if token in needed and len(kept) + len(needed) <= count:
            kept |= needed
    ids = tuple(sorted(kept))
    rewritten = json.dumps(_document(document, ids), ensure_ascii=False)
    smaller = open_tokenizer(rewritten, "the tokenizer without the other tokens")
    after = sum(len(smaller.encode(text, add_special_tokens=False).ids) for text in texts)
    return VocabularyCut(ids, rewritten, used.total(), after)


class _Steps:
    """What a token is merged from, itself included; nothing when merging never makes it."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(pairs_of(model))))}
        self._whole = bool(model.get("ignore_merges"))

    def of(self, token: str) -> set[str]:
        parts, made = list(token), set(token)
        while len(parts) > 1:
            ranked = [(self._ranks.get(pair), place) for place, pair in enumerate(pairwise(parts))]
            found = [(rank, place) for rank, place in ranked if rank is not None]
            if not found:
                break
            place = min(found)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            made.add(parts[place])
        if len(parts) == 1:
            return made
        return {token} if self._whole else set()


class _Pieces:
    """Pieces of WordPiece are made of nothing."""

    def of(self, token: str) -> set[str]:
        return {token}


def _steps_of(document: Mapping[str, Any]) -> _Steps | _Pieces:
    """How tokens are built. Raises ``CheckpointError`` for a tokenizer that cannot be cut."""
    model = document["model"]
    if is_wordpiece(document):
        return _Pieces()
    if not isinstance(model.get("merges"), list):
        kind = model.get("type") or "Unigram"
        raise CheckpointError(
            f"a tokenizer of type {kind} cannot be cut: its pieces compete by score, and texts would change",
            hint="leave out --vocabulary",
        )
    return _Steps(model)


def pairs_of(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE, which are written in two ways."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _needed(document: Mapping[str, Any], words: SourceTokenizer) -> set[int]:
    """Special tokens, all that settings name by number, and what any text can be written with."""
    by_token: Mapping[str, int] = document["model"]["vocab"]
    kept = {item["id"] for item in document.get("added_tokens") or []}
    kept |= set(_named(words.generation_config))
    kept |= {
        index for key, index in words.gguf_metadata.items() if key.endswith("_token_id") and isinstance(index, int)
    }
    kept |= set(_processor_ids(document.get("post_processor") or {}))
    unknown = document["model"].get("unk_token")
    if unknown in by_token:
        kept.add(by_token[unknown])
    if is_sentencepiece(document):
        # A space written by its mark's bytes would come back as the mark.
        kept |= {by_token[name] for name in (SPACE, *(f"<0x{byte:02X}>" for byte in range(256))) if name in by_token}
    elif is_wordpiece(document):
        kept |= {index for token, index in by_token.items() if len(token.removeprefix(CONTINUED) or token) == 1}
    else:
        kept |= {index for token, index in by_token.items() if len(token) == 1}  # bytes, each written as a character
    return {index for index in kept if index < words.vocabulary}


# --- files


def rewrite(directory: Path, cut: VocabularyCut) -> None:
    """Put the new ids into every file of a student that has the old ones."""
    places = {old: new for new, old in enumerate(cut.kept)}
    (directory / "tokenizer.json").write_text(cut.tokenizer_json, encoding="utf-8")
    for path, document in _documents(directory, _NUMBERED):
        changed = _renumbered(document, places)
        if path.name == "config.json":
            changed["vocab_size"] = len(cut.kept)
        _write(path, changed)
    for path, document in _documents(directory, ("tokenizer_config.json",)):
        added = document.get("added_tokens_decoder")
        if isinstance(added, dict):
            kept = {int(old): entry for old, entry in added.items() if old.isdigit() and int(old) in places}
            document["added_tokens_decoder"] = {str(places[old]): entry for old, entry in kept.items()}
        _write(path, document)
    (directory / "added_tokens.json").unlink(missing_ok=True)  # tokenizer.json has them all


def _documents(directory: Path, names: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for name in names:
        path = directory / name
        if path.is_file():
            yield path, json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_token_setting(name: str) -> bool:
    return name.endswith(("_token_id", "_token_ids")) or name in _TOKEN_LISTS


def _named(settings: Mapping[str, Any]) -> Iterator[int]:
    """Every token that settings name by number."""
    for name, value in settings.items():
        if _is_token_setting(name):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
                    yield item


def _renumbered(settings: Mapping[str, Any], places: Mapping[int, int]) -> dict[str, Any]:
    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [places[item] for item in value if item in places]
        return places.get(value, value)

    return {name: new(value) if _is_token_setting(name) else value for name, value in settings.items()}


def _document(document: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """tokenizer.json with the kept tokens only."""
    places = {old: new for new, old in enumerate(kept)}
    changed: dict[str, Any] = copy.deepcopy(dict(document))
    model = changed["model"]
    vocabulary = {token: places[old] for token, old in model["vocab"].items() if old in places}
    model["vocab"] = vocabulary
    if isinstance(model.get("merges"), list):
        named = zip(model["merges"], pairs_of(model), strict=True)
        model["merges"] = [merge for merge, pair in named if all(part in vocabulary for part in (*pair, "".join(pair)))]
    changed["added_tokens"] = [{**item, "id": places[item["id"]]} for item in changed.get("added_tokens") or []]
    if changed.get("post_processor"):
        _renumber_processor(changed["post_processor"], places)
    return changed


def _processor_ids(processor: Mapping[str, Any]) -> Iterator[int]:
    """Tokens that are put around texts."""
    for part in processor.get("processors") or []:
        yield from _processor_ids(part)
    yield from (processor[name][1] for name in ("sep", "cls") if isinstance(processor.get(name), list))
    special = processor.get("special_tokens")
    if isinstance(special, dict):
        yield from (index for entry in special.values() for index in entry["ids"])


def _renumber_processor(processor: dict[str, Any], places: Mapping[int, int]) -> None:
    for part in processor.get("processors") or []:
        _renumber_processor(part, places)
    for name in ("sep", "cls"):
        pair = processor.get(name)
        if isinstance(pair, list):
            processor[name] = [pair[0], places[pair[1]]]
    special = processor.get("special_tokens")
    if isinstance(special, dict):
        for entry in special.values():
            entry["ids"] = [places[index] for index in entry["ids"]]


# --- tables


def cut_tables(model: Any, kept: Sequence[int]) -> None:
    """Leave the kept rows of the embedding and of the head, in place; ``config`` gets their count, no new ids."""
    import torch

    tied = model.config.tie_word_embeddings
    tables = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and not tied:
        tables.append(head)
    padding = getattr(tables[0], "padding_idx", None)
    if padding is not None:
        tables[0].padding_idx = kept.index(padding)
    for table in tables:
        rows = torch.tensor(kept, device=table.weight.device)
        table.weight = torch.nn.Parameter(table.weight.detach().index_select(0, rows), requires_grad=False)
        if getattr(table, "bias", None) is not None:
            table.bias = torch.nn.Parameter(table.bias.detach().index_select(0, rows), requires_grad=False)
        setattr(table, "num_embeddings" if hasattr(table, "num_embeddings") else "out_features", len(kept))
    model.config.vocab_size = len(kept)
    if hasattr(model, "vocab_size"):
        model.vocab_size = len(kept)
    if head is not None and tied:
        head.weight = tables[0].weight
        head.out_features = len(kept)
