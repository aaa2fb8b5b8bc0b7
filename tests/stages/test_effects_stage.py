"""The stage of effects: the same table for any actors, shards and kills, equal to ablating by hand; what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine import references
from milan_ray.engine.planner import Plan
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import read_inputs
from milan_ray.models.ablation import Ablation, directions
from milan_ray.models.registry import ModelSpec
from milan_ray.models.view import Preprocess, View
from milan_ray.probe.base import ImageRef
from milan_ray.probe.manifest import image_refs
from milan_ray.schema import EFFECTS
from milan_ray.stages import effects
from milan_ray.stages.effects import EffectConfig, Effects, EffectsWorker, chosen_images
from milan_ray.storage import Storage

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
TINY, FEATURES, BAD, GENERATORS = (
    str(PLUGINS / f"{name}.py") for name in ("tiny_models", "tiny_features", "bad_models", "tiny_generators")
)
pytestmark = pytest.mark.usefixtures("ray_session")
LAYERS = ("0", "2", "4", "0#rectified")
CNN = ModelRef("tiny/cnn", layers=LAYERS, plugins=(FEATURES,))
FEW = EffectConfig(images=30)


def stage(probe: Path, config: EffectConfig = FEW, ref: ModelRef = CNN, units: tuple[int, ...] = ()) -> Effects:
    return Effects([ref], ProbeRef((str(probe),)), config, ExemplarConfig(), units)


def made(path: Path, probe: Path, resources: Resources | None = None, **options: object) -> Storage:
    storage = Storage(path)
    run_stage(stage(probe, **options), storage, resources or Resources())  # type: ignore[arg-type]
    return storage


def contents(storage: Storage) -> dict[str, bytes]:
    return {layer: storage.get(storage.path(EFFECTS, model="tiny/cnn", layer=layer)) for layer in LAYERS}


@pytest.fixture(scope="module")
def once(ray_session, photos, tmp_path_factory) -> Storage:
    return made(tmp_path_factory.mktemp("once"), photos)


@pytest.mark.parametrize(("images", "units", "actors"), [(4, 512, None), (32, 3, None), (7, 512, 2)], ids=str)
def test_tables_are_the_same_bytes_for_any_shards_and_actors(
    once, photos, tmp_path, monkeypatch, images, units, actors
):
    monkeypatch.setattr(Effects, "images_per_shard", images)
    monkeypatch.setattr(Effects, "most_ranges", 100)
    monkeypatch.setattr(Effects, "units_per_shard", units)
    storage = made(tmp_path, photos, Resources(actors=actors))
    if units == 512:
        assert contents(storage) == contents(once)
        return
    for layer in LAYERS:  # other units share a pass, which may change last bits
        one, other = (of.read(EFFECTS, model="tiny/cnn", layer=layer).to_pylist() for of in (storage, once))
        for mine, theirs in zip(one, other, strict=True):
            assert mine["moved"] == pytest.approx(theirs["moved"], rel=1e-4, abs=1e-7)
            assert (mine["active"], mine["peer"], mine["unit"]) == (theirs["active"], theirs["peer"], theirs["unit"])


def test_a_job_that_was_killed_goes_on_and_writes_the_same(once, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(Effects, "images_per_shard", 7)
    done: list[str] = []
    run = EffectsWorker.__call__

    def dying(self: EffectsWorker, row: dict[str, object]) -> object:
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(str(row["name"]))
        return run(self, row)

    monkeypatch.setattr(EffectsWorker, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, photos, Resources(actors=None))
    first = list(done)
    done.clear()

    def counted(self: EffectsWorker, row: dict[str, object]) -> object:
        done.append(str(row["name"]))
        return run(self, row)

    monkeypatch.setattr(EffectsWorker, "__call__", counted)
    storage = made(tmp_path, photos)
    assert contents(storage) == contents(once) and len(first) == 6 and not {*first} & {*done}
    assert not (tmp_path / "_work").exists()


def test_a_second_run_makes_nothing_and_every_setting_is_part_of_what_decides(once, photos, tmp_path, capsys):
    shutil.copytree(once.root, tmp_path, dirs_exist_ok=True)
    storage = Storage(tmp_path)
    for config, changed in (
        (FEW, None),
        (EffectConfig(images=29), "images"),
        (EffectConfig(images=30, factor=3.0), "amplify"),
        (EffectConfig(images=30, classes=2), "classes"),
    ):
        reasons = [step.reason for step in Plan.of(storage, [stage(photos, config)]).steps]
        assert len(reasons) == len(LAYERS)
        assert all(reason is None if changed is None else changed in str(reason) for reason in reasons)
    made(tmp_path, photos)
    assert "effects: all up to date" in capsys.readouterr().err


@torch.inference_mode()
def test_ablated_units_change_classes_as_ablation_does(once, photos):
    spec, source = references.model(CNN), references.probe(ProbeRef((str(photos),)))
    refs = [ImageRef(**row) for row in chosen_images(source.manifest(), 30).to_pylist()]
    views = torch.from_numpy(read_inputs(source, refs, spec).views)
    for layer in LAYERS:
        rows = [
            row for row in once.read(EFFECTS, model="tiny/cnn", layer=layer).to_pylist() if row["change"] == "ablated"
        ]
        logits = Ablation(spec, spec.load(), [{}, *({layer: [row["unit"]]} for row in rows)]).logits(views).double()
        base, changed = logits[0].softmax(-1), logits[1:].softmax(-1)
        moved = (changed - base).abs().sum(-1).mean(-1) / 2
        for row, wanted, after in zip(rows, moved.tolist(), changed, strict=True):
            assert row["images"] == 30 and row["moved"] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
            mean = (after - base).mean(0)
            for one in (*row["gained"], *row["lost"]):
                assert one["probability"] == pytest.approx(float(mean[one["class"]]), rel=1e-3, abs=1e-6)
                assert one["name"] is None  # the model is registered without names of its classes


def test_linear_layers_are_read_out_and_the_others_replayed(once):
    linear = {layer: (once.metadata(EFFECTS, model="tiny/cnn", layer=layer) or {})["linear"] for layer in LAYERS}
    assert linear == {"0": "0", "2": "0", "4": "30", "0#rectified": "0"}


def test_baselines_stand_beside_every_unit(once):
    rows = once.read(EFFECTS, model="tiny/cnn", layer="2").to_pylist()
    assert [row["change"] for row in rows[:3]] == ["ablated", "amplified", "random"]
    moved = {(row["unit"], row["change"]): row["moved"] for row in rows}
    for row in rows:
        assert (not row["gained"] and not row["lost"]) or row["change"] != "random"
        assert row["peer"] != row["unit"]
        if row["peer"] is not None:
            assert row["peer_moved"] == moved[row["peer"], row["change"]]


def test_chosen_units_have_the_rows_of_all_units(once, photos, tmp_path):
    storage = made(tmp_path, photos, units=(1, 3))
    rows = storage.read(EFFECTS, model="tiny/cnn", layer="0").to_pylist()
    whole = {(row["unit"], row["change"]): row for row in once.read(EFFECTS, model="tiny/cnn", layer="0").to_pylist()}
    assert {row["unit"] for row in rows} == {1, 3}
    for row in rows:
        assert row["moved"] == pytest.approx(whole[row["unit"], row["change"]]["moved"], rel=1e-4)


def test_images_are_a_fixed_choice(photos):
    manifest = references.probe(ProbeRef((str(photos),))).manifest()
    few, more = (chosen_images(manifest, count)["image_id"].to_pylist() for count in (10, 20))
    assert len(few) == 10 and {*few} < {*more} and few == sorted(few)
    assert few != [ref.image_id for ref in image_refs(manifest.slice(0, 10))]
    assert chosen_images(manifest, 1000).num_rows == manifest.num_rows


def test_unreadable_images_are_left_out_up_to_the_share_allowed(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    for name in sorted(folder.rglob("*.png"))[:4]:
        name.write_bytes(b"no image")
    config = EffectConfig(images=90)
    storage = made(tmp_path / "run", folder, config=config, ref=ModelRef("tiny/cnn", layers=("4",), plugins=(TINY,)))
    assert set(storage.read(EFFECTS, model="tiny/cnn", layer="4")["images"].to_pylist()) == {86}
    for name in folder.rglob("*.png"):
        name.write_bytes(b"no image")
    with pytest.raises(MilanError, match=r"90 of 90 images cannot be read, more than --max-bad 0.1"):
        made(tmp_path / "none", folder, config=config, ref=ModelRef("tiny/cnn", layers=("4",), plugins=(TINY,)))


@pytest.mark.parametrize(
    ("ref", "sentence"),
    [
        (ModelRef("tiny/saturated", layers=("0",), plugins=(TINY,)), "effects on classes are of classifiers"),
        (ModelRef("tiny/cnn", layers=("0#same",), plugins=(FEATURES,)), None),
        (ModelRef("tiny/cnn", layers=("0#broken",), plugins=(FEATURES,)), "have no directions"),
        (ModelRef("tiny/aside", layers=("aside",), plugins=("effects_plugin",)), "does not reach the class scores"),
    ],
)
def test_what_has_no_effect_on_classes_is_one_sentence(photos, tmp_path, monkeypatch, ref, sentence):
    plugin = tmp_path / "effects_plugin.py"
    plugin.write_text(ASIDE)
    ref = ModelRef(
        ref.name, layers=ref.layers, plugins=tuple(p.replace("effects_plugin", str(plugin)) for p in ref.plugins)
    )
    if sentence is None:
        made(tmp_path / "run", photos, ref=ref)
        return
    one = stage(photos, ref=ref)
    try:
        run_stage(one, Storage(tmp_path / "run"), Resources())
        (said,) = one.failed.values()
    except MilanError as error:
        said = str(error)
    assert sentence in said and said.count("\n") == 0


ASIDE = """
import torch
from torch import nn
from milan_ray.models.registry import register_model
from milan_ray.models.view import Preprocess, View


