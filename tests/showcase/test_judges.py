import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from milan_ray.schema import SCORES
from milan_ray.scoring.evaluation import with_trivial_rows
from milan_ray.studies.judges.statistics import causal_drops, described_auroc, iou_shares, planted_accuracy, presence
from milan_ray.world.lexicon import NAMES
from milan_ray.world.scenes import Scene, make_scene

PLANTED = ["car", "roof", "red", "grass", "bird", "flower"]
RIGHT = ["vehicles", "the roof of a house", "red areas", "lawns", "birds", "blossoms"]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene("heldout", i) for i in range(300)]


@pytest.fixture(scope="module")
def shown(scenes: list[Scene]) -> np.ndarray:
    return presence(scenes)


def rows_of(table: pa.Table) -> dict[tuple[str, str], dict]:
    assert table.schema == SCORES.schema
    return {(row["system"], row["metric"]): row for row in pl.DataFrame(table).to_dicts()}


def columns(concepts: list[str]) -> list[int]:
    return [NAMES.index(concept) for concept in concepts]


def test_planted_accuracy_counts_synonyms_and_only_the_right_concept() -> None:
    rows = rows_of(planted_accuracy("planted", PLANTED, with_trivial_rows({"milan": RIGHT}, "shapes")))
    assert rows["milan", "planted-accuracy"]["value"] == 1
    assert rows["shuffled", "planted-accuracy"]["value"] == 0
    assert rows["constant", "planted-accuracy"]["value"] == 0
    half = rows_of(planted_accuracy("planted", PLANTED, {"half": [*RIGHT[:3], "shapes", "", "cars"]}))
    row = half["half", "planted-accuracy"]
    assert (row["value"], row["n"]) == (0.5, 6)
    assert row["low"] < 0.5 < row["high"]


def test_presence_marks_what_concept_maps_hold(scenes: list[Scene], shown: np.ndarray) -> None:
    assert shown.shape == (300, len(NAMES))
    assert shown[np.arange(300), [NAMES.index(scene.label) for scene in scenes]].all()


def test_described_auroc_of_units_that_are_their_concepts_is_one(shown: np.ndarray) -> None:
    activations = shown[:, columns(PLANTED)] + np.random.default_rng(0).uniform(0, 0.5, (300, len(PLANTED)))
    rows = rows_of(described_auroc("auroc", activations, shown, with_trivial_rows({"milan": RIGHT}, "shapes")))
    # "the roof of a house" names two concepts; houses have roofs, so both hold in the same scenes.
    assert rows["milan", "auroc"]["value"] == pytest.approx(1)
    assert rows["milan", "auroc-all-present"]["value"] == pytest.approx(1)
    assert rows["constant", "auroc"]["value"] == rows["constant", "auroc-all-present"]["value"] == 0.5
    assert rows["shuffled", "auroc"]["value"] < 0.7
    assert rows["milan − shuffled", "auroc"]["low"] > 0


def test_described_auroc_several_concepts_are_averaged_or_all_required(shown: np.ndarray) -> None:
    car, grass = shown[:, columns(["car", "grass"])].T
    unit = (car & grass).astype(float)[:, None]
    rows = rows_of(described_auroc("auroc", unit, shown, {"milan": ["cars on grass"]}))
    # Firing only on both: never outside, and on a share of the scenes with each.
    singles = [0.5 + 0.5 * unit[c, 0].mean() for c in (car, grass)]
    assert rows["milan", "auroc"]["value"] == pytest.approx(np.mean(singles))
    assert rows["milan", "auroc-all-present"]["value"] == 1


def test_described_auroc_without_information_is_one_half(shown: np.ndarray) -> None:
    # A dead unit, a description that names nothing, and a concept that every scene shows.
    activations = np.stack([np.ones(300), np.arange(300), np.arange(300)], 1)
    everywhere = shown.copy()
    everywhere[:, NAMES.index("grass")] = True
    rows = rows_of(described_auroc("auroc", activations, everywhere, {"milan": ["cars", "shapes", "grass"]}))
    assert rows["milan", "auroc"]["value"] == rows["milan", "auroc-all-present"]["value"] == 0.5


def redness_and_greenness(images: np.ndarray) -> np.ndarray:
    """Two units that see one colour each, and a dead one: the largest lead of a channel over the other two."""
    pixels = images.astype(np.float32)
    leads = [pixels[..., c] - np.delete(pixels, c, -1).max(-1) for c in (0, 1)]
    return np.stack([*(lead.reshape(len(images), -1).max(1) for lead in leads), np.zeros(len(images))], 1)


def test_causal_drops_only_what_drives_the_unit_makes_it_fall(scenes: list[Scene]) -> None:
    systems = {"milan": ["red areas", "green areas", "cars"], "shuffled": ["green areas", "red areas", "cars"]}
    rows = rows_of(causal_drops("causal", redness_and_greenness, scenes, systems, pairs=8))
    drop = rows["milan", "causal-drop"]
    assert drop["value"] > 0.5 > rows["shuffled", "causal-drop"]["value"]
    assert rows["milan", "causal-share"]["value"] == pytest.approx(2 / 3)  # a dead unit never falls
    assert drop["n"] == 3


def test_causal_drops_nothing_to_take_out_is_no_drop(scenes: list[Scene]) -> None:
    rows = rows_of(causal_drops("causal", redness_and_greenness, scenes[:5], {"milan": ["shapes", "", "dark areas"]}))
    assert rows["milan", "causal-drop"]["value"] == rows["milan", "causal-share"]["value"] == 0


def test_iou_shares_counts_strictly_above() -> None:
    rows = rows_of(iou_shares("iou", {"trained": np.array([0.04, 0.05, 0.5, 0.6]), "random-weights": np.zeros(3)}))
    assert rows["trained", "iou>.04"]["value"] == 0.75
    assert (rows["random-weights", "iou>.04"]["value"], rows["random-weights", "iou>.04"]["n"]) == (0, 3)


def test_judges_missing_descriptions_are_refused(shown: np.ndarray) -> None:
    with pytest.raises(ValueError, match="5 descriptions for 6 units"):
        planted_accuracy("planted", PLANTED, {"milan": RIGHT[:5]})
    with pytest.raises(ValueError, match="2 descriptions for 1 units"):
        described_auroc("auroc", np.zeros((300, 1)), shown, {"milan": ["a", "b"]})
