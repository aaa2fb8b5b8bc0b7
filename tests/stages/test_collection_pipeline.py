"""People asked about units and their answers brought back: the world's annotators as workers of both platforms."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from milan_ray import cli
from milan_ray.exemplars.masks import pack, unpack
from milan_ray.schema import ANNOTATION_STATISTICS, ANNOTATIONS, EXEMPLARS
from milan_ray.stages.annotations_collect import annotator
from milan_ray.stages.images import png
from milan_ray.storage import EXEMPLARS_KEY, Storage
from milan_ray.storage.image_blocks import write_block
from milan_ray.world.annotators import annotate_unit
from milan_ray.world.scenes import SIDE, concept_maps, make_scene, render

MODEL, K = "world/cnn", 2
LAYERS = {"conv1": (0, 1, 4), "conv2": (3,)}


def scene_of(layer: str, unit: int, rank: int) -> int:
    return 300 * (layer == "conv2") + 2 * unit + rank  # in two blocks of views


def mask_of(layer: str, unit: int) -> np.ndarray:
    """Half of the image."""
    found = np.zeros((SIDE, SIDE), bool)
    found[: SIDE // 2] = True
    return found if unit % 2 else ~found


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Exemplars and views of some units, without a network."""
    storage = Storage(tmp_path_factory.mktemp("collect") / "run")
    blocks: dict[str, dict[int, bytes]] = defaultdict(dict)
    for layer, units in LAYERS.items():
        rows = [(unit, rank, scene_of(layer, unit, rank)) for unit in units for rank in range(K)]
        columns = {
            "model": [MODEL] * len(rows),
            "layer": [layer] * len(rows),
            "unit": [unit for unit, _, _ in rows],
            "rank": [rank for _, rank, _ in rows],
            "image_id": [image for _, _, image in rows],
            "activation": [1.0] * len(rows),
            "mask": [pack(torch.from_numpy(mask_of(layer, unit))[None])[0] for unit, _, _ in rows],
        }
        meta = {"mask_height": str(SIDE), "mask_width": str(SIDE), "probe": "p", "view": "v"}
        storage.write(EXEMPLARS, EXEMPLARS.table(columns, meta), f"hash of {layer}", model=MODEL, layer=layer)
        for _, _, image in rows:
            blocks[f"{image // 256:06d}"][image] = png(render(make_scene("probe", image)))
    for block, images in blocks.items():
        write_block(storage, "v", sorted(images), [images[i] for i in sorted(images)], probe="p", view="v", block=block)
    return storage


def said(layer: str, unit: int) -> dict[str, str]:
    """Worker → what the world's annotators say of a unit."""
    size = SIDE, SIDE
    masks = unpack(pack(torch.from_numpy(np.stack([mask_of(layer, unit)] * K))), size)
    maps = [concept_maps(make_scene("probe", scene_of(layer, unit, rank))) for rank in range(K)]
    return {each.annotator: each.text for each in annotate_unit(masks, maps, f"{MODEL}/{layer}/{unit}")}


def stored_annotations(storage: Storage, source: str) -> dict[tuple[str, int, str], str]:
    found = {}
    for keys in storage.partitions(ANNOTATIONS, source=source):
        assert storage.exemplars_of(ANNOTATIONS, **keys) == storage.config_of(
            EXEMPLARS, model=MODEL, layer=keys["layer"]
        )
        for row in storage.read(ANNOTATIONS, **keys).to_pylist():
            found[row["layer"], row["unit"], row["annotator"]] = row["text"]
    return found


@pytest.fixture(scope="module")
def folder(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks, with a qualification test about one of the units."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "test.csv").write_text(
        f"model,layer,unit,right,wrong\n{MODEL},conv1,4,sky,dogs|wheels\n", encoding="utf-8"
    )
    arguments = ["--url", "https://x.org/", "--qualification", str(place / "test.csv"), "--storage", storage.root]
    assert cli.main(["annotations", "collect", MODEL, str(place / "tasks"), *arguments]) == 0
    return place / "tasks"


