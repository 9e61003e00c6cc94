"""The texts of the proofs: a hard corpus for tokenizers, and what models are calibrated and evaluated on.

The default text needs no network: the language topics of Python's own documentation, which every Python carries.
Its first half calibrates, its second half evaluates. Knows no model and no tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import UsageError

TEXT_LIMIT_BYTES = 256 * 2**20
_NORMAL_TEXT_CHARACTERS = 12_000


@dataclass(frozen=True, slots=True)
class Text:
    """A text with the name that a manifest shows for it."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the UTF-8 bytes, hex."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


def _documentation() -> str:
    from pydoc_data.topics import topics

    # Sorted: newer Python versions reorder the table. Sections stand under several topics: a paragraph is taken once,
    # or what calibrated would be evaluated.
    paragraphs = (part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(part for part in paragraphs if part.strip())) + "\n"


def _halves() -> tuple[str, str]:
    text = _documentation()
    middle = text.index("\n\n", len(text) // 2) + 2
    return text[:middle], text[middle:]


def calibration_text(path: Path | None = None) -> Text:
    """The user's text, or the first half of the documentation. Raises ``UsageError`` for an unusable file."""
    return read_text(path) if path is not None else Text("pydoc_data.topics, first half", _halves()[0])


def evaluation_text(path: Path | None = None) -> Text:
    """The user's text, or the second half of the documentation. Raises ``UsageError`` for an unusable file."""
    return read_text(path) if path is not None else Text("pydoc_data.topics, second half", _halves()[1])


def read_text(path: Path) -> Text:
    """A UTF-8 text file. Raises ``UsageError`` when it is missing, empty, too large or not UTF-8."""
    try:
        if not path.is_file():
            raise UsageError(f"text file {path} {'is not a file' if path.exists() else 'does not exist'}")
        if path.stat().st_size > TEXT_LIMIT_BYTES:
            raise UsageError(f"text file {path} is larger than {TEXT_LIMIT_BYTES} bytes", hint="a few MB are enough")
        content = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"text file {path} is not UTF-8 (byte {error.start})", hint="convert it with iconv") from error
    if not content.strip():
        raise UsageError(f"text file {path} is empty", hint="give plain text, about 15 kB or more")
    return Text(path.name, content)


_SNIPPETS = (
    # digits, signs, separators
    "0",
    "7 42 128 1000 65536",
    "3.14159 -2.5e-10 1,234,567.89 1_000_000",
    "2024-02-29T23:59:60Z 0xDEADBEEF",
    "10% of $1,299.99 is about €130",
    "½ ¾ ² ³ ① Ⅷ ٣٤٥ १२३ ４２",
    "1st 2nd 3rd 4x4 a1b2c3 v1.0.0-rc.1+build5",
    # spaces, tabs, line ends
    " ",
    "  ",
    "   leading",
    "trailing   ",
    " a  b   c    d     e",
    "\t",
    "\t\tindented\ttabs\t",
    "\n",
    "\n\n\n",
    "\r\n",
    "line one\r\nline two\r\n\r\nline three",
    "a\n b\n  c\n\n\n   d \n",
    " \n \n\t\n ",
    "a\rb",
    "x\u00a0y\u2003z\u3000w",
    "form\x0cfeed\x0bvertical",
    "one \n two  \n\nthree\n    four\n",
    "\u2028\u2029\x85",
    # zero width, direction marks, byte order mark, controls, noncharacters
    "zero\u200bwidth\u200cjoin\u200der\u2060word",
    "\ufeffbyte order mark",
    "\u202emirrored\u202c",
    "soft\u00adhyphen",
    "nul\x00inside\x01\x1b[0m",
    "\ufffd\ufffe\uffff \U0010ffff \ue000",
    # emoji
    "😀😃😄 👍🏽👩🏿‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇯🇵 ❤️‍🔥 ☺︎ 1️⃣ #️⃣",
    "text😀text 🦙🦙🦙",
    "🚀 (normal) 😶‍🌫️ ✅",
    # scripts
    "我想在苹果工作1314151天。中文，标点！「引用」",
    "日本語のひらがなとカタカナ、漢字。ｶﾀｶﾅ",
    "한국어 문장입니다. 각 조합형 가",
    "مرحبا بالعالم! كيف حالك؟ مُشَكَّل",
    "שלום עולם, מה שלומך? שָׁלוֹם",
    "नमस्ते दुनिया क्षत्रिय ज़रूर",
    "สวัสดีชาวโลก ภาษาไทย",
    "កាន់តែពិសេសអាច",
    "Здравствуй, мир! Ёжик",
    "Καλημέρα κόσμε ΆΈΉ",
    "Straße İstanbul ıI ŒUVRE œuvre ǅ ﬁ ﬂ",
    "Ⴀ ა 𐐷 𝒜𝔹𝕮 𠀀𪛖",
    # combining marks
    "e\u0301 é n\u0303 ñ o\u0308\u0304 ȫ",
    "Z\u0351\u036ba\u0363\u0348l\u034d\u0327g\u0321o\u0328",
    "\u0301alone",
    "क\u094dष",
    # contractions and quotes
    "I'm you're he's we've they'll I'd don't can't won't",
    "I'M YOU'RE HE'S WE'VE THEY'LL I'D DON'T",
    "'s 't 're ''ve 'Tis o'clock",
    "“quoted” ‘single’ «guillemets» it’s ‚low‘ — dash – en … ellipsis",
    "''''''```````\"\"\"\"......!!!!!!??????",
    "------======_____~~~~~*****",
    # addresses and markup
    "https://example.org/a/b?c=d&e=%20f#g mailto:user.name+tag@example.co.uk C:\\dir\\file.txt /usr/lib/x86_64",
    "<html><body class='a'>&nbsp;&lt;b&gt;</body></html> [link](url) **bold** `code` | a | b |\n|---|---|",
    "{{ template }} {% if %} ${var} $(cmd)",
    # long words
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "a" * 700,
    "ab" * 300,
    "xyzzy" * 90,
    "1" * 257,
    " " * 133 + "x",
    "\n" * 70,
    "=" * 200,
    "é" * 150,
    "漢" * 120,
    "😀" * 60,
    "aB" * 100 + "1 " * 100,
    # the empty text, and single bytes of each kind
    "",
    "a",
    "Z",
    "é",
    "漢",
    "😀",
    ".",
    "_",
    "\\",
    "'",
)

