"""The network in superposition: single units are mixed, its directions are known and can be read out again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.optimize import nnls

from milan_ray.errors import MilanError
from milan_ray.models.features.checkpoints import read_dictionary
from milan_ray.models.features.options import ReadingOptions
from milan_ray.models.hooks import LayerTap
from milan_ray.models.registry import get_model
from milan_ray.scoring.auroc import auroc
from milan_ray.scoring.directions import both_signs, recovered
from milan_ray.world.lexicon import CONCEPT, NAMES
from milan_ray.world.plugin import register
from milan_ray.world.scenes import concept_maps, make_scene
from milan_ray.world.superposition import (
    CHANNELS,
    SuperposedNet,
    active,
    directions,
    superposed_concepts,
    write_directions,
)
from milan_ray.world.training import (
    Recipe,
    TrainTask,
    attributes_of,
    images_of,
    planted_targets,
    superposed_task,
    train_superposed,
)

TINY = Recipe(scenes=96, epochs=2, lr=3e-3, batch_size=16)
FIRST, COUNT = 3_000_000, 400
"""Held-out scenes of this file's own."""


def shown(first: int, count: int) -> np.ndarray:
    """Which scenes show which of the network's concepts."""
    return attributes_of("heldout", first, count)[:, [NAMES.index(name) for name in superposed_concepts]].numpy() > 0


def aurocs(maps: np.ndarray, present: np.ndarray) -> np.ndarray:
    """AUROC of each unit's maximum over positions for each concept: maps (N, h, w, units)."""
    return auroc(maps.reshape(len(maps), -1, maps.shape[-1]).max(axis=1), present)


@pytest.fixture(scope="module")
def truth() -> tuple[np.ndarray, np.ndarray]:
    """Concepts at the positions of held-out scenes, (N, 16, 16, F), and which scenes show them."""
    maps = planted_targets("heldout", FIRST, COUNT, superposed_concepts).permute(0, 2, 3, 1).numpy() / np.float32(255)
    return maps, shown(FIRST, COUNT)


def test_concepts_are_more_than_channels_and_none_implies_another() -> None:
    assert len(superposed_concepts) == 27 and len(superposed_concepts) == 1.5 * CHANNELS
    assert {CONCEPT[name].kind for name in superposed_concepts} == {"object", "face", "colour", "texture", "relation"}
    both = np.zeros((27, 27))
    for index in range(300):
        maps = concept_maps(make_scene("probe", index))
        on = np.stack([maps.get(name, np.zeros((64, 64), bool)).ravel() for name in superposed_concepts]).astype(float)
        both += on @ on.T
    share = both / both.diagonal()[:, None] - np.eye(27)  # of the pixels of one concept, how many show another
    assert share.max() < 0.7


@pytest.mark.parametrize("channels", [9, 12, CHANNELS])
def test_directions_are_of_unit_length_nearly_orthogonal_and_spread_over_all_channels(channels: int) -> None:
    matrix = directions(27, channels)
    assert matrix.shape == (27, channels) and matrix.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), channels**-0.5, atol=1e-7)
    products = np.abs(matrix @ matrix.T - np.eye(27))
    drawn = np.random.RandomState(1).randint(0, 2, (27, channels)) * 2 - 1
    assert products.max() < np.abs(drawn @ drawn.T / channels - np.eye(27)).max()
    least = np.sqrt((27 - channels) / channels / 26)  # Welch's bound on the root mean square
    assert np.sqrt((products**2).sum() / 27 / 26) < 1.25 * least


def test_directions_follow_from_the_seed() -> None:
    assert np.array_equal(directions(), directions())
    assert not np.array_equal(directions(seed=0), directions(seed=1))
    assert np.array_equal(np.packbits(directions()[:3] > 0), [127, 230, 54, 254, 180, 79, 40]), "other machines differ"
    assert directions().max() == np.float32(18**-0.5)


@pytest.mark.parametrize(("features", "channels"), [(0, 4), (3, 1)])
def test_directions_refuse_sizes_that_make_no_sense(features: int, channels: int) -> None:
    with pytest.raises(ValueError, match="at least 1 of 2"):
        directions(features, channels)


def test_layer_is_the_sum_of_activations_times_directions() -> None:
    torch.manual_seed(0)
    network = SuperposedNet().eval()
    network.planted.weight.data *= 20  # so that some concepts are on, fully or partly
    images = torch.randn(2, 3, 64, 64)
    with LayerTap(network, ["planted", "superposed", "outputs"]) as tap, torch.no_grad():
        seen = tap(images)
        activations = network.activations(images)
    assert 0.1 < float((activations > 0).float().mean()) < 0.9 and float(activations.max()) == 1
    sums = torch.einsum("bfhw,fc->bchw", activations, torch.from_numpy(directions()))
    torch.testing.assert_close(seen["superposed"], sums)
    torch.testing.assert_close(activations, active(seen["planted"]))
    read = torch.einsum("bchw,fc->bfhw", sums, torch.from_numpy(directions())).amax(dim=(2, 3))
    torch.testing.assert_close(seen["outputs"], read)