def test_tasks_show_each_units_exemplars_darkened_outside_the_masks(storage: Storage, folder: Path, capsys) -> None:
    with (folder / "tasks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["unit"]) for row in rows] == [("conv1", "0"), ("conv1", "1"), ("conv2", "3")]
    assert all(row["image"].startswith("https://x.org/") for row in rows)
    for row in rows:
        picture = np.asarray(Image.open(folder / row["image"].removeprefix("https://x.org/")).convert("RGB")).astype(
            int
        )
        factor = picture.shape[0] // (SIDE + 4)  # a frame of two pixels around each exemplar
        assert factor >= 2 and picture.shape[1] // factor == K * (SIDE + 2) + 2
        scene = render(make_scene("probe", scene_of(row["layer"], int(row["unit"]), 0))).astype(int)
        middle = slice(factor // 2, None, factor)
        shown = picture[middle, middle][2 : 2 + SIDE, 2 : 2 + SIDE]
        mask = mask_of(row["layer"], int(row["unit"]))
        assert abs(shown[mask] - scene[mask]).mean() < 8  # JPEG
        assert abs(shown[~mask] - scene[~mask] // 4).mean() < 8
    test = [json.loads(line)["data"] for line in (folder / "qualification.jsonl").read_text().splitlines()]
    assert (folder / test[0]["image"].removeprefix("https://x.org/")).is_file()
    for name in (
        "mturk.html",
        "label-studio.xml",
        "qualification.xml",
        "qualification-key.xml",
        "qualification-key.csv",
    ):
        assert (folder / name).is_file()
    assert len((folder / "label-studio.jsonl").read_text().splitlines()) == 3
    assert cli.main(["annotations", "collect", MODEL, str(folder), "--storage", storage.root]) == 1
    assert "exists already" in capsys.readouterr().err


def test_answers_of_mturk_become_annotations(storage: Storage, folder: Path, tmp_path: Path, capsys) -> None:
    results = tmp_path / "results.csv"
    with (folder / "tasks.csv").open(newline="") as file, results.open("w", newline="") as out:
        tasks = list(csv.DictReader(file))
        writer = csv.writer(out)
        writer.writerow(
            ["HITId", "WorkerId", "RejectionTime", *(f"Input.{name}" for name in tasks[0]), "Answer.summary"]
        )
        for task in tasks:
            for worker, text in said(task["layer"], int(task["unit"])).items():
                writer.writerow(["h", worker, "", *task.values(), f"Regions of {text.upper()} "])
            writer.writerow(["h", "idler", "Mon Mar 1", *task.values(), "good"])
        writer.writerow(["h", "terse", "", *tasks[0].values(), "once more"])
        writer.writerow(["h", "mute", "", *tasks[0].values(), " "])
    (tmp_path / "tables.json").write_text(json.dumps({"prefixes": {"regions of ": ""}}))
    arguments = ["answers", str(results), "--source", "crowd", "--tables", str(tmp_path / "tables.json")]
    assert cli.main(["annotations", *arguments, "--rouge", "--storage", storage.root]) == 0
    expected = {
        (layer, unit, annotator("crowd", worker)): text.lower()
        for layer, units in LAYERS.items()
        for unit in units
        if (layer, unit) != ("conv1", 4)
        for worker, text in said(layer, unit).items()
    }
    assert stored_annotations(storage, "crowd") == expected
    report = capsys.readouterr()
    assert "3 rejected or skipped" in report.err and "1 without a word, 1 repeated" in report.err
    assert "3 units with 3 to 3 annotations" in report.err and report.err.count("worker-") == 3
    assert not any(worker in report.err for worker in ("object-first", "idler"))
    assert "jobs.train --annotations crowd" in report.err
    absent = str(tmp_path / "absent")
    assert cli.main(["annotations", *arguments, "--bertscore", absent, "--storage", storage.root]) == 1
    assert absent in capsys.readouterr().err
    assert cli.main(["annotations", *arguments, "--rouge", "--storage", storage.root, "--keep-rejected"]) == 0
    assert "good" in stored_annotations(storage, "crowd").values()


def test_answers_of_label_studio_become_the_same_annotations(
    storage: Storage, folder: Path, tmp_path: Path, capsys
) -> None:
    exported, tested = tmp_path / "export.json", tmp_path / "test.json"
    tasks = [json.loads(line) for line in (folder / "label-studio.jsonl").read_text().splitlines()]
    numbers = {"object-first": 11, "colour-and-texture-first": 12, "terse": 13}
    for task in tasks:
        task["annotations"] = [
            {"completed_by": numbers[worker], "result": [{"from_name": "summary", "value": {"text": [text]}}]}
            for worker, text in said(task["data"]["layer"], task["data"]["unit"]).items()
        ]
    exported.write_text(json.dumps(tasks))
    (question,) = [json.loads(line) for line in (folder / "qualification.jsonl").read_text().splitlines()]
    question["annotations"] = [
        {"completed_by": who, "result": [{"from_name": "choice", "value": {"choices": [text]}}]}
        for who, text in ((11, "sky"), (12, "sky"), (13, "dogs"))
    ]
    tested.write_text(json.dumps([question]))
    arguments = ["--source", "studio", "--rouge", "--storage", storage.root]
    assert cli.main(["annotations", "answers", str(exported), *arguments]) == 0
    everybody = stored_annotations(storage, "studio")
    assert everybody == {
        (layer, unit, annotator("studio", str(numbers[worker]))): text.lower()
        for layer, units in LAYERS.items()
        for unit in units
        if (layer, unit) != ("conv1", 4)
        for worker, text in said(layer, unit).items()
    }
    passed = ["--qualification", str(tested), "--key", str(folder / "qualification-key.csv")]
    assert cli.main(["annotations", "answers", str(exported), *arguments, *passed]) == 0
    failed = annotator("studio", "13")
    assert stored_annotations(storage, "studio") == {key: text for key, text in everybody.items() if key[2] != failed}
    out = capsys.readouterr()
    assert "2 people passed" in out.err and "3 of workers who did not pass" in out.err
    assert cli.main(["annotations", "answers", str(exported), *arguments, *passed[:2]]) == 1
    assert "go together" in capsys.readouterr().err


def test_answers_about_other_exemplars_are_refused(storage: Storage, folder: Path, tmp_path: Path, capsys) -> None:
    task = json.loads((folder / "label-studio.jsonl").read_text().splitlines()[0])
    task["data"]["exemplars"] = "of yesterday"
    task["annotations"] = [{"completed_by": 1, "result": [{"from_name": "summary", "value": {"text": ["dogs"]}}]}]
    (tmp_path / "export.jsonl").write_text(json.dumps(task))
    arguments = ["answers", str(tmp_path / "export.jsonl"), "--source", "late", "--storage", storage.root]
    assert cli.main(["annotations", *arguments]) == 1
    assert "speak of other exemplars" in capsys.readouterr().err
    assert storage.partitions(ANNOTATIONS, source="late") == []


def test_statistics_of_stored_annotations_and_of_a_file(tmp_path: Path, capsys) -> None:
    storage = Storage(tmp_path / "run")
    for layer, texts in {"layer10": ["dogs", "two dogs, cats"], "layer2": ["red stripes", "stripes"]}.items():
        keys = {"source": "people", "model": "net", "layer": layer}
        columns: dict[str, object] = {name: [value] * 2 for name, value in keys.items()}
        table = ANNOTATIONS.table(
            columns | {"unit": [0, 0], "annotator": ["a", "b"], "text": texts}, {EXEMPLARS_KEY: "e"}
        )
        storage.write(ANNOTATIONS, table, layer, **keys)
    assert (
        cli.main(
            ["annotations", "statistics", "--rouge", "--language", str(blank(tmp_path)), "--storage", storage.root]
        )
        == 0
    )
    rows = pl.DataFrame(pl.from_arrow(storage.read(ANNOTATION_STATISTICS, source="people")))
    assert rows.select("model", "layer", "units", "texts", "words", "length").rows() == [
        ("net", "layer2", 1, 2, 2, 1.5),
        ("net", "layer10", 1, 2, 3, 2.0),
        ("net", "", 2, 4, 5, 1.75),
        ("", "", 2, 4, 5, 1.75),
    ]
    assert rows["noun"].is_null().all()
    assert rows["agreement"].to_list() == pytest.approx([2 / 3, 0, 1 / 3, 1 / 3])
    arguments = ["annotations", "statistics", "--rouge", "--language", str(blank(tmp_path)), "--storage", storage.root]
    assert cli.main(arguments) == 0
    assert "statistics of people: up to date" in capsys.readouterr().err
    (tmp_path / "notes.csv").write_text("layer,unit,summary\n0,1,dogs\n0,1,a dog\n")
    assert cli.main([*arguments, str(tmp_path / "notes.csv"), "--model", "their net"]) == 0
    file = pl.DataFrame(pl.from_arrow(storage.read(ANNOTATION_STATISTICS, source="notes")))
    assert file["model"].to_list() == ["their net", "their net", ""]
    assert cli.main([*arguments, "--source", "peopel"]) == 1
    assert "nearest: people" in capsys.readouterr().err


def blank(folder: Path) -> Path:
    """A spaCy pipeline that only tokenizes."""
    import spacy

    path = folder / "blank"
    if not path.exists():
        spacy.blank("en").to_disk(path)
    return path


@pytest.mark.slow
def test_parity_statistics_of_real_annotations_are_table_5(shared: Path, tmp_path: Path) -> None:
    file = shared / "data/annotations/milannotations_resnet152_imagenet.csv"
    language, run = str(shared / "data/text/en_ud_ewt_sm"), str(tmp_path / "run")
    arguments = [
        "statistics",
        str(file),
        "--rouge",
        "--model",
        "resnet152/imagenet",
        "--language",
        language,
        "--storage",
        run,
    ]
    assert cli.main(["annotations", *arguments, "--source", "people"]) == 0
    rows = pl.DataFrame(pl.from_arrow(Storage(run).read(ANNOTATION_STATISTICS, source="people")))
    found = {row["layer"]: row for row in rows.filter(pl.col("layer") != "").iter_rows(named=True)}
    for layer, (words, length) in {
        "conv1": (285, 4.7),
        "layer1": (653, 5.5),
        "layer2": (936, 5.1),
        "layer3": (1222, 4.2),
        "layer4": (1728, 4.6),
    }.items():
        assert found[layer]["words"] == pytest.approx(words, rel=0.03)
        assert round(found[layer]["length"], 2) == pytest.approx(length, abs=0.05 + 1e-9)
    whole = rows.filter(model="resnet152/imagenet", layer="").row(0, named=True)
    assert (whole["units"], whole["texts"]) == (3904, 11712)
    assert 0 < whole["low"] < whole["agreement"] < whole["high"] < 1
