"""What all pages are written with: names of files, figures for people, templates, scripts that carry data."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"

ASSETS = ("report.css", "report.js", "browse.js", "unit.js", "difference.js")
"""Files beside the overview that all pages share."""

_DIGITS = 6

Row = dict[str, Any]


class Pages:
    """Renders templates, everything escaped.

    Args:
        shared: What every template may use.
    """

    def __init__(self, **shared: Any) -> None:
        self._shared = shared
        self._env = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._env.filters["num"] = number

    def write(self, template: str, path: Path, *, root: str, **context: Any) -> None:
        """Writes a page.

        Args:
            template: File name of its template.
            path: Where to.
            root: The way from it to the report's folder: empty, or with a slash at its end.
            **context: What the template shows.
        """
        html = self._env.get_template(template).render(root=root, **self._shared, **context)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")


def slug(name: str) -> str:
    """A file name for any model or layer name: readable, portable, and another one for every other name.

    The digest keeps names apart that differ in letter case (file systems may not) or in odd characters only.
    """
    readable = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:60]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def write_script(path: Path, function: str, *arguments: Any) -> None:
    """Writes a script that calls one function with data.

    A page opened from disk may load scripts, but can neither fetch nor import. JSON in ASCII is always a JavaScript
    expression (U+2028 is escaped); ``<`` is escaped too, so that the file may even stand inside a page.

    Args:
        path: Where to.
        function: The function's name.
        *arguments: JSON-like data; without NaN and infinity.
    """
    data = ",".join(json.dumps(a, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c") for a in arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{function}({data});\n", encoding="ascii")


def short(value: float | None) -> float | None:
    """A figure as scripts carry it: six significant digits; None for what is not finite."""
    return float(f"{value:.{_DIGITS}g}") if value is not None and math.isfinite(value) else None


def number(value: float | None) -> str:
    """A figure for people: four significant digits, a true minus sign, a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}".replace("-", "−")
