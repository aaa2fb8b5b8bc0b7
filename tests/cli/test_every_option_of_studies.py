"""Options of searches, scores, labels, studies and annotations: each has a test that fails where it is ignored.

The rows of tests/cli/test_every_option.py name them.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from milan_ray import cli
from milan_ray.annotations.layout import read_annotations, write_annotations
from milan_ray.cli import dnd
from milan_ray.labelers.dnd.summaries import Prompted
from milan_ray.models.chat import KEYS, Endpoint
from milan_ray.schema import (
    DESCRIPTIONS,
    DIFFERENCES,
    MANIFEST,
    SCORES,
    UNIT_SCORES,
)
from milan_ray.stages.dnd.stage import read_drawings
from milan_ray.storage import Storage

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
TINY, FLAGS = str(PLUGINS / "tiny_models.py"), str(PLUGINS / "flags.py")
SAID = {
    "net/a": {"conv1": ("dog faces", "a face", "red lines"), "conv2": ("red dogs", "dogs")},
    "net/b": {"conv1": ("dog legs", "a face", "blue lines"), "conv2": ("blue dogs", "cats")},
}


def describe(storage: Storage, model: str, layer: str, texts: tuple[str, ...]) -> None:
    keys = {"labeler": "milan", "model": model, "layer": layer}
    rows = [{**keys, "unit": u, "description": text, "score": 1.0, "n_best": []} for u, text in enumerate(texts)]
    table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
    storage.write(DESCRIPTIONS, table, f"d{layer}", **keys)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Two networks with descriptions."""
    storage = Storage(tmp_path_factory.mktemp("said"))
    for model, layers in SAID.items():
        for layer, texts in layers.items():
            describe(storage, model, layer, texts)
    return storage


def test_search_takes_one_word_of_several_and_so_many_units(said: Storage, capsys) -> None:
    def found(*options: str) -> list[str]:
        assert cli.main(["search", "red dog", "--storage", said.root, "--json", *options]) == 0
        return [json.loads(line)["description"] for line in capsys.readouterr().out.splitlines()]

    assert found() == ["red dogs"]
    assert len(found("--any")) == 6
    assert len(found("--any", "--top", "2")) == 2


