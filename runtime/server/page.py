"""The page at ``/``: the model's facts and a small chat, in one self-contained document.

Style and script stand beside this module and are put inline; the content security policy allows exactly these two by
their hashes and no request to anywhere but this server. Knows what is shown, not how answers are made.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping
from pathlib import Path
from string import Template

_HERE = Path(__file__).parent


class Page:
    """The rendered document and its policy. ``facts`` are shown in order as name and value."""

    def __init__(self, title: str, facts: Mapping[str, str]) -> None:
        style, script, template = (
            (_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
        )
        rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
        self.html = Template(template).substitute(title=html.escape(title), facts=rows, style=style, script=script)
        self.policy = (
            f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