_CODE = (
    "def f(x: int = 0) -> str:\n\tif x != 1_000:\n\t\treturn f\"{x!r:>10}\"  # comment\n    return '\\n'\n",
    '#include <stdio.h>\nint main(void) {\n  printf("%d\\n", 0x1F << 3 & ~7);\n  return a->b[i++] ? 1 : 0;\n}\n',
    "fn main() -> Result<(), Box<dyn Error>> {\n    let v: Vec<_> = (0..10).map(|x| x * x).collect();\n    Ok(())\n}\n",
    "const f = async (a, {b, ...c}) => await g`${a ?? b?.d}`;\nif(a === b || !c) { /* nothing */ }\nre = /^\\d+$/g;\n",
    "SELECT a.id, COUNT(*) AS n FROM t1 a LEFT JOIN t2 b ON a.id=b.id WHERE x LIKE '%y%' GROUP BY 1 HAVING n>=2;\n",
    '#!/bin/sh\nset -eu\nfor f in "$@"; do [ -f "$f" ] && sed -e \'s/a\\/b/c/g\' < "$f" | tee -a out.log 2>&1; done\n',
    '{"key": [1, 2.50, -3e8, true, null], "nested": {"a\\u00e9": "\\ud83d\\ude00"}}\n',
    "all: main.o\n\t$(CC) -o $@ $^ \\\n\t\t-lm\n\n.PHONY: clean\n",
    "class A<T extends B & C> : public D { template <typename... U> auto operator()(U&&... u) noexcept; };\n",
    "\\begin{equation}\n  \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}\n\\end{equation}\n",
)


def hard_corpus(special_tokens: Sequence[str] = ()) -> tuple[str, ...]:
    """Texts on which tokenizers disagree, and some normal ones; special tokens are written into ordinary text."""
    with_special: list[str] = []
    for token in special_tokens[:24]:
        with_special += [token, f"before {token} after", f"tight{token}tight", f"{token}{token}", f" {token}\n"]
    if special_tokens:
        chat = "".join(f"{token}user\nHello {position}\n" for position, token in enumerate(special_tokens[:24]))
        with_special += [chat, special_tokens[0][:-1], special_tokens[0][1:]]
    return (*_SNIPPETS, *_CODE, *with_special, *_normal_texts())


def _normal_texts() -> list[str]:
    paragraphs = _halves()[1][:_NORMAL_TEXT_CHARACTERS].split("\n\n")
    return [paragraph for paragraph in paragraphs if paragraph]
