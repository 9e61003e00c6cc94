"""Constrained decoding: what a grammar allows next, as a mask over the logits.

llguidance compiles JSON schemas, regular expressions and Lark grammars and walks them token by token. A request
carries the compiled text (a plain string, so it crosses a process border); where tokens are chosen it becomes a
``Constraint``. Grammars come from strangers: their text, their compiled size and the work of every step are bounded,
and a grammar that exceeds a bound fails its own request and nothing else. Knows nothing of requests or engines.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from edgelm.errors import EngineError, UsageError
from runtime.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import llguidance

SOURCE_LIMIT_CHARS = 32 * 2**10  # of a schema as JSON, or of a grammar
REGEX_LIMIT_CHARS = 4 * 2**10
_SCHEMA_WORK_LIMIT = 20_000  # places of a schema looked at in search of a finite value
_KEPT_MATCHERS = 16  # compiled grammars kept per vocabulary: clients repeat their schemas
# Small models that may write any white space write it for ever: one blank, or a line break and five levels by four.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n {0,20})?"}


class ConstraintError(EngineError):
    """A grammar turned out too costly or leads nowhere: the request is at fault, not the engine."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """The Lark expression for JSON values that ``schema`` allows."""
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_OPTIONS})


def json_schema_grammar(schema: Mapping[str, Any]) -> str:
    """A grammar for the values of a JSON schema.

    Raises ``UsageError`` for schemas that are too large, malformed, use keywords that cannot be enforced, or that no
    finite value satisfies.
    """
    if len(json.dumps(schema)) > SOURCE_LIMIT_CHARS:
        raise UsageError(f"the schema is longer than {SOURCE_LIMIT_CHARS} characters")
    check_finite(schema)
    return checked_grammar("start: " + json_rule(schema))


def regex_grammar(regex: str) -> str:
    """A grammar for texts that match a regular expression as a whole (Rust's syntax: no look-around, no references).

    Raises ``UsageError``.
    """
    import llguidance

    if len(regex) > REGEX_LIMIT_CHARS:
        raise UsageError(f"the regular expression is longer than {REGEX_LIMIT_CHARS} characters")
    return checked_grammar(llguidance.LLMatcher.grammar_from_regex(regex))


def choice_grammar(choices: Iterable[str]) -> str:
    """A grammar for exactly one of several texts. Raises ``UsageError``."""
    return lark_grammar("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


def lark_grammar(grammar: str) -> str:
    """A Lark grammar in llguidance's dialect, checked. Raises ``UsageError``."""
    if len(grammar) > SOURCE_LIMIT_CHARS:
        raise UsageError(f"the grammar is longer than {SOURCE_LIMIT_CHARS} characters")
    return checked_grammar(grammar)


def checked_grammar(grammar: str) -> str:
    """``grammar`` itself, once it was compiled and asked for a first byte. Raises ``UsageError`` naming the fault.

    Bytes stand for the tokens of any vocabulary here, so nothing of a model is needed.
    """
    matcher = _matcher(_byte_vocabulary(), grammar)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise UsageError(f"it cannot be enforced: {_reason(matcher)}")
    return grammar


def check_finite(schema: Mapping[str, Any]) -> None:
    """Raise ``UsageError`` for a schema whose every value would be endless (``$ref`` to itself without a way out)."""
    if not _FiniteValues(schema).exist(schema, frozenset()):
        raise UsageError("the schema refers to itself without an end, so no finite value satisfies it")


class _FiniteValues:
    """Looks for a finite value of a schema. Keywords that it does not know do not make values endless."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._work = 0

    def exist(self, schema: Any, open_references: frozenset[str]) -> bool:
        """Whether there is one, without going through ``open_references`` again."""
        self._work += 1
        if self._work > _SCHEMA_WORK_LIMIT:
            raise UsageError("the schema refers to itself in too many ways")
        if not isinstance(schema, Mapping):
            return True
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            if reference in open_references:
                return False
            if not self.exist(self._resolve(reference), open_references | {reference}):
                return False
        for name in ("anyOf", "oneOf"):
            options = schema.get(name)
            if isinstance(options, list) and options and not any(self.exist(o, open_references) for o in options):
                return False
        return all(self.exist(part, open_references) for part in self._needed(schema))

    def _needed(self, schema: Mapping[str, Any]) -> Iterable[Any]:
        """Schemas of everything that a value cannot do without."""
        all_of, required, properties = schema.get("allOf"), schema.get("required"), schema.get("properties")
        if isinstance(all_of, list):
            yield from all_of
        if isinstance(required, list) and isinstance(properties, Mapping):
            yield from (properties[name] for name in required if isinstance(name, str) and name in properties)
        least = schema.get("minItems", 0)
        if isinstance(least, int) and least > 0:
            first = schema.get("prefixItems")
            yield from first[:least] if isinstance(first, list) else ()
            yield schema.get("items")

    def _resolve(self, reference: str) -> Any:
        found: Any = self._root
        for part in reference.removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


class Constraint:
    """One generation's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def masked(self, logits_row: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A copy of the row with minus infinity for every token that may not come next.

        Raises ``ConstraintError`` when the grammar exceeds its bounds or allows nothing.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = bits[: len(logits_row)].view(np.bool_)
        if self._matcher.is_error() or not allowed.any():
            raise ConstraintError(f"the constraint cannot be continued: {_reason(self._matcher)}")
        return np.where(allowed, logits_row, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed. Raises ``ConstraintError``."""
        if not self._matcher.consume_token(token):
            raise ConstraintError(f"the constraint cannot be continued: {_reason(self._matcher)}")

    @property
    def finished(self) -> bool:
        """Whether the grammar is satisfied and nothing but the end can follow."""
        return bool(self._matcher.is_stopped()) and bool(self._matcher.is_accepting())


class ConstraintVocabulary:
    """The tokens of one model as llguidance needs them, and the grammars compiled for them lately.

    ``size`` is the number of logits. Building it takes a second for 100,000 tokens on a slow machine. Thread-safe.
    """

    def __init__(self, tokenizer: TextTokenizer, size: int, stop_tokens: frozenset[int]) -> None:
        texts = [tokenizer.token_bytes(token) for token in range(size)]
        ends = sorted(token for token in stop_tokens if 0 <= token < size)
        self._vocabulary = _vocabulary(texts, ends, tokenizer)
        self._compiled: dict[str, llguidance.LLMatcher] = {}
        self._lock = threading.Lock()

    def constraint(self, grammar: str) -> Constraint:
        """A constraint at the grammar's start. Raises ``ConstraintError``."""
        with self._lock:
            matcher = self._compiled.pop(grammar, None) or _matcher(self._vocabulary, grammar)
            if matcher.is_error():
                raise ConstraintError(f"the constraint cannot be enforced: {_reason(matcher)}")
            self._compiled[grammar] = matcher
            if len(self._compiled) > _KEPT_MATCHERS:
                del self._compiled[next(iter(self._compiled))]
            return Constraint(matcher.deep_copy())


_vocabularies: WeakKeyDictionary[TextTokenizer, dict[tuple[int, frozenset[int]], ConstraintVocabulary]] = (
    WeakKeyDictionary()
)
_vocabularies_lock = threading.Lock()


def constraint_vocabulary(tokenizer: TextTokenizer, size: int, stop_tokens: frozenset[int]) -> ConstraintVocabulary:
    """The vocabulary of a tokenizer, built when it is first asked for and kept as long as the tokenizer lives."""
    with _vocabularies_lock:
        known = _vocabularies.setdefault(tokenizer, {})
        found = known.get((size, stop_tokens))
        if found is None:
            found = known[size, stop_tokens] = ConstraintVocabulary(tokenizer, size, stop_tokens)
        return found


class _Source:
    """A vocabulary in the words of llguidance's ``TokenizerWrapper``. Tokens without text are special to it."""

    def __init__(self, texts: Sequence[bytes], end: int, tokenizer: TextTokenizer | None) -> None:
        self.tokens = [text or f"<special {token}>".encode() for token, text in enumerate(texts)]
        self.special_token_ids = [token for token, text in enumerate(texts) if not text]
        self.eos_token_id = end
        self.bos_token_id = None
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        if self._tokenizer is None:
            return list(text)
        return self._tokenizer.encode(text.decode("utf-8", "replace"), special=False)


def _vocabulary(texts: Sequence[bytes], ends: list[int], tokenizer: TextTokenizer | None) -> llguidance.LLTokenizer:
    import llguidance

    if not ends:
        raise ConstraintError("the model has no token that ends an answer, so nothing could end a constraint")
    wrapper = llguidance.TokenizerWrapper(_Source(texts, ends[0], tokenizer))
    # Slices speed up masks of free text by building more in advance; 0.3 s without them is 0.8 s with them.
    return llguidance.LLTokenizer(wrapper, n_vocab=len(texts), eos_token=ends, slices=[])


@lru_cache(maxsize=1)
def _byte_vocabulary() -> llguidance.LLTokenizer:
    return _vocabulary([*(bytes([byte]) for byte in range(256)), b""], [256], None)


def _matcher(vocabulary: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    import llguidance

    # Within these bounds no hostile grammar that was tried took more than 0.3 s to compile or 40 ms for one mask on a
    # 2-core x86-64 machine.
    limits = llguidance.LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=20_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )
    return llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)


def _reason(matcher: llguidance.LLMatcher) -> str:
    """The first line of llguidance's message, of which a part may quote the grammar."""
    lines = matcher.get_error().splitlines()
    return lines[0][:200] if lines else "it allows nothing more"
