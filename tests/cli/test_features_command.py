"""``milan-ray features fit``: what each option changes, what is refused, and that features are described at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from milan_ray import cli
from milan_ray.schema import EXEMPLARS, FEATURES_FIT
from milan_ray.storage import Storage

TINY = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
NETWORK = ("--model", "tiny/cnn", "--plugin", TINY, "--layer", "2")
FIT = ("features", "fit", *NETWORK)
SAE = ("--method", "topk-sae", "--width", "12", "--k", "3", "--epochs", "1", "--rows", "256")
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def fitted(ray_session, photos, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fitted")
    command = [*FIT, *SAE, "--probe", str(photos), "--storage", str(root), "--out", str(root / "sets")]
    assert cli.main(command) == 0
    return root


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ([], None),
        (["--method", "jumprelu-sae", "--name", "topk-sae-12"], "method"),
        (["--width", "13", "--name", "topk-sae-12"], "width"),
        (["--k", "4"], "k"),
        (["--epochs", "2"], "epochs"),
        (["--seed", "1"], "seed"),
        (["--lr", "0.1"], "training"),
        (["--rows", "128"], "training"),
        (["--held-out", "0.2"], "held_out"),
        (["--activations", "pre"], "activations"),
        (["--precision", "bfloat16"], "arithmetic"),
        (["--channels-last"], "arithmetic"),
        (["--batch-size", "8"], "batch_size"),
        (["--name", "mine"], "missing"),
        (["--out", "elsewhere"], "its files are missing"),
    ],
)
def test_options_of_fitting_are_part_of_what_decides(fitted, photos, options, changes, dry_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = () if "--out" in options else ("--out", str(fitted / "sets"))
    said = dry_run(str(fitted), *FIT, *SAE, "--probe", str(photos), *place, *options)
    if changes is None:
        assert not said
    else:
        ((which, reason),) = said.items()
        name = "mine" if "mine" in options else "topk-sae-12"
        assert which == f"features_fit tiny/cnn 2 {name}" and changes in reason


def test_widths_layers_and_folders_are_those_asked_for(photos, tmp_path, capsys):
    command = [*FIT, "--method", "pca", "--width", "2", "3", "--probe", str(photos), "--storage", str(tmp_path)]
    assert cli.main([*command, "--name", "mine", "--layer", "0", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["features"] == ["mine-2", "mine-3"]
    assert "explained variance" in told.err and "spliced in" in told.err
    storage = Storage(tmp_path)
    assert [k["features"] for k in storage.partitions(FEATURES_FIT, layer="0")] == ["mine-2", "mine-3"]
    folder = Path(json.loads(told.out)["folder"])
    assert sorted(path.name for path in folder.glob("*.yaml")) == ["mine-2.yaml", "mine-3.yaml"]
    assert folder.is_relative_to(tmp_path / "features")


def test_features_that_were_fitted_are_dissected_by_their_file_alone(fitted, photos, tmp_path):
    place = str(fitted / "sets/topk-sae-12")
    command = ["exemplars", "--model", "tiny/cnn", "--plugin", TINY, "--features", place, "--probe", str(photos)]
    assert cli.main([*command, "--storage", str(tmp_path), "--no-report", "--k", "2"]) == 0
    assert [keys["layer"] for keys in Storage(tmp_path).partitions(EXEMPLARS)] == ["2#topk-sae-12"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "pca", "--k", "3"], "--k would do nothing"),
        (["--method", "pca", "--epochs", "3"], "--epochs would do nothing"),
        (["--method", "nmf", "--lr", "1", "--rows", "3"], "--lr, --rows would do nothing"),
        (["--method", "nmf", "--workers", "2"], "--workers would do nothing"),
        (["--width", "0"], "--width 0"),
        (["--width", "16", "--k", "17"], "--k 17 of --width 16"),
        (["--held-out", "1"], "leaves no images to fit to"),
        (["--name", "a#b"], "may not contain"),
        (["--model", "tiny/*"], " models; features are fitted to one"),
        (["--workers", "99"], "do not fit the cluster"),
        (["--max-bad", "0.01"], "more than --max-bad 0.01 allows"),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(photos, tmp_path, capsys, options, sentence):
    probe = photos
    if "--max-bad" in options:
        probe = tmp_path / "photos"
        probe.mkdir()
        for number, path in enumerate(sorted(photos.rglob("*.png"))[:20]):
            (probe / path.name).write_bytes(b"no image" if number < 3 else path.read_bytes())
    assert cli.main([*FIT, "--probe", str(probe), "--storage", str(tmp_path / "run"), *options]) == 1
    assert sentence in capsys.readouterr().err.replace("\n", " ")
    assert not Storage(tmp_path / "run").partitions(FEATURES_FIT)
