"""Chat templates: the functions that real ones use, and hostile ones that have to be refused in bounded time."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from edgelm.errors import BundleError, UsageError
from runtime.chat import SOURCE_LIMIT_CHARS, ChatTemplate
from tests.fake_engine import CHATML

MESSAGES = [{"role": "user", "content": "hi"}]


def test_chatml() -> None:
    template = ChatTemplate(CHATML)
    assert template.render(MESSAGES) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(MESSAGES, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>hi"),
        ("{%- for m in messages %}\n  {{- m['content'] }}\n{%- endfor %}", "hi"),
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),
        ("{{ {'a': '<é>', 'b': [1, 2]} | tojson }}", '{"a": "<é>", "b": [1, 2]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": 2\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for i in range(4) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "023"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% macro f(x, y='z') %}[{{ x }}{{ y }}]{% endmacro %}{{ f('a') }}{{ f('b', y='c') }}", "[az][bc]"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ 'a-b'.split('-')[-1] }}{{ ' x '.strip() }}{{ 'ab'.replace('a', 'c') }}", "bxcb"),
        ("{{ messages | map(attribute='content') | join(',') }}", "hi"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ 'x' ~ 1 ~ none }}{{ 'a' if tools is none else 'b' }}", "x1Nonea"),
        ("{{ '%s %d' | format('a', 3) }} {{ '{}'.format('b') }} {{ 'c%s' % 'd' }}", "a 3 b cd"),
        ("{% for a, b in {'k': 'v'}.items() %}{{ a }}{{ b }}{% endfor %}", "kv"),
        ("{% set x %}{{ messages[0].content }}!{% endset %}{{ x }}", "hi!"),
        ("{{ 'ab'[::-1] }}{{ (1, 2)[0] }}{{ [1, 2] | last }}", "ba12"),
        ("{{ 'line\nline' | indent(2) }}", "line\n  line"),
        ("{% macro f() %}({{ caller(1) }}){% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}", "(1)"),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES) == expected


def test_strftime_now_tells_the_year() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(MESSAGES) == time.strftime("%Y")


def test_a_template_may_refuse_messages() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="refused the messages: roles must alternate"):
        template.render(MESSAGES)


def test_missing_fields_are_the_message_s_fault() -> None:
    with pytest.raises(UsageError, match="refused the messages"):
        ChatTemplate(CHATML).render([{"role": "user"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% for x in %}",
        "{% if %}",
        "{{ 'a' | nofilter }}",
        "{{ " + "(" * 60_000 + "1" + ")" * 60_000 + " }}",
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "x" * (SOURCE_LIMIT_CHARS + 1),
    ],
)
def test_malformed_templates(source: str) -> None:
    with pytest.raises(BundleError, match="chat template"):
        ChatTemplate(source)


HOSTILE = {
    "attributes": "{{ messages.__class__.__base__.__subclasses__() }}",
    "attributes by filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "globals of a function": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "silent loops": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "multiplied text": "{{ 'a' * 10**10 }}",
    "multiplied list": "{{ ([1] * 10**10) | length }}",
    "power": "{{ 10 ** 10 ** 8 }}",
    "squares": "{% set n = namespace(v=3) %}{% for i in range(99) %}{% set n.v = n.v * n.v %}{% endfor %}{{ n.v }}",
    "doubling": "{% set n = namespace(v='a') %}{% for i in range(60) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
    "nesting": "{% set n = namespace(v=[1]) %}{% for i in range(60) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'a' * 1000000) | length }}",
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'a' * 1000000) | length }}",
    "join": "{{ ('a' * 1000000).join(range(99999) | map('string')) | length }}",
    "center": "{{ 'x'.center(10**10) }}",
    "center filter": "{{ 'x' | center(10**10) }}",
    "mapped center": "{{ range(99999) | map('center', 1000000) | join }}",
    "width": "{{ '%999999999d' % 1 }}",
    "star width": "{{ '%*d' % (999999999, 1) }}",
    "format width": "{{ '{:999999999}'.format(1) }}",
    "computed width": "{{ '{:{w}}'.format(1, w=999999999) }}",
    "indent": "{{ 'a' | indent(10**9, true) }}",
    "json indent": "{{ range(9999) | list | tojson(indent=99999) }}",
    "strftime": "{{ strftime_now('%999999999Y') }}",
    "large block": "{% set x %}{% for i in range(99999) %}" + "y" * 100_000 + "{% endfor %}{% endset %}",
    "large output": "{% for i in range(99999) %}" + "y" * 100_000 + "{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=10000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_in_bounded_time_and_memory(name: str) -> None:
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    with pytest.raises((UsageError, BundleError), match="chat template"):
        ChatTemplate(HOSTILE[name], time_limit_s=0.3).render(MESSAGES)
    assert time.thread_time() - started < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before < 300 * 1024  # kB


@pytest.mark.parametrize("source", ["{{ ''.__class__ }}", "{{ ''['__class__'] }}", "{{ '{0.__class__}'.format(1) }}"])
def test_private_attributes_give_nothing_away(source: str) -> None:
    try:
        assert ChatTemplate(source).render(MESSAGES) == ""
    except UsageError as error:
        assert "unsafe" in error.message  # noqa: PT017 (either way is right, only a class name is not)


def test_threads_take_turns() -> None:
    template = ChatTemplate(CHATML)
    results: list[str] = []
    work = [threading.Thread(target=lambda: results.append(template.render(MESSAGES * 20))) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert set(results) == {template.render(MESSAGES * 20)}
