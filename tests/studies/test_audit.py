"""Auditing through the command line, and its page in the report."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from milan_ray import cli
from milan_ray.damaged import LeftOut
from milan_ray.report.audits import audits
from milan_ray.report.figures import figure_path
from milan_ray.report.layers import Sources, layer_folder
from milan_ray.report.pages import Pages
from milan_ray.schema import AUDITED, AUDITS, DESCRIPTIONS, EXEMPLARS, MANIFEST, SCORES
from milan_ray.storage import Storage

SAID = {
    "net/plain": ("Human faces", "a head", "stripes", "mouths", "<b>eyes</b>"),
    "net/plain-blurred": ("faces", "stripes", "stripes", "headlights", "sky"),
    "new/plain": ("noses", "sky", "sky", "sky", "sky"),
    "new/plain-blurred": ("sky", "sky", "sky", "sky", "sky"),
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(tmp_path / "run")
    manifest = {"image_id": [0], "root": ["/photos"], "path": ["a.jpg"]}
    table = MANIFEST.table({column.name: manifest.get(column.name, [None]) for column in MANIFEST.columns})
    storage.write(MANIFEST, table, "m", probe="p")
    for model, texts in SAID.items():
        describe(storage, model, texts)
    return storage


def describe(
    storage: Storage, model: str, texts: tuple[str, ...], probe: str = "p", stamp: str = "e", layer: str = "conv1"
) -> None:
    keys = {"model": model, "layer": layer}
    rows = [
        {"labeler": "milan", **keys, "unit": u, "description": t, "score": 0.0, "n_best": []}
        for u, t in enumerate(texts)
    ]
    table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
    storage.write(DESCRIPTIONS, table, "".join(texts), labeler="milan", **keys)
    seen = {"unit": 0, "rank": 0, "image_id": 0, "activation": 1.0, "mask": b"\1", **keys}
    storage.write(
        EXEMPLARS, EXEMPLARS.table({c.name: [seen[c.name]] for c in EXEMPLARS.columns}, {"probe": probe}), stamp, **keys
    )


def audit(storage: Storage, *arguments: str) -> int:
    return cli.main(["audit", "--storage", storage.root, "--no-report", *arguments])


def test_features_are_counted_where_every_network_has_them(storage: Storage, capsys) -> None:
    for model in SAID:
        describe(storage, model, ("faces",), layer="conv1#both")
    describe(storage, "net/plain", ("faces",) * 9, layer="conv1#own")
    assert audit(storage) == 0
    assert "left out conv1#own, features that not every network has" in capsys.readouterr().err
    pairs = read(storage, AUDITS).select("model", "units", "of", "other_units", "other_of")
    assert pairs.rows() == [("net/plain", 5, 6, 2, 6), ("new/plain", 2, 6, 1, 6)]


def read(storage: Storage, table) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(storage.read(table, audit="faces")))


def test_audit_counts_reviews_and_counts_again(storage: Storage, capsys, dry_run) -> None:
    assert dry_run(storage.root, "audit") == {"audits faces": "missing"}
    assert audit(storage) == 0
    out = capsys.readouterr()
    assert dry_run(storage.root, "audit") == {}
    assert "are from /photos" in out.err
    assert "5 units in 2 unblurred networks, 1 in 2 blurred ones" in out.err
    pairs = read(storage, AUDITS)
    assert pairs.select("model", "units", "of", "other_units", "other_of").rows() == [
        ("net/plain", 4, 5, 1, 5),
        ("new/plain", 1, 5, 0, 5),
    ]
    assert pairs["images"].unique().to_list() == ["/photos"]
    found = read(storage, AUDITED)
    assert found.filter(model="net/plain")["words"].to_list() == [["face"], ["head"], ["mouth"], ["eyes"]]
    for ending in ("svg", "png"):
        assert storage.exists(figure_path(storage, AUDITS, ending, audit="faces"))
    scores = storage.read(SCORES, experiment="audit: faces").to_pylist()
    assert {row["metric"] for row in scores} == {
        "units per network",
        "share of units",
        "p (signed ranks)",
        "p (signs)",
    }

    file = Path(storage.root, "audited/audit=faces/review.csv")
    with file.open(newline="") as lines:
        header, *rows = csv.reader(lines)
    assert len(rows) == 6 and all(row[header.index("card")].startswith("layers/net-plain") for row in rows[:4])
    rows[1][header.index("verdict")], rows[1][header.index("note")] = "reject", "a dog"
    rows[0][header.index("verdict")] = "accept"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([header, *rows])
    saved = file.read_bytes()
    stale = {"audits faces": "units and verdicts changed"}
    assert dry_run(storage.root, "audit") == stale
    describe(storage, "new/plain-blurred", ("sky", "a face", "sky", "sky", "sky"))
    assert audit(storage, "--query", "face") == 0
    out = capsys.readouterr()
    assert "4 units in 2 unblurred networks, 2 in 2 blurred ones" in out.err
    assert "rejected on inspection: 1; not looked at yet, and counted: 5" in out.err
    assert "2 units for 'face' in blurred networks" in out.err
    assert file.read_bytes().startswith(saved)
    with file.open(newline="") as lines:
        assert len(list(csv.reader(lines))) == 8  # the header, the six, the new one
    assert audit(storage) == 0
    assert dry_run(storage.root, "audit") == {}
    assert read(storage, AUDITED).filter(pl.col("note") == "a dog")["verdict"].to_list() == ["reject"]


def test_audit_of_other_words_pairs_and_networks(storage: Storage, capsys) -> None:
    assert audit(storage, "--words", "stripes|sky", "--pair", "net/plain", "new/plain", "--name", "stuff") == 0
    assert "1 units in 1 unblurred networks, 4 in 1 blurred ones" in capsys.readouterr().err
    assert audit(storage, "--model", "net/*") == 0
    assert "in 1 unblurred networks" in capsys.readouterr().err


def test_audit_refuses_what_it_cannot_compare(storage: Storage, capsys) -> None:
    def error(*arguments: str) -> str:
        assert audit(storage, *arguments) == 1
        return capsys.readouterr().err

    assert "holds no descriptions of absent" in error("--pair", "net/plain", "absent")
    assert "--words holds no word" in error("--words", " , ")
    assert "called NAME and NAME-masked" in error("--suffix=-masked")
    assert "give a --decoder" in error("--probe", "photos")
    describe(storage, "new/plain", SAID["new/plain"], probe="another")
    assert "were dissected on different images" in error()


def test_report_has_a_page_whose_units_lead_to_their_exemplars(storage: Storage, tmp_path: Path, capsys) -> None:
    assert audit(storage) == 0

    class Shown:  # what the page needs to know of a layer in the report
        def __init__(self, model: str) -> None:
            self.model, self.layer = model, "conv1"

    out = tmp_path / "report"
    pages = Pages(labelers=["milan"])
    layers: list[Any] = [Shown(model) for model in SAID]
    sources = Sources.find(storage, ["milan"], LeftOut("test"))
    (found,) = audits(out, pages, sources, layers)
    assert (found["unblurred"], found["blurred"]) == (5, 1)
    html = (out / found["href"]).read_text(encoding="utf-8")
    assert f'href="../../{layer_folder("net/plain", "conv1")}index.html#unit-1"' in html
    assert "&lt;b&gt;eyes" in html and "<b>eyes" not in html
    assert (out / found["href"]).with_name("figure.svg").is_file()
    assert audits(out, pages, sources, layers[1:]) == []
    describe(storage, "net/plain", ("sky",) * 5)
    assert audits(out, pages, sources, layers) == []
    assert "descriptions have changed" in capsys.readouterr().err
