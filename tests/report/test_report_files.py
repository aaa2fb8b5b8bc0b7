from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.experiments.differences import Difference, store
from milan_ray.report import write_report
from milan_ray.report.images import mask_strip, thumbnail
from milan_ray.report.site import slug
from milan_ray.schema import DIFFERENCES, EXEMPLARS, TRIALS, VIEWS
from milan_ray.storage import Storage


class Page(HTMLParser):
    """A page's links, tags and visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("href", "src") and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def layer_folders(site: Path) -> list[Path]:
    return sorted(path.parent for path in site.glob("layers/*/*/index.html"))


def test_report_every_link_leads_to_a_file_of_the_report(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) == 1 + 3 + 3
    for path in pages:
        for link in Page(path).links:
            parts = urlsplit(link)
            assert not parts.netloc and parts.scheme in ("", "data"), link
            if not parts.scheme and parts.path:
                assert (path.parent / unquote(parts.path)).is_file(), (path, link)


def test_report_hostile_text_stays_text(site: Path, hostile: str) -> None:
    for path in site.rglob("*.html"):
        page = Page(path)
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert all(list(s) == ["src", "defer"] for s in scripts)  # no inline script anywhere
        assert not any(tag in ("b", "i", "toy") and attributes for tag, attributes in page.tags)
    cards = Page(next(f for f in layer_folders(site) if "zebra" in (f / "units.js").read_text()) / "index.html")
    assert hostile in cards.text
    index = Page(site / "index.html").text
    assert "toy/<b>\"x\"&'y'" in index and "a <toy> run" in index and "/data/<i>.jpg" in index


def test_report_index_shows_scores_skips_and_versions(site: Path) -> None:
    text = re.sub(r"\s+", " ", Page(site / "index.html").text)
    assert "milan 0.5 [0.4, 0.6] 0.5 [0.4, 0.6]" in text
    assert "constant 0.25 [0.15, 0.35]" in text
    assert "95 % bootstrap interval, n = 90" in text
    assert "BERTScore: without idf" in text
    assert "1 left out (1 × truncated file)" in text
    assert "milan_ray 0.1.0" in text
    assert "181 units · 89 described · 6 images shown" in text


def test_report_dead_unit_says_so_and_counts_nonfinite(site: Path) -> None:
    folder = next(f for f in layer_folders(site) if "zebra" in (f / "units.js").read_text())
    text = re.sub(r"\s+", " ", Page(folder / "3.html").text)
    assert "unit 90 level η– NaN or infinite activations9 No exemplars" in text


def test_report_images_are_stored_once(site: Path) -> None:
    assert len(list(site.rglob("*.jpg"))) == 6
    assert len(list(site.rglob("masks/*.png"))) == 2 * 90


def test_report_shows_the_figure_of_a_tuning(sheet_storage: Storage, tmp_path: Path) -> None:
    row = {"strategy": "rerank", "beam_size": 5, "length": 15, "lam": 0.2, "split": "validation", "metric": "bleu"}
    row |= {"value": 1.0, "low": 0.0, "high": 2.0, "n": 9, "chosen": True, "decoder": "d/1", "sweep": "a"}
    keys, table = {"decoder": "d/1", "sweep": "a"}, TRIALS.table({name: [value] for name, value in row.items()})
    sheet_storage.write(TRIALS, table, "c", **keys)
    sheet_storage.put(str(Path(sheet_storage.path(TRIALS, **keys)).with_name("figure.svg")), b"<svg></svg>")
    index = write_report(sheet_storage, tmp_path / "report")
    (shown,) = re.findall(r'<img src="(figures/[^"]+)"', index.read_text(encoding="utf-8"))
    assert (index.parent / shown).read_bytes() == b"<svg></svg>"


def test_report_shows_what_two_networks_say_differently(sheet_storage: Storage, tmp_path: Path, hostile: str) -> None:
    model = sheet_storage.partitions(EXEMPLARS)[0]["model"]
    row = {"word": hostile, "layer": "", "units": 4, "of": 9, "other_units": 1, "other_of": 8, "difference": -0.3}
    words = pl.DataFrame([row | {"low": -0.6, "high": 0.1, "p": 0.2, "q": 0.25}])
    change = {"layer": "Conv1", "unit": 57, "description": hostile, "other_description": "dogs"}
    changes = pl.DataFrame([change | {"gained": ["dogs"], "lost": ["<b>"]}])
    store(sheet_storage, Difference(words, changes, 12, (9, 8)), "milan", model, model)
    index = write_report(sheet_storage, tmp_path / "report")
    page = Page(index)
    text = re.sub(r"\s+", "", page.text)
    assert hostile in page.text and "all4of91of8−0.3[−0.6,0.1]0.25" in text
    assert "1of12saysomethingelse,1inotherwords" in text and "dogsdogs<b>" in text
    (link, _) = [link for link in page.links if link.endswith("2.html#unit-57")]
    assert 'id="unit-57"' in (index.parent / unquote(urlsplit(link).path)).read_text(encoding="utf-8")
    assert len([1 for tag, _ in page.tags if tag == "script"]) == 1

    sheet_storage.write(DIFFERENCES, sheet_storage.read(DIFFERENCES, labeler="milan", model=model, other=model), "old",
                        labeler="milan", model=model, other=model)  # fmt: skip
    assert "say something else" not in Page(write_report(sheet_storage, tmp_path / "report")).text


def test_report_from_exemplars_alone_is_a_plain_sheet(sheet_storage: Storage, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    index = write_report(sheet_storage, tmp_path / "r", progress=lambda *step: steps.append(step))
    assert index == tmp_path / "r" / "index.html"
    assert [step[:2] for step in steps] == [(0, 2), (1, 2), (2, 2)]
    text = re.sub(r"\s+", " ", Page(layer_folders(tmp_path / "r")[0] / "index.html").text)
    assert "unit 0" in text and "score" not in text
    assert len([1 for tag, a in Page(layer_folders(tmp_path / "r")[0] / "index.html").tags if tag == "article"]) == 40


def test_report_written_again_replaces_pages_and_touches_nothing_else(sheet_storage: Storage, tmp_path: Path) -> None:
    out = tmp_path / "r"
    write_report(sheet_storage, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (layer_folders(out)[0] / "99.html").write_text("a page of an earlier, longer report")
    (out / "layers" / "mine.txt").write_text("the user's own")
    write_report(sheet_storage, out)
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert after == {**before, out / "layers" / "mine.txt": b"the user's own"}


def test_report_without_exemplars_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MilanError, match=r"holds no exemplars; run `python -m jobs\.exemplars`"):
        write_report(Storage(tmp_path / "nothing"), tmp_path / "r")


def test_report_unknown_model_names_the_nearest(sheet_storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(MilanError, match="nearest: toy/"):
        write_report(sheet_storage, tmp_path / "r", models=["toy/<b>x"])


def test_report_missing_view_fails_before_the_index(sheet_storage: Storage, tmp_path: Path) -> None:
    sheet_storage.remove(sheet_storage.path(VIEWS, probe="p1", view="toy-view", block="1").rsplit("/", 1)[0])
    with pytest.raises(MilanError, match=r"lacks 3 of the exemplars' images \(the first is image 3\)"):
        write_report(sheet_storage, tmp_path / "r")
    assert not (tmp_path / "r" / "index.html").exists()


def test_report_folder_that_is_a_file_is_one_clear_sentence(sheet_storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "r").write_text("")
    with pytest.raises(MilanError, match="could not be written"):
        write_report(sheet_storage, tmp_path / "r")


@pytest.mark.parametrize(("height", "width"), [(224, 224), (8, 16), (5, 7), (1, 1)])
def test_mask_strip_over_images_is_the_masked_image(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((3, height, width)) > 0.5
    strip = Image.open(io.BytesIO(mask_strip([np.packbits(m).tobytes() for m in masks], height, width)))
    factor = strip.width // width
    assert strip.size == (factor * width, 3 * factor * height)
    masks = masks.repeat(factor, axis=1).repeat(factor, axis=2)
    pixels = rng.integers(0, 256, (strip.height, strip.width, 3), np.uint8)
    shown = Image.alpha_composite(Image.fromarray(pixels).convert("RGBA"), strip.convert("RGBA"))
    expected = pixels * np.where(masks.reshape(strip.height, strip.width, 1), 1, 0.25)
    assert np.abs(np.asarray(shown)[..., :3] - expected).max() <= 1.5


def test_thumbnail_shrinks_large_views_and_keeps_small_ones() -> None:
    for size, expected in (((448, 224), (224, 112)), ((64, 64), (64, 64))):
        png = io.BytesIO()
        Image.new("RGB", size, (255, 0, 0)).save(png, "PNG")
        assert Image.open(io.BytesIO(thumbnail(png.getvalue()))).size == expected


@given(st.lists(st.text(), min_size=2, max_size=20, unique=True))
def test_slug_of_any_names_are_portable_and_distinct(names: list[str]) -> None:
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9.-]{1,71}", s) and s not in (".", "..") for s in slugs)
