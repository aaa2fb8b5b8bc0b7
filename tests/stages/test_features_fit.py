"""Feature sets that are fitted to a layer: any shards, held-out images, files, figures, bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef, model, probe
from milan_ray.engine.stage import run_stage
from milan_ray.errors import MilanError
from milan_ray.models.features.dictionary import Dictionary, Weights
from milan_ray.models.features.given import file_features
from milan_ray.models.features.nmf import PartSums
from milan_ray.models.features.sae import SaeConfig, SparseAutoencoder
from milan_ray.models.features.statistics import explained_variance
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.schema import FEATURES_FIT
from milan_ray.scoring.simulation import held_out
from milan_ray.stages.features_fit import FeaturesFit, FitConfig, FitJob, training
from milan_ray.stages.features_fit.output import FIT, files_of, place_of, why_written
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
KEYS = {"model": "tiny/cnn", "layer": "2"}
SMALL = SaeConfig(lr=3e-3, rows=128)
pytestmark = pytest.mark.usefixtures("ray_session")


def fit(
    root: Path, photos: Path, config: FitConfig, *, layer: str = "2", name: str = "tiny/cnn", shard: int | None = 32,
    actors: int | None = None,
) -> Storage:  # fmt: skip
    storage = Storage(root)
    job = FitJob(ModelRef(name, layers=(layer,), plugins=(PLUGIN,)), ProbeRef((str(photos),)), config)
    run_stage(FeaturesFit(job, ExemplarConfig(batch_size=16, shard_size=shard)), storage, Resources(actors=actors))
    return storage


def figures(storage: Storage, name: str, split: str = "train") -> dict[str, Any]:
    rows = storage.read(FEATURES_FIT, **KEYS, features=name).to_pylist()
    (row,) = [row for row in rows if row["split"] == split]
    return row


def dictionary(storage: Storage, name: str) -> Dictionary:
    """The set as ``--features`` reads it."""
    encoder = file_features(str(figures(storage, name)["file"])).build()
    assert isinstance(encoder, Dictionary)
    return encoder


@pytest.fixture(scope="module")
def network(photos) -> dict[str, Any]:
    """What the network does, without the package: outputs of layer 2 after its ReLU (90, 8, 6, 6), and their ids."""
    spec = model(ModelRef("tiny/cnn", layers=("2",), plugins=(PLUGIN,)))
    source = probe(ProbeRef((str(photos),)))
    assert not isinstance(source, LatentProbe)
    rows = source.manifest().to_pylist()
    views = [spec.preprocess.view(source.read(ImageRef(r["image_id"], r["root"], r["path"])).image) for r in rows]
    net = spec.load()
    assert isinstance(net, torch.nn.Sequential)
    with torch.inference_mode():
        inputs = spec.prepare(torch.from_numpy(np.stack(views)))
        names = sorted({row["class_label"] for row in rows})
        labels = torch.tensor([names.index(row["class_label"]) for row in rows])
        maps = net[:4](inputs).clone()  # its second ReLU works in place
    return {"maps": maps, "labels": labels, "head": net[4:]}


def rows_of(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def split_of(network: dict[str, Any], share: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    held = torch.from_numpy(held_out(np.arange(90), share))
    return rows_of(network["maps"][~held]), rows_of(network["maps"][held])


def test_components_are_numpys_of_the_images_that_are_not_held_out(photos, network, tmp_path):
    storage = fit(tmp_path, photos, FitConfig("pca", (3,), held_out=0.3))
    train, held = split_of(network, 0.3)
    x = train.double().numpy()
    vectors = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[2][:3]
    features = file_features(str(figures(storage, "pca-3")["file"]))
    assert (features.path, features.count, features.width) == ("2#pca-3", 3, 8)
    encoder = dictionary(storage, "pca-3")
    assert encoder.input_bias is not None
    np.testing.assert_allclose(np.abs(encoder.encoder.double().numpy() @ vectors.T), np.eye(3), atol=1e-5)
    np.testing.assert_allclose(encoder.input_bias.numpy(), x.mean(axis=0), atol=1e-5)
    for split, rows in (("train", train), ("held-out", held)):
        row = figures(storage, "pca-3", split)
        assert row["positions"] == len(rows) and row["images"] == len(rows) // 36
        assert row["explained_variance"] == pytest.approx(explained_variance(encoder, rows), abs=1e-5)
        assert row["l0"] == 3 and row["dead"] == 0 and row["k"] is None


def test_accuracy_is_that_of_the_network_with_the_reconstruction_in_the_layer(photos, network, tmp_path):
    storage = fit(tmp_path, photos, FitConfig("pca", (1, 8), held_out=0.3))
    held = torch.from_numpy(held_out(np.arange(90), 0.3))
    maps, labels = network["maps"][held], network["labels"][held]
    train = rows_of(network["maps"][~held])

    def right(rows: torch.Tensor) -> float:
        with torch.inference_mode():
            spliced = rows.unflatten(0, (len(maps), 6, 6)).permute(0, 3, 1, 2).relu()  # the ReLU follows the layer
            return float((network["head"](spliced).argmax(dim=1) == labels).double().mean())

    for name in ("pca-1", "pca-8"):
        row = figures(storage, name, "held-out")
        one = dictionary(storage, name)
        assert row["spliced_accuracy"] == pytest.approx(right(one.reconstruct(rows_of(maps))))
        assert row["accuracy"] == pytest.approx(right(rows_of(maps)))
        assert row["mean_accuracy"] == pytest.approx(right(train.mean(dim=0).expand(len(maps) * 36, -1)))
        assert figures(storage, name)["accuracy"] is None


@pytest.mark.parametrize("method", ["pca", "nmf", "topk-sae"])
def test_any_shards_fit_the_same_features_within_float_error(photos, tmp_path, method):
    config = FitConfig(method, (3,), k=2, epochs=None if method == "pca" else 2, sae=SMALL)
    one, other = fit(tmp_path / "one", photos, config), fit(tmp_path / "other", photos, config, shard=80)
    found = [dictionary(storage, f"{method}-3") for storage in (one, other)]
    torch.testing.assert_close(found[0].encoder, found[1].encoder, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_any_actors_fit_the_same_features_to_the_bit(photos, tmp_path):
    sets = []
    for actors in (None, 1, 2):
        storage = fit(tmp_path / str(actors), photos, FitConfig("pca", (3,)), actors=actors)
        sets.append(dictionary(storage, "pca-3"))
    assert torch.equal(sets[0].encoder, sets[1].encoder) and torch.equal(sets[0].encoder, sets[2].encoder)


@pytest.mark.parametrize("method", ["topk-sae", "jumprelu-sae"])
def test_autoencoders_learn_the_layer_and_are_folders_of_saelens(photos, network, tmp_path, method):
    storage = fit(tmp_path, photos, FitConfig(method, (16,), k=3, epochs=12, held_out=0.3, sae=SMALL))
    place = str(figures(storage, f"{method}-16")["file"])
    features = file_features(place)
    assert (features.path, features.count, features.rectified) == (f"2#{method}-16", 16, True)
    config = json.loads(Path(place, "cfg.json").read_text())
    assert config["architecture"] == method.removesuffix("-sae") and config["metadata"]["hook_name"] == "2"
    assert config["metadata"]["milan_ray_model"] == "tiny/cnn" and config["metadata"]["milan_ray_layer"] == "2"
    assert len(config["metadata"]["milan_ray_weights"]) == 64
    one = dictionary(storage, f"{method}-16")
    for split, rows in zip(("train", "held-out"), split_of(network, 0.3), strict=True):
        row, codes = figures(storage, f"{method}-16", split), one.encode(rows)
        assert row["l0"] == pytest.approx(float((codes > 0).sum(dim=1).double().mean()), abs=0.01)
        assert row["dead"] == pytest.approx(float((codes > 0).any(dim=0).logical_not().double().mean()))
        assert row["explained_variance"] == pytest.approx(explained_variance(one, rows), abs=1e-4)
        assert row["explained_variance"] > 0.75 and row["k"] == 3


def test_a_set_is_the_same_alone_and_beside_another_width(photos, tmp_path):
    config = FitConfig("topk-sae", (16,), k=3, epochs=2, sae=SMALL)
    alone = fit(tmp_path / "alone", photos, config)
    both = fit(tmp_path / "both", photos, replace(config, widths=(24, 16)))
    assert torch.equal(dictionary(alone, "topk-sae-16").encoder, dictionary(both, "topk-sae-16").encoder)
    assert dictionary(both, "topk-sae-24").count == 24
    named = fit(tmp_path / "both", photos, replace(config, widths=(24, 16), name="mine", seed=1))
    assert not torch.equal(dictionary(named, "mine-16").encoder, dictionary(both, "topk-sae-16").encoder)


def test_a_training_that_was_killed_goes_on_to_the_same_weights(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHUNK_BYTES", 4 * 8 * 36 * 20)  # twenty images
    monkeypatch.setattr(training, "SAVE_INTERVAL", 0.0)
    config = FitConfig("jumprelu-sae", (16, 24), k=3, epochs=3, sae=SMALL)
    whole = fit(tmp_path / "whole", photos, config)
    steps, step = 0, SparseAutoencoder.step

    def counted(self, *arguments):
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(SparseAutoencoder, "step", counted)
    stop = -1
    fit(tmp_path / "count", photos, config)
    all_steps, steps, stop = steps, 0, 2 * steps // 3
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", photos, config)
    steps, stop = 0, -1
    again = fit(tmp_path / "killed", photos, config)
    assert 0 < steps < all_steps / 2
    for name in ("jumprelu-sae-16", "jumprelu-sae-24"):
        for one, other in zip(dictionary(whole, name).buffers(), dictionary(again, name).buffers(), strict=True):
            assert torch.equal(one, other)
    assert not again.files("_work")


def test_held_out_images_change_nothing_that_is_fitted(photos, tmp_path):
    config = FitConfig("topk-sae", (16,), k=3, epochs=1, held_out=0.4, sae=SMALL)
    copied = tmp_path / "photos"
    shutil.copytree(photos, copied)
    one = fit(tmp_path / "one", copied, config)
    files = sorted(path for path in copied.rglob("*.png"))
    for number in np.flatnonzero(held_out(np.arange(90), 0.4)):
        Image.new("RGB", (32, 32), (int(number), 0, 255)).save(files[number])
    two = fit(tmp_path / "two", copied, config)
    name = "topk-sae-16"
    assert torch.equal(dictionary(one, name).encoder, dictionary(two, name).encoder)
    assert figures(one, name, "held-out")["explained_variance"] != figures(two, name, "held-out")["explained_variance"]


def test_parts_are_those_of_the_layers_outputs_with_everything_in_memory(photos, network, tmp_path):
    storage = fit(tmp_path, photos, FitConfig("nmf", (3, 5), epochs=4, held_out=0.3))
    train = split_of(network, 0.3)[0]
    for name, width in (("nmf-3", 3), ("nmf-5", 5)):
        parts = dictionary(storage, name).directions
        assert (parts >= 0).all() and parts.shape == (width, 8)
        sums = PartSums(width, 8)
        sums.add(train, parts)  # one more pass hardly changes them: they belong to these outputs
        assert float((sums.updated(parts) * parts).sum(dim=1).min()) > 0.98
        explained = 1 - float(sums.error) / float((train - train.mean(dim=0)).double().square().sum())
        assert figures(storage, name)["explained_variance"] == pytest.approx(explained, abs=0.15)


def test_a_factorisation_that_was_killed_goes_on_after_its_last_pass(photos, tmp_path, monkeypatch):
    config = FitConfig("nmf", (3,), epochs=4)
    whole = fit(tmp_path / "whole", photos, config)
    updated, passes = PartSums.updated, []

    def killed(self, parts):
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return updated(self, parts)

    monkeypatch.setattr(PartSums, "updated", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", photos, config)
    again = fit(tmp_path / "killed", photos, config)
    assert len(passes) == 5  # two, one that was killed, and the other two
    assert torch.equal(dictionary(whole, "nmf-3").encoder, dictionary(again, "nmf-3").encoder)


@pytest.mark.slow
def test_ray_train_gives_the_same_bits_on_one_worker_and_the_same_set_on_two(photos, tmp_path, monkeypatch):
    config = FitConfig("topk-sae", (16,), k=3, epochs=2, sae=SMALL)
    task = fit(tmp_path / "task", photos, config)
    two = fit(tmp_path / "two", photos, replace(config, workers=2))
    monkeypatch.setattr(training, "plain", lambda task: False)
    one = fit(tmp_path / "one", photos, config)
    name = "topk-sae-16"
    assert torch.equal(dictionary(task, name).encoder, dictionary(one, name).encoder)
    explained = [figures(each, name)["explained_variance"] for each in (one, two)]
    assert explained[0] == pytest.approx(explained[1], abs=0.05)  # other batches


def test_sets_are_made_once_and_again_where_files_are_missing_or_anothers(photos, tmp_path, capsys):
    config = FitConfig("pca", (2, 3), out=str(tmp_path / "sets"))
    storage = fit(tmp_path / "run", photos, config)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").iterdir()}
    assert {path.name for path in written} == {f"pca-{n}{end}" for n in (2, 3) for end in (".safetensors", ".yaml")}
    assert not storage.files("_work")
    capsys.readouterr()
    fit(tmp_path / "run", photos, config)
    assert "up to date" in capsys.readouterr().err
    (tmp_path / "sets/pca-2.yaml").unlink()
    fit(tmp_path / "run", photos, config)
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").iterdir()}
    assert again[tmp_path / "sets/pca-3.yaml"] == written[tmp_path / "sets/pca-3.yaml"]
    assert again[tmp_path / "sets/pca-2.yaml"] != written[tmp_path / "sets/pca-2.yaml"]
    fit(tmp_path / "else", photos, FitConfig("pca", (2,), held_out=0.5, out=str(tmp_path / "sets")))
    fit(tmp_path / "run", photos, config)
    line = (tmp_path / "sets/pca-2.yaml").read_text().splitlines()[0]
    assert line == f"# milan_ray_fit: {storage.config_of(FEATURES_FIT, **KEYS, features='pca-2')}"


def test_without_rows_of_logits_there_is_no_accuracy_and_a_line_says_why(photos, tmp_path, capsys):
    storage = fit(tmp_path, photos, FitConfig("pca", (2,)), layer="good", name="tiny/broken")
    rows = storage.read(FEATURES_FIT, model="tiny/broken", layer="good", features="pca-2").to_pylist()
    assert all(row["accuracy"] is None and row["spliced_accuracy"] is None for row in rows) and len(rows) == 2
    assert "no accuracy with features in the layer: tiny/broken does not put out" in capsys.readouterr().err


def test_a_layer_without_positions_has_one_output_for_each_image(photos, tmp_path):
    storage = fit(tmp_path, photos, FitConfig("pca", (2,), held_out=0), layer="6")
    (row,) = storage.read(FEATURES_FIT, model="tiny/cnn", layer="6", features="pca-2").to_pylist()
    assert (row["images"], row["positions"], row["split"]) == (90, 90, "train")
    assert row["accuracy"] is not None


@pytest.mark.parametrize(
    ("config", "layer", "name", "sentence"),
    [
        (FitConfig("pca", (9,)), "2", "tiny/cnn", "8 principal components at most"),
        (FitConfig("topk-sae", (16,), k=17), "2", "tiny/cnn", "--k 17 of --width 16"),
        (FitConfig("pca", (2,)), "nan", "tiny/broken", "NaN or infinite values"),
        (FitConfig("nmf", (2,)), "6", "tiny/cnn", "puts out values down to -.*nmf knows none below zero"),
        (FitConfig("pca", (2,)), "9", "tiny/cnn", "unknown layer '9'"),
        (FitConfig("pca", (4,), held_out=0.99), "6", "tiny/cnn", "too few for 4 features|no images to fit"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_sentence(photos, tmp_path, config, layer, name, sentence):
    with pytest.raises(MilanError, match=sentence):
        fit(tmp_path, photos, config, layer=layer, name=name)
    assert not Storage(tmp_path).partitions(FEATURES_FIT)


def test_numbers_that_cannot_be_are_refused():
    for wrong in ({"widths": (0,)}, {"held_out": 1.0}, {"name": "a#b"}):
        with pytest.raises(MilanError):
            FitConfig("pca", **wrong)
    with pytest.raises(MilanError, match="give one of pca, nmf"):
        FitConfig("ica")


def test_files_that_are_missing_damaged_or_of_another_fit_are_written_again(tmp_path):
    folder, dictionaries = Storage(tmp_path), {"ends": "relu", "components": "identity"}
    mean, rows = torch.arange(3.0), torch.eye(2, 3)
    for name, activation in dictionaries.items():
        made = Dictionary(Weights(rows, rows, decoder_bias=mean, input_bias=mean), activation)
        matrix = activation == "identity"
        assert why_written(folder, name, matrix, "abc") == "its files are missing"
        for path, content in files_of(name, made, "layer1", {FIT: "abc", "k": None}).items():
            folder.put(path, content)
        assert why_written(folder, name, matrix, "abc") is None
        assert why_written(folder, name, matrix, "abd") == "its files are of another fit"
        again = file_features(folder.uri(place_of(name, matrix)) if matrix else f"layer1={folder.uri(name)}").build()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(again.encode(x), made.encode(x))
        folder.put(f"{name}.yaml" if matrix else f"{name}/cfg.json", b"\xff" if matrix else b"[]")
        assert why_written(folder, name, matrix, "abc") == "its files are damaged"
