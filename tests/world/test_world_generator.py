"""The world's generator: codes, training, and a dissection end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from toys import toy_captioner

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage
from milan_ray.labelers.milan import MILAN
from milan_ray.models.hooks import LayerTap
from milan_ray.probe.base import LatentProbe
from milan_ray.probe.manifest import digest, image_refs
from milan_ray.probe.registry import resolve_probe
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, EXEMPLARS, VIEWS
from milan_ray.stages import world
from milan_ray.stages.captioners import EncoderRef, save_captioner
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage
from milan_ray.world import training
from milan_ray.world.generator import CODE_SIZE, LAYERS, CodeProbe, SceneGenerator, scene_code
from milan_ray.world.probe import WorldProbe
from milan_ray.world.scenes import make_scene
from milan_ray.world.training import Recipe, TrainTask, train_generator

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
MODEL, UNITS = "world/generator", {"layer0": 64, "layer1": 48, "layer2": 32}


def test_codes_tell_scenes_apart_and_leave_out_the_noise():
    scenes = [make_scene("probe", index) for index in range(200)]
    codes = np.stack([scene_code(scene) for scene in scenes])
    assert codes.shape == (200, CODE_SIZE) and codes.min() >= -1 and codes.max() <= 1
    assert len(np.unique(codes, axis=0)) == 200
    first = scenes[0]
    np.testing.assert_array_equal(scene_code(replace(first, noise=first.noise + 9)), codes[0])
    big = replace(first.things[0], tone=(first.things[0].tone + 1) % 4)
    assert (scene_code(replace(first, things=(big, *first.things[1:]))) != codes[0]).sum() == 1


def test_code_probe_gives_codes_with_the_scenes_truth():
    scenes = WorldProbe("probe", 5)
    probe = CodeProbe(scenes)
    assert isinstance(probe, LatentProbe) and not isinstance(scenes, LatentProbe)
    assert digest(probe.manifest()) != digest(scenes.manifest())
    refs = image_refs(probe.manifest(), [4, 1])
    (codes,) = probe.latents(refs)
    np.testing.assert_array_equal(codes[0].numpy(), scene_code(scenes.scene(4)))
    assert probe.concept_maps(refs[1]).keys() == scenes.concept_maps(refs[1]).keys()
    assert len(resolve_probe(["world/heldout-codes"]).manifest()) == 1000


def test_generator_shows_maps_at_its_layers():
    torch.manual_seed(0)
    with LayerTap(SceneGenerator().eval(), [*LAYERS, "outputs"]) as tap, torch.no_grad():
        shapes = [tuple(output.shape[1:]) for output in tap(torch.rand(2, CODE_SIZE)).values()]
    assert shapes == [(64, 16, 16), (48, 32, 32), (32, 32, 32), (3, 64, 64)]


def test_world_generator_is_dissected_annotated_and_described(ray_session, tmp_path, monkeypatch):
    """Barely trained, so that only the way is tested: codes to images, exemplars, annotations, descriptions."""
    monkeypatch.setattr(training, "TESTS", ("heldout", 1_000_000, 16))
    task = TrainTask("generator", lambda: train_generator(recipe=Recipe(32, epochs=8, lr=5e-3, batch_size=16)), 1)
    weights = tmp_path / task.file
    weights.write_bytes(task.run())
    storage, plugin = Storage(tmp_path / "run"), str(PLUGINS / "tiny_generators.py")
    request = ModelRef(MODEL, str(weights), plugins=(plugin,))
    probe = ProbeRef(("tiny/codes",), plugins=(plugin,))
    Exemplars([request], probe, ExemplarConfig(k=3, batch_size=16)).run(storage, Resources())
    models = {MODEL: LAYERS}
    world.annotate(storage, probe, models)
    encoder = EncoderRef("tiny", plugins=(str(PLUGINS / "tiny_models.py"),))
    run_stage(Encodings(models, encoder), storage, Resources())
    save_captioner(storage, "toy", toy_captioner(), "A toy.")
    run_descriptions(storage, models, Search("toy", beam_size=4, length=5), Resources())
    for layer, units in UNITS.items():
        exemplars = storage.read(EXEMPLARS, model=MODEL, layer=layer)
        alive = set(exemplars["unit"].to_pylist())
        assert len(alive) == units and len(exemplars) == 3 * units
        annotations = storage.read(ANNOTATIONS, source=world.SOURCE, model=MODEL, layer=layer)
        assert set(annotations["unit"].to_pylist()) == alive and all(annotations["text"].to_pylist())
        described = storage.read(DESCRIPTIONS, labeler=MILAN, model=MODEL, layer=layer)
        assert set(described["unit"].to_pylist()) == alive
    assert all(keys["view"].startswith(f"{MODEL} ") for keys in storage.partitions(VIEWS))
