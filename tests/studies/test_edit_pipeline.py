"""Editing through the command line, against removing units by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from PIL import Image

from milan_ray import cli
from milan_ray.engine.references import ModelRef, model
from milan_ray.models.ablation import Ablation
from milan_ray.models.weights import read_state_dict
from milan_ray.report.figures import figure_path
from milan_ray.schema import ABLATIONS, CRITERIA, DESCRIPTIONS
from milan_ray.storage import Storage
from milan_ray.studies.editing.run import ALONE

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
SAID = {"0": ("lines", "text on signs", "roofs", "lines", "a word", "lines"), "2": ("letters", *["lines"] * 7)}
FOUND = [("0", 1), ("0", 4), ("2", 0)]
PUBLIC = {"experiment": "editing", "model": "tiny/cnn"}


@pytest.mark.usefixtures("ray_session")
def test_units_found_by_words_are_removed_step_by_step(photos, tmp_path, capsys, dry_run):
    storage = Storage(tmp_path / "run")
    for layer, texts in SAID.items():
        columns = {"labeler": "milan", "model": "tiny/cnn", "layer": layer}
        rows = [{**columns, "unit": u, "description": t, "score": 0.0, "n_best": []} for u, t in enumerate(texts)]
        table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
        storage.write(DESCRIPTIONS, table, f"d{layer}", **columns)
    test = tmp_path / "mirrored"  # other images of the same classes
    for file in photos.rglob("*.png"):
        target = test / file.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(target)
    out = tmp_path / "edited.safetensors"
    arguments = ["edit", "--model", "tiny/cnn", "--plugin", PLUGIN, "--layers", "0", "2", "--probe", str(photos)]
    arguments += ["--test", str(test), "--trials", "2", "--no-report"]
    assert dry_run(storage.root, *arguments, "--out", str(out)) == {"ablations editing tiny/cnn": "missing"}
    arguments += ["--storage", storage.root]
    assert cli.main([*arguments, "--remove", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "3 of 14 units" in said and "3 units found" in said and "test: " in said

    spec = model(ModelRef("tiny/cnn", plugins=(PLUGIN,)))
    single = [{layer: [unit]} for layer, texts in SAID.items() for unit in range(len(texts))]
    alone = accuracies(spec, photos, single)
    scores = pl.DataFrame(pl.from_arrow(storage.read(CRITERIA, **PUBLIC)))
    assert scores["criterion"].unique().to_list() == [ALONE]
    np.testing.assert_allclose(scores["score"], alone)
    places = {(layer, unit): place for place, one in enumerate(single) for layer, (unit,) in one.items()}
    order = sorted(FOUND, key=lambda unit: -alone[places[unit]])
    sets = [dict[str, list[int]]() for _ in range(4)]
    for step, one in enumerate(sets):
        for layer, unit in order[:step]:
            one.setdefault(layer, []).append(unit)
    ablations = pl.DataFrame(pl.from_arrow(storage.read(ABLATIONS, **PUBLIC))).filter(pl.col("class") == "")
    for split, images in (("validation", photos), ("test", test)):
        line = ablations.filter(pl.col("split") == split, pl.col("condition") == "sort-found").sort("ablated")
        np.testing.assert_allclose(line["accuracy"], accuracies(spec, images, sets))
    assert ablations.group_by("condition").len().sort("condition")["len"].to_list() == [
        16,
        8,
        8,
    ]  # random, sort-all, -found
    assert b"<svg" in storage.get(figure_path(storage, ABLATIONS, **PUBLIC))

    deployed = spec.load()
    deployed.load_state_dict(read_state_dict(str(out)))
    views = views_of(spec, photos)[0]
    with torch.inference_mode():
        found = deployed(spec.prepare(views))
    torch.testing.assert_close(found, Ablation(spec, spec.load(), [sets[2]]).logits(views)[0], rtol=1e-4, atol=1e-5)

    tuning = ["--remove", "2", "--fine-tune", str(photos), "--lr", "0.05", "--out", str(out)]
    assert dry_run(storage.root, *arguments) == {}
    anew = {"ablations editing, fine-tuned tiny/cnn": "made anew by every run"}
    assert dry_run(storage.root, *arguments, *tuning) == anew
    stale = {"ablations editing tiny/cnn": "editing changed"}
    for option in (["--words", "roof"], ["--seed", "1"], ["--trials", "3"]):
        assert dry_run(storage.root, *arguments, *option) == stale
    assert cli.main([*arguments, "--labeler", "nobody", "--dry-run"]) == 1
    assert "by nobody" in capsys.readouterr().err
    assert not Path(storage.root, "_work").exists()
    storage.put_work(storage.config_of(ABLATIONS, **PUBLIC), "left", pa.table({"by": ["a killed job"]}))
    assert cli.main([*arguments, *tuning]) == 0
    assert not Path(storage.root, "_work").exists()
    said = capsys.readouterr().err
    assert "editing of tiny/cnn: up to date" in said
    tuned = pl.DataFrame(pl.from_arrow(storage.read(ABLATIONS, experiment="editing, fine-tuned", model="tiny/cnn")))
    tuned = tuned.filter(pl.col("class") == "").sort("split", "ablated")
    assert tuned["split"].to_list() == ["test", "test", "validation", "validation"]
    assert tuned["ablated"].to_list() == [0, 2, 0, 2]
    weights = spec.load().state_dict()
    learnt = {name: tensor.clone() for name, tensor in read_state_dict(str(out)).items()}
    assert (learnt["6.weight"] - weights["6.weight"]).abs().max() > 0.04  # at the rate asked for
    deployed.load_state_dict(learnt)
    with torch.inference_mode():
        right = deployed(spec.prepare(views)).argmax(-1) == views_of(spec, photos)[1]
    assert tuned["accuracy"][3] == pytest.approx(right.double().mean().item())
    assert tuned["accuracy"][3] >= accuracies(spec, photos, [sets[2]])[0]  # the training images themselves
    assert cli.main([*arguments, "--most", "1", "--trials", "1"]) == 0
    assert set(storage.read(ABLATIONS, ["ablated"], **PUBLIC)["ablated"].to_pylist()) == {0, 1}
    assert cli.main([*arguments, "--words", "unicorn", "--dry-run"]) == 1
    assert cli.main([*arguments, "--words", "unicorn"]) == 1
    assert "contains unicorn" in capsys.readouterr().err


def views_of(spec, images: Path) -> tuple[torch.Tensor, torch.Tensor]:
    files = sorted(images.rglob("*.png"))
    views = torch.stack([torch.from_numpy(spec.preprocess.view(Image.open(file)).copy()) for file in files])
    return views, torch.tensor([int(file.parent.name[-1]) for file in files])


def accuracies(spec, images: Path, sets: list[dict[str, list[int]]]) -> list[float]:
    views, labels = views_of(spec, images)
    right = Ablation(spec, spec.load(), sets).logits(views).argmax(-1) == labels
    return right.double().mean(1).tolist()