class Aside(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.aside, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.conv(x)
        self.aside(x)
        return self.head(x.mean(dim=(2, 3)))


def aside(weights):
    torch.manual_seed(0)
    return Aside()


register_model("tiny/aside", aside, ("aside",), Preprocess(View(resize=24, crop=24)))
"""


def test_generators_and_factors_that_do_not_amplify_are_refused(photos):
    with pytest.raises(MilanError, match="--amplify 1 does not amplify"):
        EffectConfig(factor=1)
    spec = references.model(CNN)
    with pytest.raises(MilanError, match="generators do not tell"):
        effects._check_classifier(spec, latents=True)


def test_table_holds_what_its_schema_says(once):
    file = pq.read_table(Path(once.root) / once.path(EFFECTS, model="tiny/cnn", layer="0"))
    EFFECTS.check(file.schema)
    assert file.num_rows == 3 * 6


class Mates(torch.nn.Module):
    """Behind its first layer, each image changes with the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, track_running_stats=False)
        self.fc = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.a(x)).relu().mean(dim=(2, 3)))


class Drawing(torch.nn.Module):
    """Behind its first layer, each pass is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.nn.functional.dropout(self.a(x).relu().mean(dim=(2, 3)), 0.5, True))


@pytest.mark.parametrize("network", [Mates, Drawing])
def test_networks_whose_classes_depend_on_more_than_the_image_are_refused(network):
    def build(weights: str | None) -> torch.nn.Module:
        torch.manual_seed(0)
        return network()

    spec = ModelSpec("toy/more", build, ("a",), Preprocess(View(resize=16, crop=16)))
    with pytest.raises(MilanError):
        effects._class_scores(spec)


def test_what_is_behind_the_layer_classes_names_and_directions_decide(once, photos, tmp_path, monkeypatch):
    shutil.copytree(once.root, tmp_path, dirs_exist_ok=True)

    def reasons() -> dict[str, str | None]:
        steps = Plan.of(Storage(tmp_path), [stage(photos)]).steps
        return {step.keys[1]: step.reason for step in steps}

    assert set(reasons().values()) == {None}
    told = effects._class_scores
    with monkeypatch.context() as patched:  # another forward of the same modules
        patched.setattr(effects, "_class_scores", lambda spec: json.dumps([9 * n for n in json.loads(told(spec))]))
        assert all("computes" in str(reason) for reason in reasons().values())
    with monkeypatch.context() as patched:
        found = references.model
        patched.setattr(references, "model", lambda ref: replace(found(ref), classes=tuple("abcdefgh")))
        assert all("names" in str(reason) for reason in reasons().values())
    with monkeypatch.context() as patched:
        given = directions
        patched.setattr(effects, "directions", lambda spec, layer: 1 + given(spec, layer))
        assert {layer for layer, reason in reasons().items() if reason} == {"0#rectified"}
    assert set(reasons().values()) == {None}


def test_some_units_alone_have_no_peers(photos, tmp_path):
    storage = made(tmp_path, photos, ref=replace(CNN, layers=("0",)), units=(0, 3))
    rows = storage.read(EFFECTS, model="tiny/cnn", layer="0").to_pylist()
    assert len(rows) == 6 and {row["peer"] for row in rows} == {None}
