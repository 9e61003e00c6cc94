"""Chat templates: messages to prompt text, as transformers renders it, in a sandbox with limits.

A template comes with the model, so it is input from a stranger. Jinja's immutable sandbox keeps it away from Python;
it does not keep it from running for ever or from filling the memory. Here every value that a template makes is
measured when it is made, every loop step and every macro call looks at the clock. Knows nothing of tokens.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edgelm.errors import BundleError, UsageError

Message = Mapping[str, Any]

SOURCE_LIMIT_CHARS = 2**20
VALUE_LIMIT = 2**22  # characters in one value, and in the whole output; an item of a list counts as several
_ITEM_SIZE = 16
WORK_LIMIT = 2**26  # characters that one string operation may produce at most
TIME_LIMIT_S = 2.0
_INTEGER_LIMIT_BITS = 256
_FORMAT_FIELDS_LIMIT = 32
_WIDE = re.compile(r"\d{5,}|%[-+ #0]*\*|:[^{}]*\{|%[^%a-zA-Z]*\.\*")  # a format with a large or computed width

_MEASURED = (nodes.List, nodes.Tuple, nodes.Dict, nodes.Call, nodes.Filter, nodes.Concat)
_NOT_EXPRESSIONS = {(nodes.CallBlock, "call"), (nodes.FilterBlock, "filter")}
_REMOVED_FILTERS = ("pprint", "urlize", "wordwrap", "xmlattr", "batch", "slice", "random")

# Everything that running a template may raise: Jinja's own errors and what Python's operators raise inside it.
_TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RecursionError,
    SyntaxError,
    MemoryError,
)


class _LimitError(jinja2.TemplateError):
    """A template wants more than it may have."""


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's words for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (the attribute is Jinja's)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Meter:
    """What one rendering has used of its limits."""

    def __init__(self, time_limit_s: float) -> None:
        self._deadline = time.monotonic() + time_limit_s
        self._left = 4 * VALUE_LIMIT  # text that passes through blocks and macros is written more than once

    def tick(self, characters: int) -> None:
        self._left -= characters
        if self._left < 0:
            raise _LimitError("it writes too much text")
        if time.monotonic() > self._deadline:
            raise _LimitError("it takes too long")


def _measure(value: Any) -> int:
    """Characters and items in a value, all levels; raises ``_LimitError`` as soon as they are too many."""
    if isinstance(value, str):
        size = len(value)
    else:
        size, waiting = 0, [value]
        while waiting and size <= VALUE_LIMIT:
            item = waiting.pop()
            size += _ITEM_SIZE
            if isinstance(item, (str, bytes)):
                size += len(item)
            elif isinstance(item, int):
                size += item.bit_length() // 8
            elif isinstance(item, Mapping):
                waiting.extend(item.keys())
                waiting.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                waiting.extend(item)
            elif isinstance(item, Namespace):
                waiting.append(object.__getattribute__(item, "_Namespace__attrs"))
    if size > VALUE_LIMIT:
        raise _LimitError("it makes a value that is too large")
    return size


def _check_work(*factors: int) -> None:
    work = 1
    for factor in factors:
        work *= max(abs(factor), 1)
    if work > WORK_LIMIT:
        raise _LimitError("it makes a text that is too large")


def _check_format(text: str) -> None:
    if _WIDE.search(text) or text.count("{") + text.count("%") > _FORMAT_FIELDS_LIMIT:
        raise _LimitError("it formats with a large width or too many fields")


class _Text:
    """The methods of ``str`` whose result can be much larger than what goes in, with a look at its size first."""

    def __init__(self, text: str) -> None:
        self._text = text

    def center(self, width: int, fill: str = " ") -> str:
        _check_work(width)
        return self._text.center(width, fill)

    def ljust(self, width: int, fill: str = " ") -> str:
        _check_work(width)
        return self._text.ljust(width, fill)

    def rjust(self, width: int, fill: str = " ") -> str:
        _check_work(width)
        return self._text.rjust(width, fill)

    def zfill(self, width: int) -> str:
        _check_work(width)
        return self._text.zfill(width)

    def expandtabs(self, tabsize: int = 8) -> str:
        _check_work(self._text.count("\t"), tabsize)
        return self._text.expandtabs(tabsize)

    def replace(self, old: str, new: str, count: int = -1) -> str:
        _check_work(self._text.count(old) if old else len(self._text) + 1, len(new))
        return self._text.replace(old, new, count)

    def join(self, items: Any) -> str:
        items = list(items)
        _measure(items)
        _check_work(len(self._text), len(items))
        return self._text.join(items)

    def translate(self, table: Any) -> NoReturn:
        raise _LimitError("it calls translate")


_GUARDED_METHODS = frozenset(name for name in vars(_Text) if not name.startswith("_"))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, plus measurement of values and time."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # optimized=False: constants must not be folded, since folding runs them without a limit.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            finalize=_finalize,
        )
        self.meter = _Meter(TIME_LIMIT_S)
        del self.globals["lipsum"]
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name in ("replace", "center", "indent", "join", "format"):
            self.filters[name] = _FILTERS[name](self.filters[name])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        _instrument(template)
        return template

    def tick(self, characters: int) -> None:
        """Called by every step of a loop and every run of a macro."""
        self.meter.tick(characters)

    def measured(self, value: Any) -> Any:
        """Called with every value that the template makes. Iterators become lists: they hide what they will cost."""
        self.meter.tick(0)
        if isinstance(value, Iterator) and not isinstance(value, jinja2.runtime.LoopContext):
            kept: list[Any] = []
            room = VALUE_LIMIT
            for item in value:
                room -= _ITEM_SIZE + _measure(item)
                if room < 0:
                    raise _LimitError("it makes a list that is too large")
                kept.append(item)
            return kept
        _measure(value)
        return value

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, str):
            if attribute in _GUARDED_METHODS:
                return getattr(_Text(obj), attribute)
            if attribute.startswith("format"):
                _check_format(obj)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str) and isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, factor in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(factor, int):
                    _check_work(_measure(text), factor)
        elif operator == "**" and isinstance(right, int) and abs(right) > _INTEGER_LIMIT_BITS:
            raise _LimitError("it computes a number that is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > _INTEGER_LIMIT_BITS:
            raise _LimitError("it computes a number that is too large")
        return self.measured(result)


@jinja2.pass_context
def _finalize(context: Context, value: Any) -> Any:
    """Sees every value that is written. Takes the context so that Jinja does not run it while compiling."""
    environment = context.environment
    assert isinstance(environment, _Environment)
    environment.tick(_measure(value))
    return value


def _instrument(node: nodes.Node) -> None:
    """Wrap every expression that makes a value in ``measured``, start every loop and macro body with ``tick``."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _instrument(value)
            if (type(node), name) not in _NOT_EXPRESSIONS:
                setattr(node, name, _wrapped(value))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _instrument(item)
                    value[index] = _wrapped(item)
    if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        call = _environment_call("tick", nodes.Const(written), node.lineno)
        node.body.insert(0, nodes.ExprStmt(call).set_lineno(node.lineno))