def test_diff_compares_layers_and_prints_so_many(said: Storage, capsys) -> None:
    def shown(*options: str) -> tuple[list[str], set[str]]:
        assert cli.main(["diff", "net/a", "net/b", "--storage", said.root, *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        (keys,) = said.partitions(DIFFERENCES)
        return lines, set(said.read(DIFFERENCES, ["layer"], **keys)["layer"].to_pylist())

    plain, layers = shown()
    assert layers == {""} and not any("(conv1)" in line for line in plain)
    several, layers = shown("--by-layer")
    assert layers == {"", "conv1", "conv2"} and any("(conv1)" in line for line in several)
    few, _ = shown("--top", "1")
    assert len(few) == 2 + 1 + 1 + 1  # title, columns, a word, a line about units, a unit
    assert len(plain) > len(few)


def test_plan_divides_by_the_speed_up(capsys) -> None:
    small = ["plan", "--model", "tiny/cnn", "--plugin", TINY, "--layers", "2", "--sample", "2", "--device", "cpu"]

    def seconds(*options: str) -> float:
        assert cli.main([*small, "--images", str(10**9), "--json", *options]) == 0
        lines = json.loads(capsys.readouterr().out)["work"]
        return next(line["seconds"] for line in lines if line["what"].startswith("forward passes"))

    assert seconds() > seconds("--speed-up", "1e12") * 1e6


def test_benchmarks_read_the_photographs_given_or_refuse_them(tmp_path: Path, capsys) -> None:
    assert cli.main(["benchmark", "merge", "--short", "--photos", str(tmp_path)]) == 1
    assert f"no JPEG photographs in --photos {tmp_path}" in capsys.readouterr().err
    assert cli.main(["benchmark", "report", "--short", "--photos", str(tmp_path)]) == 1
    assert "in benchmark report --photos would do nothing: take one of effects, exemplars" in capsys.readouterr().err
    assert cli.main(["benchmark", "merge", "--short", "--minutes", "3"]) == 1
    assert "in benchmark merge --minutes would do nothing: take one of gpu" in capsys.readouterr().err
    assert cli.main(["benchmark", "merge", "--short", "--models", "3"]) == 1
    assert "in benchmark merge --models would do nothing: take one of scale" in capsys.readouterr().err
    assert cli.main(["benchmark", "merge", "--short", "--against", str(tmp_path)]) == 1
    assert "in benchmark merge --against would do nothing: take one of versions" in capsys.readouterr().err
    assert cli.main(["benchmark", "merge", "--short", "--annotations", str(tmp_path)]) == 1
    assert "in benchmark merge --annotations would do nothing" in capsys.readouterr().err


# Annotations


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A published set of a layer without images, beside images of two classes in folders and in one flat folder."""
    rng, layer = np.random.default_rng(0), tmp_path / "net/photos/conv"
    layer.mkdir(parents=True)
    np.save(layer / "masks.npy", rng.integers(0, 2, (2, 2, 1, 8, 8), dtype=np.uint8))
    np.savetxt(layer / "ids.csv", [[0, 1], [2, 3]], fmt="%i", delimiter=",")
    np.savetxt(layer / "activations.csv", [[2.0, 1.0], [2.0, 1.0]], delimiter=",")
    write_annotations(tmp_path / "net/photos/annotations.csv", [("conv", 0, "a dog"), ("conv", 1, "sky")])
    labels = []
    for number in range(4):
        for folder in ("flat", f"classes/{'ba'[number % 2]}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9), (50 * number, 0, 0)).save(tmp_path / folder / f"{number}.png")
        labels.append(f"{number}.png {'ba'[number % 2]}\n")
    (tmp_path / "labels.txt").write_text("".join(labels))
    return tmp_path / "net/photos"


@pytest.mark.parametrize("action", ["import", "merge"])
def test_annotations_get_the_images_and_classes_given(action, bare, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MILAN_DATA_DIR", str(tmp_path / "absent"))
    command = ["annotations", action, str(bare)]
    command += ["--storage", str(tmp_path / "run")] if action == "import" else []
    made = bare / "conv/images.npy"

    def reds(*options: str) -> list[int]:
        assert cli.main([*command, *options]) == 0
        return np.load(made)[:, :, 0, 0, 0].ravel().tolist()

    assert cli.main(command) == 1
    assert "name the folder of its source images" in capsys.readouterr().err
    by_class = reds("--images", str(tmp_path / "classes"))
    assert by_class == [50, 150, 0, 100]  # class a, then b
    flat = ["--images", str(tmp_path / "flat")]
    assert reds(*flat, "--labels", str(tmp_path / "labels.txt")) == by_class
    assert cli.main([*command, *flat]) == 1 or reds(*flat) != by_class
    (bare / "conv/masks.npy").rename(bare / "masks.npy")
    for file in bare.glob("conv/*"):
        if file.name not in ("images.npy", "ids.csv", "activations.csv"):
            file.unlink()
    (bare / "masks.npy").rename(bare / "conv/masks.npy")
    capsys.readouterr()
    assert cli.main([*command, *flat, "--labels", str(tmp_path / "labels.txt")]) == 1
    assert "which came with its images, --images, --labels would do nothing" in capsys.readouterr().err
    assert cli.main(command) == 0


def results(path: Path, **columns: str) -> Path:
    """Answers of two workers, of which one was rejected."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["HITId", "WorkerId", "RejectionTime", *(f"Input.{name}" for name in columns), "Answer.summary"]
        )
        writer.writerow(["h", "A", "", *columns.values(), "a dog"])
        writer.writerow(["h", "B", "Mon Mar 1", *columns.values(), "spam"])
    return path


def test_cleaning_keeps_what_was_rejected(tmp_path: Path) -> None:
    command = ["annotations", "clean", str(results(tmp_path / "raw.csv", layer="conv", unit="0"))]
    for options, texts in (([], ["a dog"]), (["--keep-rejected"], ["a dog", "spam"])):
        assert cli.main([*command, str(tmp_path / "clean.csv"), *options]) == 0
        assert [row.text for row in read_annotations(tmp_path / "clean.csv")] == texts


# Labels and scores

CLASSIFIER = """
import torch
from torch import nn
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, images):
        return self.head(self.features(images).relu()).amax((-2, -1))


view = Preprocess(View(16, 16), (0, 0, 0), (1, 1, 1))
register_model("three/classes", lambda weights: Classifier(), ("head",), view, classes=("red", "green", "blue"))
"""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, list[str]]:
    """A classifier labelled by CLIP-Dissect, and the options that say so."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "classifier.py").write_text(CLASSIFIER)
    (folder / "concepts.txt").write_text("red\ngreen\nblue\n")
    storage = Storage(folder / "run")
    options = ["--model", "three/classes", "--probe", "flags", "--clip", "flags/truth", "--storage", storage.root]
    options += ["--plugin", FLAGS, "--plugin", str(folder / "classifier.py"), "--device", "cpu"]
    concepts = ["--labeler", "clip-dissect", "--concepts", str(folder / "concepts.txt"), "--k", "3", "--no-report"]
    assert cli.main(["label", *options, *concepts]) == 0
    return storage, options


def test_scores_are_as_the_options_say(labelled, capsys) -> None:
    storage, options = labelled
    keys = {"labeler": "clip-dissect", "model": "three/classes", "layer": "head"}

    def score(*more: str, predictor: str = "flags/truth") -> dict[tuple[str, int], tuple[float, int]]:
        assert cli.main(["score", *options, *more]) == 0
        rows = storage.read(UNIT_SCORES, predictor=predictor, **keys).to_pylist()
        own = [row for row in rows if row["system"] == "own"]
        return {(row["metric"], row["unit"]): (row["value"], row["images"]) for row in own}

    def changed(*more: str) -> set[str]:
        return {place[0] for place, value in score(*more).items() if value != plain[place]}

    plain = score()
    assert changed("--top", "0.5") == {"auprc"}
    assert changed("--retrieved", "5") == {"retrieval-auc", "retrieval-mad"}
    assert "simulation" in changed("--sigmoid", "9,-0.5")
    assert not storage.partitions(UNIT_SCORES, predictor="flags/fields")
    drawn = score("--generator", "flags/fields", "--images", "3", predictor="flags/fields")
    assert {images for _, images in drawn.values()} == {120 - 3 + 3}
    more = score("--generator", "flags/fields", "--images", "4", predictor="flags/fields")
    assert {images for _, images in more.values()} == {120 - 3 + 4}
    other = score("--generator", "flags/fields", "--images", "4", "--prompt", "{} red", predictor="flags/fields")
    assert other != more
    capsys.readouterr()
    judged = ["score", *options, "--sanity"]
    assert cli.main([*judged, "--dry-run"]) == 0
    assert "scores judged: three/classes head" in capsys.readouterr().out
    assert not storage.partitions(SCORES, experiment="scores judged: three/classes head")
    assert cli.main(judged) == 0
    assert storage.partitions(SCORES, experiment="scores judged: three/classes head")
    capsys.readouterr()
    assert cli.main([*judged, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("0 tables would be made")


def test_labels_come_from_the_grid_and_the_legend_given(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        for folder, values in (("images", rng.integers(0, 256, (24, 24, 3))), ("labels", rng.integers(1, 3, (24, 24)))):
            (tmp_path / "camvid" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / "camvid" / folder / f"{number}.png")
    storage = Storage(tmp_path / "run")
    command = ["label", "--model", "tiny/cnn", "--layers", "0", "--plugin", TINY, "--storage", storage.root]
    command += [
        "--probe",
        str(tmp_path / "camvid"),
        "--labeler",
        "netdissect",
        "--k",
        "2",
        "--quantile",
        "0.6",
        "--no-report",
    ]
    keys = {"labeler": "netdissect", "model": "tiny/cnn", "layer": "0"}

    def labels(names: str, *options: str) -> list[tuple[str, float]]:
        """The best concepts of units with their scores."""
        (tmp_path / "legend.txt").write_text(names)
        assert cli.main([*command, "--legend", str(tmp_path / "legend.txt"), *options]) == 0
        rows = storage.read(DESCRIPTIONS, ["n_best"], **keys)["n_best"].to_pylist()
        return [(one["text"], one["score"]) for row in rows for one in row]

    assert cli.main(command) == 1
    assert "--legend" in capsys.readouterr().err or not (tmp_path / "run/descriptions").exists()
    plain = labels("1 sky\n2 road\n")
    assert {name for name, _ in plain} == {"sky", "road"}
    assert {name for name, _ in labels("1 sea\n2 road\n")} == {"sea", "road"}
    coarse = labels("1 sky\n2 road\n", "--grid", "3")
    assert [score for _, score in coarse] != [score for _, score in plain]


def test_exemplars_keep_the_classes_of_the_labels_given(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.new("RGB", (24, 24), (70 * number, 9, 9)).save(tmp_path / "flat" / f"{number}.png")
    (tmp_path / "labels.csv").write_text("file,label\n0.png,cat\n1.png,dog\n2.png,cat\n")
    command = ["exemplars", "--model", "tiny/cnn", "--layers", "0", "--plugin", TINY, "--k", "2", "--no-report"]
    command += ["--probe", str(tmp_path / "flat"), "--labels", str(tmp_path / "labels.csv")]
    assert cli.main([*command, "--storage", str(tmp_path / "run")]) == 0
    storage = Storage(tmp_path / "run")
    (keys,) = storage.partitions(MANIFEST)
    assert sorted(storage.read(MANIFEST, ["class_label"], **keys)["class_label"].to_pylist()) == ["cat", "cat", "dog"]


# Language models and generators

ASKED = """
import numpy as np
from milan_ray.models.generators import register_generator