def test_activations_are_zero_one_and_straight_in_between() -> None:
    logits = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0])
    assert active(logits).tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_directions_separate_concepts_that_no_unit_separates(truth: tuple[np.ndarray, np.ndarray]) -> None:
    maps, present = truth
    layer = maps @ directions()
    units = np.maximum(aurocs(layer, present), aurocs(-layer, present)).max(axis=0)
    planted = aurocs(layer @ directions().T, present).diagonal()
    assert planted.mean() >= 0.97 and units.mean() <= 0.8 and units.max() < 0.9
    assert (planted - units).min() >= 0.05


def test_pseudo_inverse_and_least_squares_give_the_concepts_back(truth: tuple[np.ndarray, np.ndarray]) -> None:
    maps, present = truth
    layer = maps @ directions().astype(float)
    inverse = layer @ np.linalg.pinv(directions())
    assert aurocs(inverse, present).diagonal().mean() >= 0.98
    flat, vectors, read = (values.reshape(-1, values.shape[-1]) for values in (maps, layer, inverse))

    def correlation(of: np.ndarray, concept: int) -> float:
        return abs(np.corrcoef(flat[:, concept], of)[0, 1])

    for concept in range(27):
        best = max(correlation(vectors[:, channel], concept) for channel in range(CHANNELS))
        assert correlation(read[:, concept], concept) > best + 0.1
    busy = np.flatnonzero((flat > 0).sum(axis=1) >= 4)[::40]
    solved = np.stack([nnls(directions().T.astype(float), vectors[row])[0] for row in busy])
    exact = np.abs(solved - flat[busy]).max(axis=1) < 1e-6
    assert len(busy) > 100 and exact.mean() >= 0.95


def test_neither_units_nor_principal_components_are_directions(truth: tuple[np.ndarray, np.ndarray]) -> None:
    vectors = (truth[0] @ directions()).reshape(-1, CHANNELS)
    components = np.linalg.eigh(np.cov(vectors.T))[1].T
    assert recovered(both_signs(np.eye(CHANNELS)), directions()) == 0
    assert recovered(both_signs(components), directions()) <= 0.1


@pytest.mark.parametrize("name", ["d.npy", "d.safetensors"])
def test_directions_are_written_as_a_matrix(name: str, tmp_path: Path) -> None:
    write_directions(tmp_path / name)
    dictionary = read_dictionary(str(tmp_path / name), ReadingOptions(width=CHANNELS))
    assert dictionary.count == 27 and np.array_equal(dictionary.directions.numpy(), directions())
    if name.endswith(".npy"):
        assert np.array_equal(np.load(tmp_path / name), directions())
        return
    with safe_open(tmp_path / name, "np") as opened:
        assert list(opened.keys()) == ["directions"] and np.array_equal(opened.get_tensor("directions"), directions())
        assert tuple(opened.metadata()["names"].split("\n")) == superposed_concepts


def test_directions_are_not_written_in_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(MilanError, match=r"\.npy or \.safetensors"):
        write_directions(tmp_path / "d.csv")


def test_training_leaves_the_directions_and_the_plugin_loads_them(tmp_path: Path) -> None:
    task = TrainTask("superposed", lambda: train_superposed(recipe=TINY), 1)
    (tmp_path / task.file).write_bytes(task.run())
    try:
        register(str(tmp_path))
        spec = get_model("world/superposed")
        network = spec.load()
        assert isinstance(network, SuperposedNet) and spec.classes == superposed_concepts
        assert spec.layers == ("planted", "superposed")
        torch.testing.assert_close(network.superposed.weight[:, :, 0, 0].T, torch.from_numpy(directions()))
        torch.testing.assert_close(network.readout.weight[:, :, 0, 0], torch.from_numpy(directions()))
        assert network(spec.prepare(images_of("probe", 0, 2))).shape == (2, 27)
    finally:
        register()
    with safe_open(tmp_path / task.file, "pt") as opened:
        assert json.loads(opened.metadata()["metrics"]).keys() == {"auroc"}
    assert superposed_task().name == "superposed"


def test_weights_are_made_by_the_demo_on_request(tmp_path: Path) -> None:
    try:
        register(str(tmp_path))
        with pytest.raises(MilanError, match=r"python -m jobs\.demo --superposed`"):
            get_model("world/superposed").load()
    finally:
        register()