def _wrapped(node: nodes.Node) -> nodes.Node:
    stored = getattr(node, "ctx", "load") != "load"
    if isinstance(node, _MEASURED) and not stored:
        return _environment_call("measured", node, node.lineno)
    return node


def _environment_call(name: str, argument: nodes.Expr, line: int) -> nodes.Call:
    callee = nodes.EnvironmentAttribute(name).set_lineno(line)
    call = nodes.Call(callee, [argument], [], None, None)
    call.set_lineno(line)
    return call


def _guarded_replace(original: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_eval_context
    def replace(context: nodes.EvalContext, text: Any, old: str, new: str, count: int | None = None) -> Any:
        text = str(text)
        _check_work(text.count(old) if old else len(text) + 1, len(new))
        return original(context, text, old, new, count)

    return replace


def _guarded_center(original: Callable[..., Any]) -> Callable[..., Any]:
    def center(value: str, width: int = 80) -> Any:
        _check_work(width)
        return original(value, width)

    return center


def _guarded_indent(original: Callable[..., Any]) -> Callable[..., Any]:
    def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        _check_work(len(text.splitlines()), len(width) if isinstance(width, str) else width)
        return original(text, width, first, blank)

    return indent


def _guarded_join(original: Callable[..., Any]) -> Callable[..., Any]:
    @jinja2.pass_eval_context
    def join(context: nodes.EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> Any:
        items = list(value)
        _check_work(_measure(items), len(d))
        return original(context, items, d, attribute)

    return join


def _guarded_format(_original: Callable[..., Any]) -> Callable[..., Any]:
    def format_text(value: str, *arguments: Any) -> str:
        _check_format(value)
        return str(value) % arguments

    return format_text


_FILTERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "replace": _guarded_replace,
    "center": _guarded_center,
    "indent": _guarded_indent,
    "join": _guarded_join,
    "format": _guarded_format,
}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' own: Jinja's would escape HTML characters."""
    _check_work(_measure(value), len(indent) if isinstance(indent, str) else indent or 1)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    _check_format(pattern)
    return datetime.now().strftime(pattern)  # noqa: DTZ005 (local time without a zone, as in transformers)


class ChatTemplate:
    """One compiled template. Thread-safe: renderings take turns.

    ``special_tokens`` are the names that transformers gives to templates (``bos_token``, ``eos_token`` ...) with
    their texts. ``uses_tools`` tells whether the template can show tools to the model. Raises ``BundleError`` when the
    template cannot be compiled.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, *, time_limit_s: float = TIME_LIMIT_S
    ) -> None:
        if len(source) > SOURCE_LIMIT_CHARS:
            raise BundleError(f"the chat template has {len(source)} characters, more than {SOURCE_LIMIT_CHARS}")
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._environment = _Environment()
        self.uses_tools = False
        try:
            self._template = self._environment.from_string(source)
            self.uses_tools = "tools" in meta.find_undeclared_variables(self._environment.parse(source))
        except _TEMPLATE_FAILURES as error:
            raise BundleError(f"the chat template is malformed: {_reason(error)}", hint="export it again") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text for ``messages`` (``role`` and ``content``), the same that transformers renders.

        Raises ``UsageError`` when the template refuses the messages or goes beyond its limits.
        """
        names = {
            **self.special_tokens,
            **(variables or {}),
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:
            self._environment.meter = _Meter(self._time_limit_s)
            pieces: list[str] = []
            room = VALUE_LIMIT
            try:
                for piece in self._template.generate(names):
                    room -= len(piece)
                    if room < 0:
                        raise _LimitError("it writes too much text")
                    pieces.append(piece)
            except _LimitError as error:
                raise UsageError(f"the chat template was stopped: {error}") from error
            except _TEMPLATE_FAILURES as error:
                raise UsageError(f"the chat template refused the messages: {_reason(error)}") from error
        return "".join(pieces)


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) or type(error).__name__
