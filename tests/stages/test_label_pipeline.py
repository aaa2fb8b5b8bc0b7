"""Network dissection and compositional explanations through the whole pipeline, on units whose truth is built in."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine import cluster
from milan_ray.engine.references import ModelRef, ProbeRef, model, probe
from milan_ray.errors import MilanError
from milan_ray.labelers.compexp import CompExp
from milan_ray.labelers.netdissect import NetDissect
from milan_ray.probe.base import LatentProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, LEVELS, RUNS
from milan_ray.stages import concept_labels as label
from milan_ray.stages.concept_labels import ConceptLabels, LabelConfig
from milan_ray.stages.exemplars import DissectedModels, Exemplars
from milan_ray.storage import EXEMPLARS_KEY, Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/flags.py")
MODEL = ModelRef("flags/watcher", layers=("seen",), plugins=(PLUGIN,))
PROBE = ProbeRef(("flags",), plugins=(PLUGIN,))
CONFIG = ExemplarConfig(k=3, quantile=0.95, batch_size=16, shard_size=32)
KEYS = {"model": "flags/watcher", "layer": "seen"}


def run(storage: Storage, how: LabelConfig, config: ExemplarConfig = CONFIG, **named) -> DissectedModels:
    done = Exemplars([MODEL], PROBE, config).run(storage, Resources())
    stage = ConceptLabels(done.models, [MODEL], PROBE, config, how, **named)
    assert stage.run(storage, Resources()) == {}
    return done


@pytest.fixture(scope="module")
def dissected(ray_session, tmp_path_factory) -> tuple[Storage, DissectedModels]:
    storage = Storage(tmp_path_factory.mktemp("labelled"))
    return storage, run(storage, LabelConfig())


@pytest.fixture(scope="module")
def labelled(dissected) -> Storage:
    return dissected[0]


def described(storage: Storage, labeler: str) -> dict[int, dict]:
    return {row["unit"]: row for row in storage.read(DESCRIPTIONS, labeler=labeler, **KEYS).to_pylist()}


def test_built_in_truth_is_named(labelled):
    one, several = described(labelled, "netdissect"), described(labelled, "compexp")
    assert [one[unit]["description"] for unit in range(3)] == ["red", "green", "blue"]
    assert one[4]["description"] == "blue"
    assert several[3]["description"].startswith("green or red")
    assert several[4]["description"].startswith("blue and left") or several[4]["description"] == "blue and not right"
    for unit in range(5):
        assert (
            several[unit]["score"] >= one[unit]["score"] > 0.2
        )  # a unit fires on 5 % of all positions, a field has 10 %
        assert one[unit]["n_best"][0]["text"] == one[unit]["description"] and one[unit]["logp_d"] is None


def test_scores_equal_a_dense_computation(labelled):
    spec, source = model(MODEL), probe(PROBE)
    refs = [ref for ref in image_refs(source.manifest()) if int(ref.path) % 5]
    assert not isinstance(source, LatentProbe)
    views = np.stack([spec.preprocess.view(source.read(ref).image) for ref in refs])
    with torch.inference_mode():
        maps = spec.load()(spec.prepare(torch.from_numpy(views)))
    levels = torch.tensor(labelled.read(LEVELS, **KEYS)["level"].to_numpy())
    on = (maps > levels[:, None, None]).numpy()  # the maps are as large as the grid
    truth = [source.concept_maps(ref) or {} for ref in refs]
    for unit, row in described(labelled, "netdissect").items():
        for best in row["n_best"]:
            shown = np.stack([found[best["text"]] for found in truth])
            both, either = (on[:, unit] & shown).sum(), (on[:, unit] | shown).sum()
            assert best["score"] == np.float32(both / either)


def test_labels_say_what_they_speak_of(labelled):
    for labeler in ("netdissect", "compexp"):
        meta = labelled.metadata(DESCRIPTIONS, labeler=labeler, **KEYS)
        assert meta[EXEMPLARS_KEY] == labelled.config_of(EXEMPLARS, **KEYS)
        runs = [labelled.read(RUNS, **keys) for keys in labelled.partitions(RUNS, stage=labeler)]
        assert [(table["rows"][0].as_py(), table["images"][0].as_py()) for table in runs] == [(5, 96)]
    assert not labelled.files("_work")


def tables(storage: Storage) -> dict[str, bytes]:
    return {path: storage.get(path) for path in storage.files(DESCRIPTIONS.name)}


def test_a_second_run_does_nothing(labelled, capsys):
    before = {path: os.stat(labelled.uri(path)).st_mtime_ns for path in labelled.files(DESCRIPTIONS.name)}
    run(labelled, LabelConfig())
    assert before == {path: os.stat(labelled.uri(path)).st_mtime_ns for path in labelled.files(DESCRIPTIONS.name)}
    assert "labels of flags/watcher: all up to date" in capsys.readouterr().err


def test_shards_are_larger_on_gpus_and_change_no_label(labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "on_gpus", lambda resources: True)
    storage = Storage(shutil.copytree(labelled.root, tmp_path / "gpus"))
    for config, shards in ((replace(CONFIG, shard_size=None), 1), (CONFIG, 4)):
        storage.remove(DESCRIPTIONS.name)
        run(storage, LabelConfig(), config)
        assert f"labels: flags/watcher over 120 images, {shards} shards" in capsys.readouterr().err
        assert tables(storage) == tables(labelled)


def test_a_killed_job_goes_on_with_what_changed_for_the_units_chosen(labelled, tmp_path, monkeypatch, capsys):
    storage = Storage(shutil.copytree(labelled.root, tmp_path / "killed"))
    before, config = tables(storage), replace(CONFIG, shard_size=50)
    how = LabelConfig((NetDissect(), CompExp(length=1)))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(label, "publish", killed)
        run(storage, how, config, units=(1, 3))
    pieces = [path for path in storage.files("_work") if path.endswith(".parts")]
    assert [path[-12:] for path in pieces] == ["000000.parts", "000001.parts", "000002.parts"]
    work = pieces[2].split("/")[1]
    assert sum(name.startswith("formulas/") for name in storage.work_names(work)) == 1
    storage.remove_file(pieces[2])
    run(storage, how, config, units=(1, 3))
    assert "2 of 3 shards are done" in capsys.readouterr().err
    after = tables(storage)
    assert [path for path in after if after[path] != before[path]] == [path for path in after if "compexp" in path]
    # Other shards, and formulas of one concept are concepts: the same scores to the last bit.
    one, several = described(storage, "netdissect"), described(storage, "compexp")
    assert {unit: row["n_best"] for unit, row in several.items()} == {unit: one[unit]["n_best"] for unit in (1, 3)}


def test_what_cannot_be_labelled_says_so(dissected, tmp_path):
    storage = Storage(shutil.copytree(dissected[0].root, tmp_path / "refused"))
    storage.remove(DESCRIPTIONS.name)
    one = Resources()
    with pytest.raises(MilanError, match="has 5 units, numbered from 0, and --units asks for 7"):
        ConceptLabels(dissected[1].models, [MODEL], PROBE, CONFIG, LabelConfig(), (7,)).run(storage, one)
    unlabelled = ProbeRef(("flags/unlabelled",), plugins=(PLUGIN,))
    with pytest.raises(MilanError, match="probe 'flags' has no concept maps"):
        ConceptLabels(dissected[1].models, [MODEL], unlabelled, CONFIG, LabelConfig()).run(storage, one)
