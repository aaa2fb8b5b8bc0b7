"""Helpers to write pages: file names, number formats, templates, and scripts that carry data."""

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
"""Files next to the overview that all pages share."""

VERDICT_ORDER = ("nothing to describe", "unsupported", "partly", "supported")
"""Verdicts by the number that stands for them in a column, so that the highest first are the supported ones."""

VERDICT_SUFFIX = " verdict"
"""End of the key of a column of verdicts."""

_DIGITS = 6

Row = dict[str, Any]


class Pages:
    """Renders templates with autoescaping.

    Args:
        shared: Variables for all templates.
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
        self._env.globals["verdict_order"] = VERDICT_ORDER
        self._env.tests["verdict_column"] = lambda key: key.endswith(VERDICT_SUFFIX)

    def write(self, template: str, path: Path, *, root: str, **context: Any) -> None:
        """Writes a page.

        Args:
            template: File name of its template.
            path: File to write.
            root: Relative path from the page to the report's folder: empty, or with a slash at its end.
            **context: Variables of the template.
        """
        html = self._env.get_template(template).render(root=root, **self._shared, **context)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")


def slug(name: str) -> str:
    """Returns a file name for any model or layer name: readable, portable and unique.

    A digest distinguishes names that differ only in case (which some file systems ignore) or in special characters.
    """
    readable = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:60]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def write_script(path: Path, function: str, *arguments: Any) -> None:
    """Writes a script that calls one function with data.

    A page opened from disk may load scripts, but can neither fetch nor import. ASCII JSON is always a valid JavaScript
    expression (U+2028 is escaped). ``<`` is escaped too, so that the script can also be inlined in a page.

    Args:
        path: File to write.
        function: The function's name.
        *arguments: JSON-like data; without NaN and infinity.
    """
    data = ",".join(json.dumps(a, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c") for a in arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{function}({data});\n", encoding="ascii")


def short(value: float | None) -> float | None:
    """Rounds a number for scripts to six significant digits; returns None if it is not finite."""
    return float(f"{value:.{_DIGITS}g}") if value is not None and math.isfinite(value) else None


def number(value: float | None) -> str:
    """Formats a number for display: four significant digits, a typographic minus sign, a dash for none."""
    return "–" if value is None or math.isnan(value) else f"{value:.4g}".replace("-", "−")