class Asked:
    \"\"\"Draws red where it is asked politely, else blue.\"\"\"

    name = "asked"

    def identity(self):
        return {"asked": 1}

    def to(self, device):
        return self

    def generate(self, text, count, seed):
        images = np.zeros((count, 64, 64, 3), np.uint8)
        images[..., 0 if text.endswith("please") else 2] = 250
        return images


register_generator("asked", Asked)
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, serve_chat) -> tuple[str, list[dict[str, object]]]:
    """The address of a language model's server that answers with the same label always, and what it was asked."""
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    asked: list[dict[str, object]] = []

    def answer(request: dict[str, object]) -> dict[str, object]:
        asked.append(request)
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return {"choices": [{"message": {"content": "Label: red things."}}], "usage": usage}

    http = serve_chat(answer)
    return f"http://127.0.0.1:{http.server_port}/v1", asked


def test_dissection_asks_language_model_and_generator_as_told(server, tmp_path: Path, capsys) -> None:
    url, asked = server
    (tmp_path / "asked.py").write_text(ASKED)
    storage = Storage(tmp_path / "run")
    command = ["dnd", "--model", "colours/watcher", "--probe", "colours", "--storage", storage.root, "--no-report"]
    command += ["--plugin", str(PLUGINS / "colours.py"), "--plugin", str(tmp_path / "asked.py"), "--device", "cpu"]
    command += ["--captioner", "colours/names", "--generator", "asked", "--scoring", "mean", "--units", "0"]
    command += ["--k", "3", "--top", "2", "--crops", "0", "--drawn", "2", "--llm", url, "--llm-model", "small"]
    command += ["--llm-temperature", "0.7", "--llm-prices", "50", "500"]
    assert cli.main([*command, "--llm-per-minute", "1e9", "--prompt", "{} please"]) == 0
    assert asked and all((body["model"], body["temperature"]) == ("small", 0.7) for body in asked)
    dollars = 0.01 * len(asked)  # 100 tokens at $50 and 10 at $500 a million are a cent
    assert f"${dollars:.2f}" in capsys.readouterr().err
    keys: dict[str, Any] = {"model": "colours/watcher", "layer": "seen"}
    drawn = read_drawings(storage, "dnd", **keys)[0]
    assert all(min(one.activations) > 0 for one in drawn)
    assert cli.main([*command, "--prompt", "{} now"]) == 0
    drawn = read_drawings(storage, "dnd", **keys)[0]
    assert all(max(one.activations) == 0 for one in drawn)
    before = len(asked)
    assert cli.main([*command, "--llm-temperature", "0.8", "--llm-budget", "0"]) == 1
    assert "--llm-budget" in capsys.readouterr().err and len(asked) == before
    told = cli.build_parser().read([*command, "--llm-per-minute", "30"])
    summariser = dnd._config(told).summariser  # what it does then: tests/models/test_chat.py
    loaded = summariser.load(storage)
    assert isinstance(loaded, Prompted) and isinstance(loaded.chat, Endpoint)
    assert loaded.chat.limits.per_minute == 30
