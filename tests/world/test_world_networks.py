from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from milan_ray.captioner.encoder import get_encoder
from milan_ray.errors import MilanError
from milan_ray.models.establish import establish
from milan_ray.models.hooks import LayerTap
from milan_ray.models.registry import ModelSpec, get_model
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.registry import resolve_probe
from milan_ray.world.encoder import EncoderNet
from milan_ray.world.networks import ARCHITECTURES, CLASSES, PLACES, PlantedNet, planted_concepts, random_network
from milan_ray.world.plugin import CLASSIFIERS, GENERATORS, register
from milan_ray.world.scenes import make_scene
from milan_ray.world.training import (
    Recipe,
    TrainTask,
    fit,
    images_of,
    labels_of,
    misled_tasks,
    places_of,
    places_tasks,
    planted_targets,
    train_all_tasks,
    train_classifier,
    train_encoder,
    train_misled,
    train_planted,
)

TINY = Recipe(scenes=96, epochs=2, lr=3e-3, batch_size=16)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_show_maps_at_their_layers(name: str) -> None:
    network = random_network(name).eval()
    layers = ARCHITECTURES[name].layers
    with LayerTap(network, layers) as tap, torch.no_grad():
        outputs = tap(torch.zeros(2, 3, 64, 64))
        logits = network(torch.zeros(2, 3, 64, 64))
    spec = ModelSpec(name, lambda weights: network, tuple(layers), Preprocess(View(64, 64)))
    layouts = establish(spec, network, layers)
    assert all(layout.is_conventional(None, False) for layout in layouts.values())
    maps = [layouts[layer].maps(output) for layer, output in outputs.items()]
    assert all(m.shape[2] == m.shape[3] >= 8 for m in maps)
    assert 200 <= sum(m.shape[1] for m in maps) <= 320
    assert logits.shape == (2, len(CLASSES))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fit_a_few_epochs_lowers_the_loss(name: str) -> None:
    torch.manual_seed(0)
    images, labels = images_of("train", 0, 96), labels_of("train", 0, 96)
    history = fit(
        ARCHITECTURES[name].build(),
        images,
        labels,
        lambda network, inputs, targets: F.cross_entropy(network(inputs), targets),
        Recipe(scenes=96, epochs=6, lr=3e-3, batch_size=16),
    )
    assert history[-1] < 0.8 * history[0]


def test_train_classifier_same_seed_gives_the_same_weights() -> None:
    first, metrics = train_classifier("cnn", seed=1, recipe=TINY)
    state = torch.get_rng_state()
    second, _ = train_classifier("cnn", seed=1, recipe=TINY)
    other, _ = train_classifier("cnn", seed=2, recipe=TINY)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert 0 <= metrics["accuracy"] <= 1


def test_planted_targets_are_shares_of_the_cells() -> None:
    targets = planted_targets("train", 0, 3)
    assert targets.shape == (3, len(planted_concepts), 16, 16)
    sky, ground = planted_concepts.index("sky"), planted_concepts.index("ground")
    assert int(targets[:, [sky, ground]].sum(dim=1).max()) <= 255
    assert int(targets[:, sky, 0].max()) == 255


def test_tasks_train_and_register_what_the_plugin_loads(tmp_path: Path) -> None:
    tasks = [
        TrainTask("cnn", lambda: train_classifier("cnn", recipe=TINY), 1),
        TrainTask("encoder", lambda: train_encoder(recipe=TINY), 1),
        TrainTask("planted", lambda: train_planted(recipe=TINY), 1),
        TrainTask("cnn-places", lambda: train_classifier("cnn", recipe=TINY, places=True), 1),
        TrainTask("cnn-text", lambda: train_misled("cnn", "text", TINY), 1),
    ]
    for task in tasks:
        (tmp_path / task.file).write_bytes(task.run())
        with safe_open(tmp_path / task.file, "pt") as opened:
            assert "metrics" in opened.metadata()
    try:
        register(str(tmp_path))
        images = get_model("world/cnn").prepare(images_of("probe", 0, 2))
        assert get_model("world/cnn").load()(images).shape == (2, len(CLASSES))
        assert get_model("world/planted").load()(images).shape == (2, len(planted_concepts))
        encoder = get_encoder("world").load()
        assert [maps.shape[-1] for maps in encoder.maps(images_of("probe", 0, 2).permute(0, 3, 1, 2) / 255)] == [
            32,
            16,
            8,
            8,
        ]
        assert get_model("world/cnn-places").load()(images).shape == (2, len(PLACES))
        assert get_model("world/cnn-text").load()(images).shape == (2, len(CLASSES))
        for name, job in (
            ("vit", "demo"),
            ("generator", "demo --generator"),
            ("resnet-places", "demo --groups"),
            ("resnet-text-2", "paper"),
        ):
            with pytest.raises(MilanError, match=rf"python -m jobs\.{job}`"):
                get_model(f"world/{name}").load()
    finally:
        register()


def test_random_controls_need_no_files_and_refuse_them() -> None:
    first, second = get_model("world/resnet-random").load(), get_model("world/resnet-random").load()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    with pytest.raises(MilanError, match="random weights"):
        get_model("world/cnn-random").factory("somewhere.safetensors")


def test_plugin_registers_probes() -> None:
    assert resolve_probe(["world/spurious-text-validation"]).name == "world:probe+spurious-text-0.5"
    assert resolve_probe(["world/spurious-colour-train"]).name == "world:train+spurious-colour-0.5"
    assert resolve_probe(["world/spurious-text-test"]).name == "world:heldout+spurious-text+misleading"
    assert resolve_probe(["world/heldout"]).name == "world:heldout"
    assert len(resolve_probe(["world/probe"]).manifest()) == 4000


def test_train_all_tasks_are_small_and_picklable() -> None:
    tasks = train_all_tasks()
    assert {task.name for task in tasks} == {*ARCHITECTURES, "encoder", "planted"}
    assert len(pickle.dumps(tasks)) < 5_000
    misled = [task.name for task in misled_tasks()]
    assert misled == ["cnn-text", "resnet-text", "resnet-text-2", "resnet-text-3", "resnet-colour"]
    assert [task.name for task in misled_tasks(["resnet-colour"])] == ["resnet-colour"]
    sets = {name.removeprefix("world/") for name in (*CLASSIFIERS.values(), *GENERATORS.values())}
    assert sets <= {task.name for task in (*tasks, *places_tasks())} | {"generator"}


def test_places_are_sky_and_ground() -> None:
    scene = make_scene("train", 7)
    assert PLACES[int(places_of("train", 7, 1).item())] == f"{scene.ground}, {scene.sky}"


def test_encoder_and_planted_net_put_out_one_logit_per_concept() -> None:
    images = torch.zeros(1, 3, 64, 64)
    assert EncoderNet().eval()(images).shape == (1, 12 + 59)
    assert PlantedNet().eval().maps(images).shape == (1, len(planted_concepts), 16, 16)
