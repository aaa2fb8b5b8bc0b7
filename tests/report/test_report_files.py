from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from milan_ray.errors import MilanError
from milan_ray.report import write_report
from milan_ray.report.images import mask_strip, thumbnail, write_masks
from milan_ray.report.layers import layer_folder
from milan_ray.report.pages import slug, write_script
from milan_ray.schema import ABLATIONS, DESCRIPTIONS, DIFFERENCES, EXEMPLARS, LEVELS, TRIALS, VIEWS
from milan_ray.scoring.differences import Difference, store
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


def data(path: Path) -> list[Any]:
    """What a script hands over."""
    call = path.read_text(encoding="ascii")
    assert re.fullmatch(r"milan\.[a-z]+\([^\n]*\);\n", call)
    return json.loads(f"[{call[call.index('(') + 1 : -3]}]")


def described(site: Path) -> Path:
    """The folder of the layer that has descriptions."""
    return next(folder for folder in layer_folders(site) if "zebra" in (folder / "units.js").read_text())


def cards_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("cards/*.js"), key=lambda path: int(path.stem))
    return [card for number, path in enumerate(files) for card in cards_in(path, number)]


def cards_in(path: Path, number: int) -> list[dict[str, Any]]:
    href, page, cards = data(path)
    assert page == number == int(path.stem) and path.parent.parent.as_posix().endswith(href.rstrip("/"))
    return cards


def test_report_every_link_leads_to_a_file_of_the_report(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) == 1 + 1 + 2 + 1  # overview, model, layers, difference
    for path in pages:
        for link in Page(path).links:
            parts = urlsplit(link)
            assert not parts.netloc and parts.scheme in ("", "data"), link
            if not parts.scheme and parts.path:
                assert (path.parent / unquote(parts.path)).is_file(), (path, link)


