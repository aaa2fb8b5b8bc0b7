"""Images drawn for people to rate, their answers, and the scores that follow, on units whose truth is built in."""

from __future__ import annotations

import csv
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from milan_ray import cli
from milan_ray.engine import references
from milan_ray.engine.references import ProbeRef
from milan_ray.exemplars.pooled import matrix
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.schema import EXEMPLARS, POOLED, RATED_SCORES, RATING_DRAWS, RATINGS
from milan_ray.scoring.rating_draws import MIXTURES, features, proposal
from milan_ray.scoring.simulation import highest
from milan_ray.stages.annotations_collect import annotator
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/flags.py")
MODEL, LAYER = "flags/watcher", "seen"
KEYS = {"labeler": "clip-dissect", "model": MODEL, "layer": LAYER}
PROBE = ["--plugin", PLUGIN, "--probe", "flags/some"]
RATES = {"anna": (0.95, 0.97), "ben": (0.8, 0.9), "cleo": (0.9, 0.99)}
"""Worker → sensitivity and specificity."""


@pytest.fixture(scope="module")
def storage(ray_session, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Five units labelled by CLIP-Dissect, with the truth for CLIP."""
    path = tmp_path_factory.mktemp("rated")
    (path / "concepts.txt").write_text("red\ngreen\nblue\nleft\n")
    command = ["label", "--model", MODEL, "--layers", LAYER, *PROBE, "--k", "3", "--batch-size", "16", "--no-report"]
    command += ["--labeler", "clip-dissect", "--clip", "flags/truth", "--concepts", str(path / "concepts.txt")]
    assert cli.main([*command, "--storage", str(path / "run")]) == 0
    return Storage(path / "run")


def collect(storage: Storage, folder: Path, *options: str, sampling: str = "importance") -> int:
    command = ["annotations", "collect", MODEL, str(folder), "--sampling", sampling, *PROBE, "--top", "0.05"]
    return cli.main([*command, "--storage", storage.root, *options])


def draws(storage: Storage) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(storage.read(RATING_DRAWS, **KEYS)))


def tasks(folder: Path) -> list[dict[str, str]]:
    with (folder / "tasks.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks") / "tasks"
    assert collect(storage, place, "--images", "150", "--url", "https://x.org/") == 0
    return place


def pixels(image_id: int) -> np.ndarray:
    """An image of the probe."""
    probe = references.probe(ProbeRef(("flags/some",), plugins=(PLUGIN,)))
    assert not isinstance(probe, LatentProbe)
    return np.asarray(probe.read(ImageRef(image_id, "flags:", str(image_id))).image)


@cache
def shows(image_id: int, description: str) -> bool:
    """Whether an image shows the colour that a description names; ``left`` is in all of them."""
    colours = ("red", "green", "blue")
    return description == "left" or bool((pixels(image_id)[..., colours.index(description)] >= 150).any())


def rated(folder: Path, path: Path, seed: int = 0, each: int = 2) -> Path:
    """Results of Mechanical Turk: two of the three workers on each task."""
    rng = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        rows = tasks(folder)
        names = list(rows[0])
        writer.writerow([*(f"Input.{name}" for name in names), "Answer.choice", "WorkerId", "RejectionTime"])
        for row in rows:
            shown = shows(int(row["image_id"]), row["description"])
            for worker in rng.permutation(list(RATES))[:each]:
                sensitivity, specificity = RATES[worker]
                yes = rng.random() < (sensitivity if shown else 1 - specificity)
                writer.writerow([*row.values(), "yes" if yes else "no", worker, ""])
    return path


def test_draws_are_weighted_by_their_probabilities_and_leave_exemplars_out(storage: Storage, folder: Path) -> None:
    rows = draws(storage)
    table = storage.read(POOLED, model=MODEL, layer=LAYER)
    ids, activations = table["image_id"].to_numpy(), matrix(table["mean"])
    exemplars = pl.DataFrame(pl.from_arrow(storage.read(EXEMPLARS, model=MODEL, layer=LAYER)))
    assert rows.group_by("unit").len()["len"].to_list() == [150] * 5
    for unit in range(5):
        own = exemplars.filter(unit=unit)["image_id"].to_list()
        use = ~np.isin(ids, own)
        values = activations[use, unit]
        of_unit = rows.filter(unit=unit)
        place = np.searchsorted(ids[use], of_unit["image_id"].to_numpy())
        assert not set(own) & set(of_unit["image_id"].to_list())
        q = proposal(values, None, MIXTURES["importance"])
        np.testing.assert_allclose(of_unit["weight"].to_numpy(), 1 / (use.sum() * q[place]))
        np.testing.assert_allclose(of_unit["activation"].to_numpy(), values[place])
        top = highest(values, round(0.05 * use.sum()))
        np.testing.assert_array_equal(of_unit["top"].to_numpy(), top[place])
        known = np.array(of_unit["calibration"].to_list())
        np.testing.assert_allclose(known, features(values, top, None)[place])


def test_tasks_show_each_drawn_image_once_in_an_order_that_tells_nothing(storage: Storage, folder: Path) -> None:
    rows, drawn = tasks(folder), draws(storage)
    assert len(rows) == drawn.select("unit", "image_id").n_unique() < 5 * 150
    assert {(row["unit"], row["description"]) for row in rows} >= {("0", "red"), ("1", "green"), ("2", "blue")}
    assert [row["unit"] for row in rows] != sorted(row["unit"] for row in rows)
    assert all(row["draws"] == storage.config_of(RATING_DRAWS, **KEYS) for row in rows)
    row = rows[0]
    picture = Image.open(folder / row["image"].removeprefix("https://x.org/"))
    assert picture.size == (160, 160)
    expected = pixels(int(row["image_id"])).astype(int)
    assert abs(np.asarray(picture).astype(int)[5::10, 5::10] - expected).mean() < 8  # JPEG
    assert len((folder / "label-studio.jsonl").read_text().splitlines()) == len(rows)
    assert {path.name for path in folder.iterdir()} == {
        "images", "tasks.csv", "mturk.html", "label-studio.jsonl", "label-studio.xml",
    }  # fmt: skip


def test_options_of_sampling_change_the_draws(storage: Storage, tmp_path: Path, capsys) -> None:
    copy = Storage(tmp_path / "run")
    shutil.copytree(storage.root, copy.root, dirs_exist_ok=True)
    before: dict[str, pl.DataFrame] = {}
    variants: dict[str, tuple[list[str], str]] = {
        "plain": ([], "importance"),
        "uniform": ([], "uniform"),
        "judge": (["--clip", "flags/truth"], "importance"),
        "images": (["--images", "40"], "importance"),
        "seed": (["--seed", "1"], "importance"),
        "pooling": (["--pooling", "max"], "importance"),
        "top": (["--top", "0.2"], "importance"),
    }
    for name, (options, sampling) in variants.items():
        assert collect(copy, tmp_path / name, *options, sampling=sampling) == 0
        before[name] = draws(copy)
    assert (before["uniform"]["weight"] == 1).all() and before["plain"]["weight"].n_unique() > 10
    assert before["judge"]["prior"].list.len().unique().to_list() == [4]
    assert before["plain"]["prior"].list.len().unique().to_list() == [3]
    assert len(before["images"]) == 5 * 40 and len(before["plain"]) == 5 * 100
    assert before["seed"]["image_id"].to_list() != before["plain"]["image_id"].to_list()
    assert before["pooling"]["activation"].to_numpy().mean() > before["plain"]["activation"].to_numpy().mean()
    assert before["top"]["top"].to_numpy().mean() > before["plain"]["top"].to_numpy().mean()
    assert collect(copy, tmp_path / "units", "--units", "1,3", "--seed", "5") == 0
    assert {row["unit"] for row in tasks(tmp_path / "units")} == {"1", "3"}
    assert collect(copy, tmp_path / "all", "--seed", "5") == 0
    alone, among = tasks(tmp_path / "units"), tasks(tmp_path / "all")
    assert {(row["unit"], row["image_id"]) for row in alone} == {
        (row["unit"], row["image_id"]) for row in among if row["unit"] in "13"
    }
    assert collect(copy, tmp_path / "few", "--images", "5") == 1
    assert collect(copy, tmp_path / "whose", "--labeler", "milan") == 1
    assert cli.main(["annotations", "collect", MODEL, str(tmp_path / "x"), "--storage", copy.root, "--seed", "1"]) == 1
    assert (
        cli.main(
            ["annotations", "collect", MODEL, str(tmp_path / "x"), "--storage", copy.root, "--sampling", "uniform"]
        )
        == 1
    )
    assert collect(copy, tmp_path / "x", "--qualification", "q.csv") == 1
    assert collect(copy, tmp_path / "x", "--actors", "1") == 1
    said = capsys.readouterr().err
    for sentence in (
        "needs at least 20 images", "no descriptions of flags/watcher by milan", "without --sampling --seed would do",
        "give the probe of the exemplars", "with --sampling --qualification would do", "without --clip --actors would",
    ):  # fmt: skip
        assert sentence in said


def scores(storage: Storage, source: str) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(storage.read(RATED_SCORES, source=source)))


def test_ratings_become_scores_near_the_truth_with_intervals(
    storage: Storage, folder: Path, tmp_path: Path, capsys
) -> None:
    results = rated(folder, tmp_path / "results.csv")
    assert cli.main(["annotations", "answers", str(results), "--source", "crowd", "--storage", storage.root]) == 0
    said = capsys.readouterr().err
    found = scores(storage, "crowd")
    assert len(found) == 5 * 5 and set(found["draws"].to_list()) == {150}
    table = storage.read(POOLED, model=MODEL, layer=LAYER)
    ids, activations = table["image_id"].to_numpy(), matrix(table["mean"])
    exemplars = pl.DataFrame(pl.from_arrow(storage.read(EXEMPLARS, model=MODEL, layer=LAYER)))
    inside, distances = [], []
    for unit, text in found.select("unit", "description").unique().iter_rows():
        use = ~np.isin(ids, exemplars.filter(unit=unit)["image_id"].to_list())
        shown = np.array([shows(image, text) for image in ids[use].tolist()])
        top = highest(activations[use, unit], round(0.05 * use.sum()))
        true = {
            "correlation": np.corrcoef(activations[use, unit], shown)[0, 1] if shown.std() else 0.0,
            "precision": (shown & top).sum() / top.sum(),
            "recall": (shown & top).sum() / shown.sum(),
            "iou": (shown & top).sum() / (shown | top).sum(),
        }
        for row in found.filter(pl.col("unit") == unit, pl.col("metric").is_in(list(true))).iter_rows(named=True):
            inside.append(row["low"] - 1e-6 <= true[row["metric"]] <= row["high"] + 1e-6)
            distances.append(abs(row["value"] - true[row["metric"]]))
    assert np.mean(inside) >= 0.8 and max(distances) < 0.2 and np.mean(distances) < 0.05
    meta = storage.metadata(RATED_SCORES, source="crowd") or {}
    rates = json.loads(meta["raters"])
    for worker, (sensitivity, specificity) in RATES.items():
        name = annotator("crowd", worker)
        assert rates[name] == pytest.approx([sensitivity, specificity], abs=0.07)
        assert name in said and worker not in said
    # The least reliable is named first.
    assert said.index(annotator("crowd", "ben")) < said.index(annotator("crowd", "anna"))
    assert "correlation" in said and "over 5 units" in said


def test_ratings_in_any_order_of_files_and_rows_give_the_same_scores(
    storage: Storage, folder: Path, tmp_path: Path
) -> None:
    lines = rated(folder, tmp_path / "all.csv").read_text().splitlines()
    header, rows = lines[0], lines[1:]
    (tmp_path / "a.csv").write_text("\n".join([header, *rows[1000:][::-1]]))
    (tmp_path / "b.csv").write_text("\n".join([header, *rows[:1000]]))
    for source, files in (("once", ["all.csv"]), ("twice", ["a.csv", "b.csv"])):
        paths = [str(tmp_path / name) for name in files]
        assert cli.main(["annotations", "answers", *paths, "--source", source, "--storage", storage.root]) == 0
    # Pseudonyms depend on the source, and raters are numbered by them: their order decides nothing but the samples.
    both = [storage.read(RATINGS, source=source).num_rows for source in ("once", "twice")]
    assert both[0] == both[1] == len(rows)
    one, other = scores(storage, "once"), scores(storage, "twice")
    assert np.abs(one["value"].to_numpy() - other["value"].to_numpy()).max() < 0.05
    stamp = storage.path(RATED_SCORES, source="twice")
    content = (Path(storage.root) / stamp).read_bytes()
    for files in (["b.csv", "a.csv"], ["all.csv"]):
        paths = [str(tmp_path / name) for name in files]
        assert cli.main(["annotations", "answers", *paths, "--source", "twice", "--storage", storage.root]) == 0
        assert (Path(storage.root) / stamp).read_bytes() == content


def test_answers_that_do_not_count_are_left_out_or_refused(
    storage: Storage, folder: Path, tmp_path: Path, capsys
) -> None:
    lines = rated(folder, tmp_path / "all.csv").read_text().splitlines()
    header, rows = lines[0], lines[1:]
    rejected = ",".join([*rows[0].split(",")[:-2], "dora", "Mon"])
    (tmp_path / "more.csv").write_text("\n".join([header, *rows, rows[5], rejected]))
    command = ["annotations", "answers", "--source", "strict", "--storage", storage.root]
    assert cli.main([*command, str(tmp_path / "more.csv")]) == 0
    assert "1 rejected or skipped" in (said := capsys.readouterr().err) and "1 repeated" in said
    assert storage.read(RATINGS, source="strict").num_rows == len(rows)
    assert cli.main([*command, str(tmp_path / "more.csv"), "--keep-rejected"]) == 0
    assert storage.read(RATINGS, source="strict").num_rows == len(rows) + 1
    some = [row for row in rows if int(row.split(",")[3]) == 0] + [row for row in rows if int(row.split(",")[3]) == 1][
        :6
    ]
    (tmp_path / "few.csv").write_text("\n".join([header, *some]))
    assert cli.main([*command, str(tmp_path / "few.csv")]) == 0
    assert set(scores(storage, "strict")["unit"].to_list()) == {0}
    assert "1 is left out" in capsys.readouterr().err
    (tmp_path / "few.csv").write_text("\n".join([header, *some[-6:]]))
    assert cli.main([*command, str(tmp_path / "few.csv")]) == 1
    for option in (["--rouge"], ["--tables", "t.json"]):
        assert cli.main([*command, str(tmp_path / "all.csv"), *option]) == 1
    digest = storage.config_of(RATING_DRAWS, **KEYS)
    (tmp_path / "old.csv").write_text("\n".join(lines).replace(digest, "of-yesterday"))
    assert cli.main([*command, str(tmp_path / "old.csv")]) == 1
    said = capsys.readouterr().err
    for sentence in ("no unit has 20 draws", "--rouge would do nothing", "of other draws"):
        assert sentence in said
