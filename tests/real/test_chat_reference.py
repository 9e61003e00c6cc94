"""Our rendering of chat templates against transformers', byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

from edgelm.errors import UsageError
from runtime.chat import ChatTemplate
from runtime.gguf_header import read_gguf_header

pytestmark = pytest.mark.reference

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b>&amp;</b> 'x' \"y\" \\n"}],
    [{"role": "system", "content": "S\n\n"}, {"role": "user", "content": " größe 🎉 "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nno\n</think>\n\nb"},
        {"role": "user", "content": "c\r\n\td"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "é": ["<", 1.5, None]}}}]

# Written in the manner of the templates of the model families named; each uses what that family's uses.
TEMPLATES = {
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
        "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] %}\n"
        "    {%- set rest = messages[1:] %}\n{%- else %}\n    {%- set rest = messages %}\n{%- endif %}\n"
        "{{- bos_token }}{%- for m in rest %}\n  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "    {{- raise_exception('roles must alternate') }}\n  {%- endif %}\n  {%- if m['role'] == 'user' %}\n"
        "    {%- if loop.last and system is defined %}\n      {{- '[INST] ' + system + '\\n\\n' + m['content'] }}\n"
        "    {%- else %}\n      {{- '[INST] ' + m['content'] + '[/INST]' }}\n    {%- endif %}\n  {%- else %}\n"
        "    {{- ' ' + m['content'] + eos_token }}\n  {%- endif %}\n{%- endfor %}"
    ),
    "qwen": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n"
        "        {{- \"\\n\" }}\n        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '<|im_end|>\\n' }}\n"
        "{%- endif %}\n{%- set ns = namespace(multi=true, last=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        "    {%- if ns.multi and message.role == 'user' and message.content is string and not(message.content"
        ".startswith('<tool>') and message.content.endswith('</tool>')) %}\n        {%- set ns.multi = false %}\n"
        "        {%- set ns.last = index %}\n    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n"
        "    {%- set content = message.content %}\n    {%- if '</think>' in content %}\n"
        "        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n    {%- endif %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n{{ ns.last }}"
    ),
    "smollm3": (
        "{% macro line(name, value='?') -%}\n{{ name }}: {{ value }}\n{%- endmacro %}\n{% for m in messages %}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}\n{% continue %}{% endif %}\n"
        "  {{ line(m.role, m.content) }}\n{% endfor %}\n{{ strftime_now('%Y') }} {{ messages | tojson(indent=2) }}\n"
        "{{ tools | tojson if tools else documents }}"
    ),
}


def check(source: str, special: dict[str, str], messages: list[dict[str, Any]], tools: Any, prompt: bool) -> None:
    from jinja2 import TemplateError
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **special)
    options = {"tools": tools, "add_generation_prompt": prompt}
    try:
        expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    except TemplateError as error:
        with pytest.raises(UsageError, match=str(error)):
            ChatTemplate(source, special).render(messages, **options)
        return
    assert ChatTemplate(source, special).render(messages, **options) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_families(name: str, chat: int, tools: Any, prompt: bool) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    check(TEMPLATES[name], special, CHATS[chat], tools, prompt)


@pytest.mark.real
@pytest.mark.parametrize("chat", range(len(CHATS)))
def test_the_template_inside_smollm2(smollm2_gguf: Any, chat: int) -> None:
    from runtime.model import special_token_texts

    metadata = read_gguf_header(smollm2_gguf).metadata
    check(metadata["tokenizer.chat_template"], special_token_texts(metadata), CHATS[chat], None, True)
