"""A page from its template: one file with its style and its script, which asks for nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page's HTML; its content policy forbids any address, and any script but its own."""
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    page: str = (
        _environment()
        .get_template(template)
        .render(
            style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
            **values,
        )
    )
    return page


@cache
def _environment() -> Any:
    """Keeps templates compiled: compiling takes as long as all the rest of a page."""
    import jinja2

    loader = jinja2.FileSystemLoader(_FOLDER)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
