"""A torch model dissected and described in this process, beside what the jobs find."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch import nn
from toys import toy_captioner

import milan_ray
from milan_ray import cli
from milan_ray.errors import MilanError
from milan_ray.library.run_directory import RunExemplars
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.given import Features
from milan_ray.models.view import Preprocess, View
from milan_ray.stages.captioners import save_captioner
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).parent / "plugins/tiny_models.py")
PREPROCESS = Preprocess(View(resize=24, crop=24))
K = 5


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A run directory with a captioner."""
    found = Storage(tmp_path_factory.mktemp("notebook") / "run")
    save_captioner(found, "toy", toy_captioner(length=5, beam_size=6, lam=0.5), "A toy.")
    return found


@pytest.fixture(scope="module")
def milan(storage: Storage) -> milan_ray.Milan:
    return milan_ray.load("toy", storage.root, device="cpu", plugins=(PLUGIN,))


@pytest.fixture(scope="module")
def found(photos: Path) -> milan_ray.Dissection:
    return milan_ray.dissect("tiny/cnn", photos, ["0", "2"], k=K, plugins=(PLUGIN,), device="cpu")


def test_dissect_and_describe_are_what_the_job_makes(storage, milan, found, photos, capsys) -> None:
    arguments = ["describe", "--model", "tiny/cnn", "--layers", "0", "2", "--probe", str(photos), "--plugin", PLUGIN]
    arguments += ["--k", str(K), "--decoder", "toy", "--device", "cpu", "--storage", storage.root, "--no-report"]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    job = milan_ray.open_exemplars(storage.root, "tiny/cnn")
    assert isinstance(job, RunExemplars)
    here = found.describe(milan)
    for layer, unit in job.units():
        theirs, ours = job.lookup(layer, unit), found.lookup(layer, unit)
        np.testing.assert_array_equal(ours.image_ids, theirs.image_ids)
        np.testing.assert_array_equal(ours.activations, theirs.activations)
        np.testing.assert_array_equal(ours.masks, theirs.masks)
        np.testing.assert_array_equal(ours.images, theirs.images)
        assert ours.description == theirs.description
    pattern = f"{storage.root}/descriptions/labeler=milan/**/*.parquet"
    table = pl.read_parquet(pattern, hive_partitioning=False).sort("layer", "unit")
    assert found.units() == job.units() and len(here) == len(table) == 14
    assert here["score"].to_numpy() == pytest.approx(table["score"].to_numpy(), abs=1e-4)
    assert here.columns == table.columns and here.schema == table.schema


def test_dissect_tells_which_layer_has_exemplars_that_tie(photos, capsys) -> None:
    milan_ray.dissect("tiny/saturated", photos, k=K, plugins=(PLUGIN,), device="cpu")
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "mean nothing" in line]
    assert said.startswith(
        "layer '1' of tiny/saturated has 4 of 4 units whose exemplars or masks mean nothing: 1 never"
    )


def test_own_network_is_left_as_it_was(photos) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9))
    network[2].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = milan_ray.dissect(network, photos, ["1", "2"], k=3, preprocess=PREPROCESS)
    assert network.training and network[1].training and not network[2].training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    first, second = (found.exemplars.filter(layer=layer).drop("layer") for layer in ("1", "2"))
    assert found.model == "Sequential" and first.equals(second)  # dropout was off


def test_exemplars_are_a_frame_with_paths_and_levels(found, photos) -> None:
    frame = found.exemplars
    assert frame.columns == ["layer", "unit", "rank", "image", "activation", "level"]
    assert len(frame) == 14 * K and all(Path(image).is_file() for image in frame["image"])
    assert (frame["activation"] >= frame["level"]).all()
    assert frame.filter(rank=0)["activation"].min() >= frame.filter(rank=1)["activation"].min()


def test_grid_is_a_picture_of_the_exemplars(found) -> None:
    unit = found.lookup("2", 1)
    assert isinstance(unit.grid(), Image.Image) and unit.grid(limit=2).size == (2 * 26 + 2, 28)
    assert unit.images.shape == (K, 3, 24, 24) and unit.masks.shape == (K, 1, 24, 24)


def test_images_may_be_pictures_arrays_or_files(photos) -> None:
    files = sorted(photos.rglob("*.png"))[:20]
    pictures = [Image.open(file) for file in files]
    same = [np.asarray(picture.convert("RGB").resize((32, 24))) for picture in pictures]
    network = nn.Conv2d(3, 4, 3)
    lists = milan_ray.dissect(network, same, ["outputs"], k=3, preprocess=PREPROCESS)
    array = milan_ray.dissect(network, np.stack(same), ["outputs"], k=3, preprocess=PREPROCESS)
    assert lists.exemplars.equals(array.exemplars)
    images = milan_ray.dissect(network, pictures, ["outputs"], k=3, preprocess=PREPROCESS)
    assert set(images.exemplars["image"]) <= {f"memory:/{n}" for n in range(20)}


