"""The comparison of labelers, on labels written by hand for an untrained network of the world, and planted ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from milan_ray.engine import references
from milan_ray.engine.planner import Plan
from milan_ray.errors import MilanError
from milan_ray.report import write_report
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, EXEMPLARS, LEVELS, MANIFEST, SCORES, VIEWS
from milan_ray.storage import EXEMPLARS_KEY, Storage
from milan_ray.studies.comparison import run as compare
from milan_ray.studies.comparison.run import find_comparison, summary
from milan_ray.studies.judges.run import in_words
from milan_ray.world.networks import planted_concepts
from milan_ray.world.probe import WorldProbe

SCENES = references.ProbeRef(("world/few",), plugins=(str(Path(__file__).parents[1] / "plugins/few_scenes.py"),))
NETWORK, LAYER = "world/resnet-random", "layer1"
UNITS = 6


def label(storage: Storage, labeler: str, model: str, layer: str, texts: Sequence[str]) -> None:
    keys = {"labeler": labeler, "model": model, "layer": layer}
    rows = [{**keys, "unit": unit, "description": text, "score": 1.0, "n_best": []} for unit, text in enumerate(texts)]
    storage.write(DESCRIPTIONS, pa.Table.from_pylist(rows, schema=DESCRIPTIONS.schema), f"{labeler}{texts}", **keys)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    found = Storage(tmp_path_factory.mktemp("compare"))
    probe = WorldProbe("probe", 4).manifest()
    found.write(MANIFEST, probe, "m", probe="p")
    sizes = {(NETWORK, LAYER): 48, ("world/planted", "planted"): len(planted_concepts)}
    for (model, layer), size in sizes.items():
        keys = {"model": model, "layer": layer}
        meta = {"probe": "p", "view": "v", "mask_height": "8", "mask_width": "8"}
        found.write(EXEMPLARS, EXEMPLARS.schema.with_metadata(meta).empty_table(), "e", **keys)
        columns = {"unit": list(range(size)), "level": [0.5] * size, "positions": [9] * size, "nonfinite": [0] * size,
                   "exact": [True] * size} | {name: [value] * size for name, value in keys.items()}  # fmt: skip
        found.write(LEVELS, LEVELS.table(columns), "l", **keys)
    label(found, "milan", NETWORK, LAYER, ["red houses", "faces", "shapes", "trees", "blue", "words"])
    label(found, "netdissect", NETWORK, LAYER, ["house", "face", "day", "tree", "blue", "none"])
    label(found, "milan", "world/planted", "planted", [f"{name} things" for name in planted_concepts])
    label(found, "netdissect", "world/planted", "planted", ["face"] * len(planted_concepts))
    notes = [{"source": "world", "model": NETWORK, "layer": LAYER, "unit": unit, "annotator": who, "text": text}
             for unit in range(UNITS) for who, text in (("a", "red houses"), ("b", "a house"))]  # fmt: skip
    table = pa.Table.from_pylist(notes, schema=ANNOTATIONS.schema.with_metadata({EXEMPLARS_KEY: "e"}))
    found.write(ANNOTATIONS, table, "a", source="world", model=NETWORK, layer=LAYER)
    return found


def test_labels_become_words_of_the_world() -> None:
    assert in_words("netdissect", "day") == "clear sky"
    assert in_words("compexp", "water or on and not blue") == "water, on top of"
    assert in_words("milan", "faces on top of cars") == "faces on top of cars"


@pytest.fixture(scope="module")
def scores(storage: Storage, ray_session: None) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(find_comparison(storage, scenes=SCENES).run(storage)))


def value(scores: pl.DataFrame, experiment: str, system: str, metric: str) -> float:
    return scores.filter(experiment=f"comparison: {experiment}", system=system, metric=metric)["value"].item()


def test_agreement_and_truth_stand_beside_trivial_rows(scores: pl.DataFrame) -> None:
    told = scores.filter(metric="rouge-l-f", experiment="comparison: annotations")
    assert {"milan", "netdissect", "constant", "shuffled", "netdissect, shuffled"} <= set(told["system"])
    assert value(scores, "annotations", "constant", "rouge-l-f") > value(scores, "annotations", "milan", "rouge-l-f")
    for metric in ("auroc", "causal-drop"):
        assert set(scores.filter(metric=metric)["system"]) >= {"milan", "netdissect", "constant", "shuffled"}
    assert 0.2 < value(scores, "held-out scenes", "milan", "auroc") < 0.8  # the network is untrained
    kinds = scores.filter(experiment="comparison: AUROC by kind of concept", system="milan")
    assert kinds["n"].sum() == UNITS


def test_planted_units_are_judged_by_kind(scores: pl.DataFrame) -> None:
    share = 1 / len(planted_concepts)
    assert value(scores, "planted units", "netdissect", "planted-accuracy") == pytest.approx(share)
    assert value(scores, "planted units named, by kind of concept", "netdissect", "face") == 1.0
    assert value(scores, "planted units named, by kind of concept", "netdissect", "colour") == 0.0
    assert value(scores, "planted units named, by kind of concept", "milan", "colour") == 1.0


def test_comparison_is_stored_with_its_figure_and_done_once(storage: Storage, scores: pl.DataFrame, capsys) -> None:
    assert {keys["experiment"] for keys in storage.partitions(SCORES)} == set(scores["experiment"]) | {
        "comparison: cost"
    }
    again = find_comparison(storage, scenes=SCENES).run(storage)
    assert "up to date" in capsys.readouterr().err
    plan = Plan.of(storage, [find_comparison(storage, scenes=SCENES)])
    assert plan.text() == "0 tables would be made, 1 are up to date; nothing was done."
    assert pl.DataFrame(pl.from_arrow(again)).sort(pl.all()).equals(scores.sort(pl.all()))
    assert "planted-accuracy" in summary(again)


def test_report_shows_the_comparison_with_its_figure(storage: Storage, scores: pl.DataFrame, tmp_path: Path) -> None:
    assert not storage.partitions(VIEWS)
    index = write_report(storage, tmp_path / "report")
    text = index.read_text(encoding="utf-8")
    assert "comparison: held-out scenes" in text
    shown = [part.split('"')[0] for part in text.split('src="figures/')[1:]]
    assert len(shown) == 1 and (index.parent / "figures" / shown[0]).read_bytes().startswith(b"<?xml")


def test_probes_of_ones_own_are_compared_by_agreement_alone(tmp_path: Path) -> None:
    found = Storage(tmp_path)
    found.write(EXEMPLARS, EXEMPLARS.schema.with_metadata({"probe": "q"}).empty_table(), "e", model="m", layer="1")
    images = {"image_id": [0], "root": ["/photos"], "path": ["a.jpg"]}
    nothing = {column.name: [None] for column in MANIFEST.columns}
    found.write(MANIFEST, MANIFEST.table(nothing | images), "m", probe="q")
    for labeler in ("b", "milan"):
        label(found, labeler, "m", "1", ["dogs", "cats"])
    plan = Plan.of(found, [find_comparison(found)])
    assert plan.steps[0].reason == "milan, b on 2 units: missing"
    scores = pl.DataFrame(pl.from_arrow(find_comparison(found).run(found)))
    assert scores.is_empty()  # nobody annotated anything, no runs are recorded: an empty table of costs
    notes = [{"source": s, "model": "m", "layer": "1", "unit": 0, "annotator": "a", "text": "dog"} for s in ("x",)]
    found.write(
        ANNOTATIONS, pa.Table.from_pylist(notes, schema=ANNOTATIONS.schema), "a", source="x", model="m", layer="1"
    )
    scores = pl.DataFrame(pl.from_arrow(find_comparison(found).run(found)))
    assert set(scores["experiment"]) == {"comparison: annotations"} and scores["n"].max() == 1
    found.write(
        ANNOTATIONS, pa.Table.from_pylist(notes, schema=ANNOTATIONS.schema), "a", source="y", model="m", layer="1"
    )
    with pytest.raises(MilanError, match="say which count with --annotations"):
        find_comparison(found).run(found)


def test_activations_are_those_of_the_units_compared(storage: Storage) -> None:
    from milan_ray.plugins import load_plugins
    from milan_ray.studies.judges.run import activations

    load_plugins()
    scenes = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    every = activations(storage, {NETWORK: [LAYER]}, np.arange(48))(scenes)
    some = activations(storage, {NETWORK: [LAYER]}, np.array([5, 0]))(scenes)
    np.testing.assert_array_equal(some, every[:, [5, 0]])
    assert compare.NAME == "comparison"
