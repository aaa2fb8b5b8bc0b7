"""No file of the repository sends its reader to a document that is not in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]

ABSENT = re.compile(r"\b(DESIGN|REFERENCE|METHODS)(\s+§|, appendix)|RAY-" + r"NOTES|FIELD-" + r"REPORTS")
"""Names of working documents that were never part of the repository."""


def test_nothing_refers_to_documents_outside_of_the_repository():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in files.split("\0"):
        path = ROOT / name
        if path.suffix not in (".py", ".md", ".toml", ".yaml", ".html", ".js", ".css") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        found += [f"{name}: {match[0]!r}" for match in ABSENT.finditer(text)]
    assert not found, found