def test_report_every_file_that_data_name_is_there(site: Path) -> None:
    for folder in layer_folders(site):
        (layer,) = data(folder / "units.js")
        cards = cards_of(folder)
        assert [card["unit"] for card in cards] == layer["units"] and (site / layer["href"]) == folder
        for card in cards:
            assert (site / layer["masks"] / f"{card['unit']}.png").is_file() == bool(card["images"])
            for image in card["images"]:
                assert (site / layer["images"] / str(image // 1000) / f"{image}.jpg").is_file()
                assert (site / layer["images"] / str(image // 1000) / "names.js").is_file() == layer["named"]


def test_report_has_no_file_per_unit_but_its_masks(site: Path) -> None:
    files = [path for folder in layer_folders(site) for path in folder.rglob("*") if path.is_file()]
    others = [path for path in files if path.suffix != ".png"]
    assert len(others) == 2 * (2 + 3)  # page and index; scripts of 40, 40 and 10 or 11 cards


def test_report_hostile_text_stays_text(site: Path, hostile: str) -> None:
    for path in site.rglob("*.html"):
        page = Page(path)
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert all(list(s) == ["src", "defer"] for s in scripts)  # no inline script anywhere
        assert not any(tag in ("b", "i", "toy") and attributes for tag, attributes in page.tags)
        assert not any(attribute.startswith("on") for _, attributes in page.tags for attribute in attributes)
    for path in site.rglob("*.js"):
        if path.parent != site:
            text = path.read_text(encoding="ascii")  # U+2028 is escaped
            assert "<" not in text
    card = cards_of(described(site))[7]
    assert card["labels"][0]["text"] == hostile and card["annotations"][0][0] == hostile
    index = Page(site / "index.html").text
    assert "toy/<b>\"x\"&'y'" in index and "a <toy> run" in index and "/data/<i>.jpg" in index


def test_report_overview_shows_scores_skips_and_versions(site: Path) -> None:
    text = re.sub(r"\s+", " ", Page(site / "index.html").text)
    assert "milan 0.5 [0.4, 0.6] 0.5 [0.4, 0.6]" in text
    assert "constant 0.25 [0.15, 0.35]" in text
    assert "95 % bootstrap interval, n = 90" in text
    assert "BERTScore: without idf" in text
    assert "1 left out (1 × truncated file)" in text
    assert "milan_ray 0.1.0" in text
    assert "181 units · 89 described · 6 images shown" in text
    assert "Conv1 91 89 5 −55.6 −54.6" in text  # means of both labelers' scores: 89 of the scores −100 … −11
    assert "simulation" not in text.split("Models and layers")[1]  # on the model's page


def test_report_model_page_has_what_is_of_the_model_alone(site: Path) -> None:
    (path,) = site.glob("layers/*/index.html")
    text = re.sub(r"\s+", " ", Page(path).text)
    assert "2 layers · 181 units · 89 described · 5 distinct descriptions" in text
    assert "scores by judge: toy/" in text and "milan 0.4 [0.3, 0.5]" in text
    assert "Said most often: red thing 30, green thing 29, blue thing 28" in text
    assert "truncated file" in text and "held-out" not in text


def test_report_says_so_where_descriptions_say_nothing(sheet_storage: Storage, tmp_path: Path) -> None:
    keys = {"labeler": "milan", "model": "toy/net", "layer": "conv"}
    (keys["model"], keys["layer"]) = next((at["model"], at["layer"]) for at in sheet_storage.partitions(EXEMPLARS))
    texts = ["Nothing", "nothing.", "", " ", "dogs", "dogs", "Dogs"]
    columns = {"unit": list(range(len(texts))), "description": texts, "score": [0.5] * len(texts)}
    rest = {name: [None] * len(texts) for name in ("logp_d_given_e", "logp_d", "lam", "n_best")}
    sheet_storage.write(DESCRIPTIONS, DESCRIPTIONS.table({**columns, **rest}, **keys), "a1b2", **keys)
    write_report(sheet_storage, tmp_path / "site")
    (path,) = (tmp_path / "site").glob("layers/*/index.html")
    text = re.sub(r"\s+", " ", Page(path).text)
    assert (
        "7 described · 6 distinct descriptions · 2 units described as Nothing · 2 units with an empty description"
        in text
    )
    assert "(empty description)" in text


def test_report_dead_unit_has_no_exemplars_and_counts_nonfinite(site: Path) -> None:
    dead = cards_of(described(site))[90]
    assert dead["images"] == [] and dead["labels"] == [None, None] and dead["near"] == []
    assert dead["level"] == [None, 1000, 9, True]


def test_report_says_which_units_exemplars_tie_and_nothing_of_their_neighbours(
    sheet_storage: Storage, tmp_path: Path
) -> None:
    (keys, *_) = sheet_storage.partitions(EXEMPLARS)
    table, metadata = sheet_storage.read(EXEMPLARS, **keys), sheet_storage.metadata(EXEMPLARS, **keys) or {}
    unit = table["unit"].to_numpy()
    values = np.where(unit == 3, 0, np.where(unit == 4, 6, table["activation"].to_numpy())).astype(np.float32)
    place = table.schema.get_field_index("activation")
    table = table.set_column(place, table.schema.field(place), pa.array(values))
    metadata = {name: value for name, value in metadata.items() if not name.startswith("milan_ray.")}
    sheet_storage.write(EXEMPLARS, table.replace_schema_metadata(metadata), "a1b2", **keys)
    levels = {"unit": [2, 3, 4], "level": [1.0, 0.0, 5.0], "positions": [1000] * 3, "nonfinite": [0] * 3}
    sheet_storage.write(LEVELS, LEVELS.table({**levels, "exact": [True] * 3}, **keys), "a1b2", **keys)
    write_report(sheet_storage, tmp_path / "site")
    folder = tmp_path / "site" / layer_folder(keys["model"], keys["layer"])
    doubts = {card["unit"]: card["doubt"] for card in cards_of(folder) if card["doubt"]}
    tie = "3 images or more have the highest activation, and these are the first"
    dead = f"never active (no activation is above 0); {tie}; no activation is above the level, so masks show nothing"
    assert doubts == {3: ["exemplars tie", dead], 4: ["exemplars tie", tie]}
    for page in (folder / "index.html", folder.parent / "index.html"):
        text = re.sub(r"\s+", " ", Page(page).text)
        assert text.count("2 whose exemplars or masks mean nothing") == 1, page


def test_report_cards_hold_everything_that_is_known_of_a_unit(site: Path) -> None:
    card = cards_of(described(site))[9]
    assert card["images"] == [3, 4, 5] and card["activations"] == [109, 108, 107]
    assert card["level"] == [9.5, 1000, 0, True]
    milan, plain = card["labels"]
    assert milan["text"] == "red thing" and milan["score"] == plain["score"] - 1 == (9 * 37) % 90 - 100
    assert milan["best"] == [["red thing", -1, -5, -20], ["runner-up", -1, -5, -20]] and milan["lam"] == 0.2
    simulation, clarity = card["scores"]
    assert simulation == {
        **{"judge": "judge", "labeler": "milan", "metric": "simulation", "images": 1000},
        **{"own": 0.09, "shuffled": -0.25, "constant": None},
    }
    assert (clarity["labeler"], clarity["metric"], clarity["own"]) == ("exemplars", "clarity", 0.5)
    assert [unit for unit, _ in card["near"]] == [8, 10, 7, 11, 6, 12, 5, 13]


def test_report_scores_of_an_earlier_description_are_left_out(site: Path) -> None:
    folder = described(site)
    assert [score["metric"] for score in cards_of(folder)[5]["scores"]] == ["clarity"]
    (layer,) = data(folder / "units.js")
    simulation = layer["columns"]["judge milan simulation"]
    assert simulation["name"] == "milan: simulation (judge)"
    assert simulation["values"][4:7] == [0.04, None, 0.06] and len(simulation["values"]) == 91


def test_report_cards_have_verdicts_beside_those_of_trivial_baselines(site: Path) -> None:
    folder = described(site)
    (verdict,) = cards_of(folder)[9]["verdicts"]
    assert verdict == {
        **{"judge": "judge", "labeler": "milan", "reason": "by hand", "verdict": "partly", "q": 0.09, "p": None},
        **{"score": 0.41, "others": None, "probability": 0.81, "shuffled": "supported", "constant": "unsupported"},
    }
    assert cards_of(folder)[5]["verdicts"] == []  # it was given on an earlier description
    (layer,) = data(folder / "units.js")
    column = layer["columns"]["judge milan verdict"]
    assert column["name"] == "milan: verdict (judge)" and column["values"][:6] == [3, 2, 1, 0, 3, None]
    page = Page(folder / "index.html")
    assert ("option", {"value": "3 judge milan verdict"}) in page.tags and "nothing to describe" in page.text


def test_report_images_are_stored_once(site: Path) -> None:
    assert len(list(site.rglob("*.jpg"))) == 6
    assert len(list(site.glob("layers/*/*/masks-*/*.png"))) == 2 * 90


def test_report_masks_take_no_more_memory_for_more_units(tmp_path: Path) -> None:
    """Each row group has 2 MB of masks; a table of eight takes what one of two takes."""
    side, rows_each = 256, 256

    def pieces(groups: int) -> Iterator[pa.Table]:
        for start in range(0, groups * rows_each, rows_each):
            rank = np.arange(start, start + rows_each)
            masks = [bytes([r % 251]) * (side * side // 8) for r in rank]
            columns = {"unit": rank // 3, "rank": rank % 3, "image_id": rank, "activation": rank, "mask": masks}
            yield EXEMPLARS.table(columns | {"model": ["m"] * rows_each, "layer": ["1"] * rows_each})

    peaks = []
    for groups in (2, 8):
        storage, keys = Storage(tmp_path / f"{groups}"), {"model": "m", "layer": "1"}
        storage.write_stream(EXEMPLARS, pieces(groups), "c", {}, **keys)
        counts = {unit: min(3, groups * rows_each - 3 * unit) for unit in range(-(-groups * rows_each // 3))}
        pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            write_masks(
                storage.stream(EXEMPLARS, ["unit", "rank", "mask"], **keys),
                counts,
                (side, side),
                tmp_path / f"m{groups}",
            )
        finally:
            pa.set_memory_pool(before)
        assert len(list((tmp_path / f"m{groups}").glob("*.png"))) == len(counts)
        peaks.append(pool.max_memory())
    assert peaks[0] > rows_each * side * side // 8  # it does count
    assert peaks[1] < 1.5 * peaks[0]


def test_report_masks_that_are_the_same_are_not_drawn_again(sheet_storage: Storage, tmp_path: Path) -> None:
    write_report(sheet_storage, tmp_path / "r")
    masks = sorted((tmp_path / "r").glob("layers/*/*/masks-*/*.png"))
    masks[0].write_bytes(b"kept")
    write_report(sheet_storage, tmp_path / "r")
    assert masks[0].read_bytes() == b"kept"
    keys = sheet_storage.partitions(EXEMPLARS)[0]
    sheet_storage.write(EXEMPLARS, sheet_storage.read(EXEMPLARS, **keys), "other", **keys)
    write_report(sheet_storage, tmp_path / "r")
    assert len(sorted((tmp_path / "r").glob("layers/*/*/masks-*"))) == 2 and not all(path.exists() for path in masks)


def test_report_links_to_the_page_of_the_paper_where_there_is_one(sheet_storage: Storage, tmp_path: Path) -> None:
    assert "paper/index.html" not in write_report(sheet_storage, tmp_path).read_text()
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper/index.html").write_text("…")
    assert "paper/index.html" in Page(write_report(sheet_storage, tmp_path)).links


def test_report_shows_figures_of_experiments_with_their_models(sheet_storage: Storage, tmp_path: Path) -> None:
    model = sheet_storage.partitions(EXEMPLARS)[0]["model"]
    row = {
        "condition": "nouns",
        "trial": 0,
        "split": "test",
        "fraction": 0.5,
        "ablated": 1,
        "class": "",
        "accuracy": 0.5,
    }
    for of in (model, "another"):
        keys = {"experiment": "analysis", "model": of}
        table = ABLATIONS.table({name: [value] for name, value in {**row, "n": 1, **keys}.items()})
        sheet_storage.write(ABLATIONS, table, "c", **keys)
        sheet_storage.put(sheet_storage.path(ABLATIONS, **keys).replace("data.parquet", "figure.svg"), of.encode())
    index = write_report(sheet_storage, tmp_path / "r")
    (page,) = index.parent.glob("layers/*/index.html")
    for path, expected in ((index, "another"), (page, model)):
        (shown,) = [link for link in Page(path).links if link.endswith(".svg")]
        assert (path.parent / shown).read_text() == expected
        assert f"analysis: {expected}" in Page(path).text


def test_report_shows_the_figure_of_a_tuning(sheet_storage: Storage, tmp_path: Path) -> None:
    row = {"strategy": "rerank", "beam_size": 5, "length": 15, "lam": 0.2, "split": "validation", "metric": "bleu"}
    row |= {"value": 1.0, "low": 0.0, "high": 2.0, "n": 9, "chosen": True, "decoder": "d/1", "sweep": "a", "mu": 0.0}
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
    (page,) = index.parent.glob("differences/*/index.html")
    for path in (index, page):
        text = re.sub(r"\s+", "", Page(path).text)
        assert re.sub(r"\s+", "", hostile) in text and "all4of91of8−0.3[−0.6,0.1]0.25" in text
        assert "1of12" in text and "1inotherwords" in text
    assert page.relative_to(index.parent).as_posix() in Page(index).links
    (found,) = data(page.with_name("changes.js"))
    assert found["rows"] == [[0, 57, hostile, "dogs", ["dogs"], ["<b>"]]] and found["models"] == [model, model]
    (side,) = found["sides"][0]
    assert (index.parent / side / "units.js").is_file() and found["layers"] == ["Conv1"]

    sheet_storage.write(DIFFERENCES, sheet_storage.read(DIFFERENCES, labeler="milan", model=model, other=model), "old",
                        labeler="milan", model=model, other=model)  # fmt: skip
    assert "in other words" not in Page(write_report(sheet_storage, tmp_path / "report")).text


def test_report_from_exemplars_alone_is_a_plain_sheet(sheet_storage: Storage, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    index = write_report(sheet_storage, tmp_path / "r", progress=lambda *step: steps.append(step))
    assert index == tmp_path / "r" / "index.html"
    assert [step[:2] for step in steps] == [(0, 2), (1, 2), (2, 2)]
    folder = layer_folders(tmp_path / "r")[0]
    (layer,) = data(folder / "units.js")
    assert layer["labelers"] == [] and list(layer["columns"]) == ["activation"] and not layer["named"]
    assert len(cards_of(folder)) == 90 and cards_of(folder)[0]["labels"] == []
    assert "score" not in Page(folder / "index.html").text and "score" not in Page(index).text


def test_report_written_again_replaces_pages_and_touches_nothing_else(sheet_storage: Storage, tmp_path: Path) -> None:
    out = tmp_path / "r"
    write_report(sheet_storage, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (layer_folders(out)[0] / "cards/99.js").write_text("of an earlier, longer report")
    (layer_folders(out)[0] / "2.html").write_text("a page of an earlier version")
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


def test_script_data_can_neither_end_a_script_nor_break_a_line(tmp_path: Path) -> None:
    nasty = ["</script><!--", "\u2028\u2029", "\ud800", "ü"]
    write_script(tmp_path / "a/b.js", "milan.cards", nasty, {"x": None})
    text = (tmp_path / "a/b.js").read_bytes()
    assert text.isascii() and b"<" not in text and text.count(b"\n") == 1
    assert data(tmp_path / "a/b.js") == [nasty, {"x": None}]
    with pytest.raises(ValueError, match="JSON"):
        write_script(tmp_path / "c.js", "milan.cards", float("nan"))