def test_unreadable_images_are_left_out_and_listed(photos, tmp_path) -> None:
    for file in sorted(photos.rglob("*.png"))[:6]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no image")
    found = milan_ray.dissect(nn.Conv2d(3, 2, 3), tmp_path, ["outputs"], preprocess=PREPROCESS)
    assert found.skipped["image"].to_list() == [str(tmp_path / "broken.png")]
    assert len(found.exemplars) == 2 * 6  # fewer images than k


def test_some_units_are_described_with_fewer_exemplars_than_k(milan, photos, tmp_path) -> None:
    for file in sorted(photos.rglob("*.png"))[:4]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = milan_ray.dissect("tiny/cnn", tmp_path, ["2"], plugins=(PLUGIN,), device="cpu")
    said = found.describe(milan, units=[3, 1], n_best=2)
    assert said["unit"].to_list() == [1, 3] and set(said["labeler"]) == {"milan"}
    assert found.lookup("2", 3).description == said["description"][1]


def test_features_are_dissected_like_layers(photos) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    bias = torch.tensor([-0.4, -1e6, 0.0])
    sparse = Dictionary(Weights(torch.eye(4)[:3], torch.eye(4)[:3], encoder_bias=bias), "relu", reconstructs=False)
    sets: dict[str, Features] = {"0#axes": np.eye(4), "0#sparse": sparse}
    found = milan_ray.dissect(network, photos, ["0"], k=3, preprocess=PREPROCESS, features=sets)
    units, axes = (found.exemplars.filter(layer=layer).drop("layer") for layer in ("0", "0#axes"))
    assert units.equals(axes) and len(units) == 12
    assert {unit for layer, unit in found.units() if layer == "0#sparse"} <= {0, 2}  # 1 never fires
    assert (found.exemplars.filter(layer="0#sparse")["activation"] > 0).all()
    alone = milan_ray.dissect("tiny/cnn", photos, k=3, plugins=(PLUGIN,), device="cpu", features={"0#axes": np.eye(6)})
    assert alone.layers == ["0#axes"]
    for wrong, said in (({"0": np.eye(4)}, "as 'layer4#sae'"), ({"0#axes": np.eye(5)}, "a layer of 5 units")):
        with pytest.raises(MilanError, match=said):
            milan_ray.dissect(network, photos, k=3, preprocess=PREPROCESS, features=wrong)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layers": None}, "layers=[…]"),
        ({"layers": ["nowhere"]}, "nowhere"),
        ({"images": "/nowhere"}, "/nowhere"),
        ({"images": []}, "no images"),
        ({"images": [np.zeros((4, 4))]}, "uint8"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments, said, photos) -> None:
    given = {"images": photos, "layers": ["outputs"], **arguments}
    with pytest.raises(MilanError, match=re.escape(said)):
        milan_ray.dissect(nn.Conv2d(3, 2, 3), preprocess=PREPROCESS, **given)


def test_unknown_layer_and_dead_unit_are_named(found, milan) -> None:
    with pytest.raises(MilanError, match="layer '9'"):
        found.lookup("9", 0)
    with pytest.raises(MilanError, match="unit 99"):
        found.lookup("0", 99)
    with pytest.raises(MilanError, match="99"):
        found.describe(milan, units=[99])


X = np.random.default_rng(3).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (X[0], r"x\[None\]"),
        (X[..., 0][0], r"x\[None\]"),
        (X.transpose(0, 3, 1, 2), r"transpose\(0, 2, 3, 1\)"),
        (np.ma.masked_equal(X, 3), "masked"),
        ([np.ma.masked_equal(X[0], 3)], "masked"),
        (Image.fromarray(X[0]), r"\[image\]"),
        (iter(X), "list"),
        (None, "NoneType"),
        (3, "int"),
        (np.uint8(3), "give a path"),
    ],
)
def test_pictures_that_can_be_meant_in_two_ways_are_refused(images, match):
    with pytest.raises(MilanError, match=match):
        milan_ray.dissect(nn.Sequential(nn.Conv2d(3, 2, 3)), images, ["0"])


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0}, {"k": 2.5}, {"k": -1}, {"quantile": 2}, {"quantile": float("nan")}, {"batch_size": 0},
        {"batch_size": -3}, {"activations": "foo"}, {"device": "tpu"}, {"device": "meta"}, {"weights": "random"},
    ],
)  # fmt: skip
def test_options_of_dissect_that_mean_nothing_are_refused(options):
    with pytest.raises(MilanError):
        milan_ray.dissect(nn.Sequential(nn.Conv2d(3, 2, 3)), X, ["0"], **options)
