"""How Sphinx builds these pages: ``make docs``. Nothing is fetched while it does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from milan_ray import __version__

project = "milan_ray"
author = "the milan_ray authors"
release = __version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"milan_ray {release}"
html_copy_source = False
# Pages of the repository outside this folder (README.md, tune_configs) are names here, and links in the repository;
# tests/test_documents.py sees that every link leads somewhere.
suppress_warnings = ["myst.xref_missing", "misc.highlighting_failure"]
