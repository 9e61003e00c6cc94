"""The page at ``/``: a chat, live figures, the model's card and settings, in one self-contained document.

Style and script stand beside this module and are put inline; the content security policy allows exactly these two by
their hashes and no request to anywhere but this server. The document is the same for every model: what it shows it
asks of ``/status``.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from string import Template

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Page:
    """The document and its policy."""

    html: str
    policy: str


@functools.cache
def page() -> Page:
    """Read and put together once."""
    style, script, template = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    html = Template(template).substitute(style=style, script=script)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html, policy)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
