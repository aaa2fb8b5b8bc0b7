"""Every step treats features as units: those whose directions are the axes get what the units get."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from milan_ray import cli
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.labelers.dnd.labeler import DescribeAndDissect
from milan_ray.models.generators import GeneratorRef
from milan_ray.models.image_captions import ImageCaptionerRef
from milan_ray.models.image_text import ImageTextRef
from milan_ray.models.weights import read_state_dict
from milan_ray.schema import ABLATIONS, CANDIDATES, CRITERIA, DESCRIPTIONS, ENCODINGS, LEVELS, UNIT_SCORES, Table
from milan_ray.stages.captioners import save_captioner
from milan_ray.stages.dnd.config import DndConfig, SummariserRef, drawings_identity
from milan_ray.stages.dnd.stage import dnd_stages, run_dnd
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage

TESTS = Path(__file__).resolve().parents[1]
TINY, FLAGS, COLOURS = (str(TESTS / f"plugins/{name}.py") for name in ("tiny_models", "flags", "colours"))
pytestmark = pytest.mark.usefixtures("ray_session")


def axes(folder: Path, width: int) -> str:
    """A file of directions that are the axes."""
    np.save(folder / "axes.npy", np.eye(width))
    (folder / "axes.yaml").write_text("file: axes.npy\ntransposed: false\n")
    return str(folder / "axes.yaml")


def same(storage: Storage, table: Table, layer: str, within: float = 1e-5, **keys: str) -> pl.DataFrame:
    """The rows of the units, after the assertion that the features have the same."""
    frames = []
    for name in (layer, f"{layer}#axes"):
        frame = pl.DataFrame(pl.from_arrow(storage.read(table, layer=name, **keys)))
        assert set(frame["layer"]) == {name}
        frames.append(frame.drop("layer"))
    units, features = frames
    assert units.columns == features.columns and len(units) == len(features) > 0
    for column in units.columns:
        if units[column].dtype.is_float():
            np.testing.assert_allclose(units[column], features[column], rtol=1e-4, atol=within, err_msg=column)
        elif units[column].dtype != pl.List:
            assert units[column].equals(features[column]), column
    return units


def test_labels_scores_and_the_report_of_features_are_those_of_the_units(tmp_path, capsys):
    storage, concepts = Storage(tmp_path / "run"), tmp_path / "concepts.txt"
    concepts.write_text("red\ngreen\nblue\nleft\n")
    source = ["--model", "flags/watcher", "--plugin", FLAGS, "--probe", "flags", "--storage", storage.root]
    source += ["--layers", "seen", "--features", f"seen={axes(tmp_path, 5)}"]
    label = ["label", *source, "--k", "3", "--quantile", "0.95", "--batch-size", "16"]
    for labeler in ("netdissect", "compexp", "clip-dissect"):
        own = ["--concepts", str(concepts), "--clip", "flags/truth"] if labeler == "clip-dissect" else []
        assert cli.main([*label, "--labeler", labeler, *own]) == 0
        same(storage, DESCRIPTIONS, "seen", labeler=labeler, model="flags/watcher")
    score = ["score", *source, "--held-out", "0.9", "--top", "0.2", "--retrieved", "10", "--clip", "flags/truth"]
    draw = ["--generator", "flags/fields", "--images", "20", "--prompt", "a field, {}", "--labeler", "clip-dissect"]
    assert cli.main([*score, *draw]) == 0
    keys = {"labeler": "clip-dissect", "model": "flags/watcher"}
    for predictor in {found["predictor"] for found in storage.partitions(UNIT_SCORES, **keys)}:
        found = same(
            storage, UNIT_SCORES, "seen", 2e-3, predictor=predictor, **keys
        )  # last bits of means turn pairs of ranks
        assert set(found["metric"])
    again = [word for word in score if word not in ("--features", f"seen={axes(tmp_path, 5)}")]
    again[again.index("seen")] = "seen#axes"  # named alone, and without its file: no network runs
    assert cli.main([*again, "--labeler", "clip-dissect", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("0 tables would be made")
    assert cli.main(["search", "red", "--storage", storage.root, "--layers", "seen#*", "--labeler", "netdissect"]) == 0
    assert "seen#axes" in capsys.readouterr().out
    assert "seen#axes" in (tmp_path / "run/report/index.html").read_text()


def test_descriptions_of_features_are_those_of_the_units(photos, tmp_path):
    storage = Storage(tmp_path / "run")
    toy = runpy.run_path(str(TESTS / "helpers/damage.py"))["captioner"]()
    save_captioner(storage, "toy", toy, "A toy.")
    command = ["describe", "--model", "tiny/cnn", "--plugin", TINY, "--probe", str(photos), "--decoder", "toy"]
    command += ["--layers", "0", "--features", f"0={axes(tmp_path, 6)}", "--k", "3", "--storage", storage.root]
    assert cli.main([*command, "--no-report"]) == 0
    same(storage, LEVELS, "0", model="tiny/cnn")
    same(storage, DESCRIPTIONS, "0", labeler="milan", model="tiny/cnn")
    for table in (ENCODINGS, CANDIDATES):
        assert {keys["layer"] for keys in storage.partitions(table)} == {"0", "0#axes"}
    before = storage.files(DESCRIPTIONS.name)
    np.save(tmp_path / "axes.npy", np.eye(6)[::-1])  # other features, so that all that was made of them is stale
    assert cli.main([*command, "--no-report"]) == 0
    turned = [storage.read(DESCRIPTIONS, labeler="milan", model="tiny/cnn", layer=name) for name in ("0", "0#axes")]
    assert turned[0]["description"].to_pylist() == turned[1]["description"].to_pylist()[::-1]
    assert storage.files(DESCRIPTIONS.name) == before


def test_describe_and_dissect_says_of_features_what_it_says_of_the_units(tmp_path):
    storage, probe = Storage(tmp_path / "run"), ProbeRef(("colours",), plugins=(COLOURS,))
    ref = ModelRef(
        "colours/watcher", layers=("seen", "seen#axes"), plugins=(COLOURS,), features=(f"seen={axes(tmp_path, 4)}",)
    )
    config = ExemplarConfig(k=3, batch_size=16, shard_size=96, pooled=True)
    how = DndConfig(
        DescribeAndDissect("topk-squared-mean"), ImageCaptionerRef("colours/names"), SummariserRef(),
        GeneratorRef("world/painter"), ImageTextRef("colours/grid"), images=3, crops=1, drawn=2, plugins=(COLOURS,),
    )  # fmt: skip
    done = Exemplars([ref], probe, config).run(storage, Resources())
    stages = dnd_stages([ref], done.models, probe, config, how, drawings_identity(storage, how))
    assert run_dnd(storage, stages, Resources()) == {}
    same(storage, DESCRIPTIONS, "seen", labeler="dnd", model="colours/watcher")


def test_edits_of_features_are_those_of_the_units(photos, tmp_path):
    texts = ["roofs", "text on signs", "lines", "a word", "lines", "letters", "dogs", "cats"]
    results: list[tuple[pl.DataFrame, pl.DataFrame, dict[str, torch.Tensor]]] = []
    features = ["--features", f"5={axes(tmp_path, 8)}"]
    for layer, options in (("5", ["--layers", "5"]), ("5#axes", features)):
        storage = Storage(tmp_path / layer)
        columns = {"labeler": "milan", "model": "tiny/cnn", "layer": layer}
        rows = [{**columns, "unit": u, "description": t, "score": 0.0, "n_best": []} for u, t in enumerate(texts)]
        table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
        storage.write(DESCRIPTIONS, table, layer, **columns)
        out = tmp_path / "edited.safetensors"
        command = ["edit", "--model", "tiny/cnn", "--plugin", TINY, *options, "--probe", str(photos), "--no-report"]
        assert cli.main([*command, "--trials", "2", "--remove", "2", "--out", str(out), "--storage", storage.root]) == 0
        where = {"experiment": "editing", "model": "tiny/cnn"}
        frames = [pl.DataFrame(pl.from_arrow(storage.read(each, **where))) for each in (ABLATIONS, CRITERIA)]
        results.append((frames[0], frames[1].drop("layer"), read_state_dict(str(out))))
    units, axes_ = results
    assert units[0].equals(axes_[0]) and units[1].equals(axes_[1])
    changed = {name for name, tensor in units[2].items() if not torch.equal(tensor, axes_[2][name])}
    assert not changed
