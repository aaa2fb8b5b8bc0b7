"""Accuracies under ablation, through Ray, against a plain loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray.config import Resources
from milan_ray.engine.references import ModelRef, ProbeRef, model
from milan_ray.errors import MilanError
from milan_ray.models.ablation import Ablation
from milan_ray.models.class_numbers import class_numbers
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.base import LatentProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.probe.registry import resolve_probe
from milan_ray.storage import Storage
from milan_ray.studies.ablation import run as ablate
from milan_ray.studies.ablation.run import run_ablations

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
CNN = ModelRef("tiny/cnn", plugins=(PLUGIN,))
SETS = [{}, {"0": [0, 1]}, {"2": [3]}, {"2": [1, 2], "6": [0]}, {"6": [2]}]


@pytest.mark.usefixtures("ray_session")
def test_tasks_add_up_to_a_plain_loop_and_go_on_after_a_death(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "IMAGES", 40)
    monkeypatch.setattr(ablate, "SETS", 2)
    storage, probe = Storage(tmp_path), ProbeRef((str(photos),))
    found = run_ablations(storage, CNN, probe, SETS, Resources())

    spec = model(CNN)
    source = resolve_probe((str(photos),))
    assert not isinstance(source, LatentProbe)
    manifest = source.manifest()
    refs = [source.read(ref) for ref in image_refs(manifest)]
    views = torch.from_numpy(np.stack([spec.preprocess.view(read.image) for read in refs]))
    classes = sorted(set(manifest["class_label"].to_pylist()))
    labels = torch.tensor([classes.index(label) for label in manifest["class_label"].to_pylist()])
    plain = Ablation(spec, spec.load(), SETS).correct(views, labels)
    assert found.classes == tuple(classes)
    assert found.correct.tolist() == plain[:, : len(classes)].tolist()
    assert found.images.tolist() == [30, 30, 30]
    np.testing.assert_allclose(found.accuracy, plain[:, :3].sum(1).numpy() / 90)
    storage.remove_work(found.work)
    assert not storage.files("_work")  # nothing else is left behind


@pytest.mark.usefixtures("ray_session")
def test_tasks_that_are_done_are_not_done_again(photos, tmp_path, monkeypatch):
    storage, probe = Storage(tmp_path), ProbeRef((str(photos),))
    first = run_ablations(storage, CNN, probe, SETS[:2], Resources())
    monkeypatch.setattr(ablate, "_count", lambda task: pytest.fail("was done already"))
    again = run_ablations(storage, CNN, probe, SETS[:2], Resources())
    assert again.correct.tolist() == first.correct.tolist()


def spec(classes: tuple[str, ...] | None) -> ModelSpec:
    return ModelSpec("toy", lambda weights: torch.nn.Identity(), (), classes=classes)


def test_classes_are_those_of_the_model_where_it_names_them():
    assert class_numbers(["cup", "boat", "cup"], spec(("boat", "car", "cup"))) == (("boat", "car", "cup"), [2, 0, 2])


def test_classes_are_numbered_in_alphabetical_order_otherwise():
    assert class_numbers(["n2", "n1", "n2"], spec(None)) == (("n1", "n2"), [1, 0, 1])
    assert class_numbers(["n2", "n1"], spec(("tench", "goldfish")))[1] == [1, 0]


def test_images_of_other_classes_and_without_any_are_refused():
    with pytest.raises(MilanError, match="tells 3 classes"):
        class_numbers(["n2", "n1"], spec(("tench", "goldfish", "shark")))
    with pytest.raises(MilanError, match="images with classes"):
        class_numbers(["n2", None], spec(None))
    with pytest.raises(MilanError, match="images with classes"):
        class_numbers([], spec(None))
