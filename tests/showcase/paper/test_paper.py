"""All experiments together: one that fails stops no other, and what was found is kept, in tables and on a page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from milan_ray import cli
from milan_ray.config import Resources
from milan_ray.errors import MilanError
from milan_ray.schema import CLAIMS
from milan_ray.showcase import paper
from milan_ray.showcase.paper.claims import Claim, Section, evidence
from milan_ray.showcase.paper.experiment_context import ExperimentContext
from milan_ray.showcase.paper.page import stored_section, write_page
from milan_ray.storage import Storage

FIGURE = "ablations/experiment=cooking/figure.svg"
CLAIMS_MADE = (
    Claim("Soup is <b>hot</b>.", "Table 9: 90 °C", "91 °C [89, 93]", True),
    Claim("Soup is cold.", "Figure 1", "91 °C", np.float64(91) < 20, "it is hot"),  # type: ignore[arg-type]  # what comparing gives
    Claim("Soup is old.", "Section 2", "nobody knows", None),
)


def cook(context: ExperimentContext) -> Section:
    table = pl.DataFrame({"pot": ["a", "b"], "heat": [90.123456, None], "spices": [["salt", "pepper"], []]})
    return Section(
        "cooking", "Cooking (paper, Section 9)", CLAIMS_MADE, (FIGURE, "absent.svg"),
        (evidence("pots", table),), ("burnt",), ("soup <script>alert(1)</script>",),
    )  # fmt: skip


def burn(context: ExperimentContext) -> Section:
    raise MilanError("the stove is off")


def explode(context: ExperimentContext) -> Section:
    raise ZeroDivisionError("by zero")


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentContext:
    monkeypatch.setattr(paper, "EXPERIMENTS", {"burning": burn, "exploding": explode, "cooking": cook})
    storage = Storage(tmp_path / "run")
    storage.put(FIGURE, b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    return ExperimentContext(storage, Resources(), small=True)


def test_one_that_fails_stops_no_other(context, capsys):
    entries = paper.run_experiments(context, ["burning", "exploding", "cooking"])
    assert [entry.error for entry in entries] == ["the stove is off", "ZeroDivisionError: by zero", ""]
    said = capsys.readouterr().err
    assert "burning failed: the stove is off" in said and "NOT reproduced: Soup is cold." in said
    assert "in explode" in said and "in burn\n" not in said  # only what is nobody's plain sentence is shown in full
    rows = context.storage.read(CLAIMS, experiment="cooking").to_pylist()
    assert [row["reproduced"] for row in rows] == [True, False, None] and all(row["small"] for row in rows)
    assert context.storage.partitions(CLAIMS) == [{"experiment": "cooking"}]
    assert (
        stored_section(context.storage, "cooking") == entries[2] and stored_section(context.storage, "burning") is None
    )


def test_page_shows_claims_evidence_and_failures_and_asks_nobody(context, tmp_path):
    entries = paper.run_experiments(context, ["burning", "cooking"])
    page = write_page(context.storage, tmp_path / "report", entries, absent=["editing"])
    html = page.read_text(encoding="utf-8")
    assert (
        html.count('class="verdict yes"') == 2 and html.count('class="verdict no"') == 2
    )  # in the list, and its section
    assert "<b>1</b> reproduced in shape, <b>1</b> not, <b>1</b> cannot be said" in html
    for text in ("the stove is off", "Table 9: 90 °C", "91 °C [89, 93]", "it is hot", "90.12", "salt, pepper", "burnt"):
        assert text in html
    assert "Sizes of a test" in html and "Not run here yet" in html and "editing" in html
    assert html.count("<script") == 1 and "&lt;script&gt;" in html and "&lt;b&gt;hot" in html
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert not [link for link in links if "//" in link]
    figures = [link for link in links if link.endswith(".svg")]
    assert len(figures) == 1 and (page.parent / figures[0]).read_bytes() == context.storage.get(FIGURE)
    for link in links:
        if not link.startswith(("#", "data:", "../index.html")):
            assert (page.parent / link).exists()


def test_experiments_are_chosen_by_name_and_run_in_the_papers_order(context):
    assert paper.chosen([]) == ["burning", "exploding", "cooking"]
    assert paper.chosen(["cooking", "burning"]) == ["burning", "cooking"]
    with pytest.raises(MilanError, match="cooking"):
        paper.chosen(["cookin"])


def test_command_ends_with_1_where_one_failed_and_keeps_what_others_found(context, capsys, monkeypatch):
    monkeypatch.setattr(paper, "prepare", lambda context, threads: None)
    command = ["paper", "--storage", context.storage.root, "--no-report"]
    assert cli.main([*command, "--only", "cooking"]) == 0
    assert cli.main([*command, "--only", "burning"]) == 1
    assert "skipped burning: the stove is off" in capsys.readouterr().err
    html = (Path(context.storage.root) / "report/paper/index.html").read_text(encoding="utf-8")
    assert "the stove is off" in html and "91 °C [89, 93]" in html and "exploding" in html
    assert cli.main([*command, "--only", "nothing"]) == 1
    assert "unknown experiment 'nothing'" in capsys.readouterr().err
