"""Adversarial images by the pipeline, against the same made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import spacy
import torch

from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.planner import Plan
from milan_ray.engine.references import ModelRef, ProbeRef, model, probe
from milan_ray.errors import MilanError
from milan_ray.probe.manifest import image_refs
from milan_ray.report.figures import figure_path
from milan_ray.schema import DESCRIPTIONS, PASTED
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import Storage
from milan_ray.studies.cut_and_paste.run import CutAndPaste, CutAndPasteConfig, summary
from milan_ray.studies.cut_and_paste.statistics import grown, paste
from milan_ray.studies.exemplar_images import exemplar_views, model_views, unit_exemplars, unit_masks

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
REQUEST = ModelRef("tiny/cnn", layers=("2",), plugins=(PLUGIN,))
CONFIG = CutAndPasteConfig(units=3, originals=3, distractors=2, targets=2)
PUBLIC = {"experiment": "cut-and-paste", "model": "tiny/cnn"}


def why(storage: Storage, images: ProbeRef, language: str) -> str | None:
    """What a dry run says."""
    plan, before = Plan(), storage.stat("")
    plan.stages(storage, [CutAndPaste(REQUEST, images, language, CONFIG)])
    assert storage.stat("") == before
    (step,) = plan.steps
    assert (step.table, step.keys) == ("pasted", tuple(PUBLIC.values()))
    return step.reason


@pytest.fixture
def nlp():
    """Words with vectors of their own; "dog cup" is the most different."""
    nlp = spacy.blank("en")
    for word, vector in {"dog": (3, 0), "cup": (-3, 0), "red": (0, 1), "lines": (0, 0)}.items():
        nlp.vocab.set_vector(word, np.array(vector, np.float32))  # type: ignore[arg-type]  # thinc's own array types
    return nlp


@pytest.mark.usefixtures("ray_session")
def test_what_units_fire_at_is_pasted_on_what_they_are_silent_on(photos, tmp_path, nlp, capsys):
    storage, images = Storage(tmp_path / "run"), ProbeRef((str(photos),))
    Exemplars([REQUEST], images, ExemplarConfig(k=4)).run(storage, Resources())
    texts = ["lines", "dog cup", "red dog", "lines", "red lines", "lines", "red", "dogs"]
    keys = {"labeler": "milan", "model": "tiny/cnn", "layer": "2"}
    rows = [{**keys, "unit": u, "description": t, "score": 0.0, "n_best": []} for u, t in enumerate(texts)]
    table = DESCRIPTIONS.table({c.name: [row.get(c.name) for row in rows] for c in DESCRIPTIONS.columns})
    storage.write(DESCRIPTIONS, table, "d", **keys)

    assert why(storage, images, "four words") == "missing"
    study = CutAndPaste(REQUEST, images, "four words", CONFIG)
    pairs = study.run(storage, nlp, Resources())
    assert why(storage, images, "four words") is None and why(storage, images, "others") == "language changed"
    different = pairs.filter(pl.col("group") == "different words")
    assert set(different["unit"]) <= {1, 2, 4} and len(set(pairs["unit"])) >= 2
    per_unit = pairs.group_by("unit").agg(pl.col("original", "distractor").n_unique())
    assert (per_unit["original"].max(), per_unit["distractor"].max()) == (CONFIG.originals, CONFIG.distractors)
    assert different["unit"].n_unique() <= CONFIG.units
    assert "images with something pasted on" in summary(pairs)
    assert b"<svg" in storage.get(figure_path(storage, PASTED, **PUBLIC))

    spec = model(REQUEST)
    network, manifest = spec.load(), probe(images).manifest()
    names = sorted(set(manifest["class_label"].to_pylist()))
    for row in pairs.iter_rows(named=True):
        original, control = (
            model_views(images, image_refs(manifest, [row[which]]), spec) for which in ("original", "control")
        )
        mine = unit_exemplars(storage, "tiny/cnn", "2", row["unit"]).filter(pl.col("image_id") == row["distractor"])
        cut = grown(unit_masks(storage, "tiny/cnn", "2", mine["mask"].to_list())[0], (24, 24))[None]
        assert 0 < cut.mean() <= 1 / 3
        made = paste(original, exemplar_views(storage, "tiny/cnn", "2", [row["distractor"]]), cut)[0]
        with torch.inference_mode():
            answers = network(spec.prepare(torch.from_numpy(np.concatenate([original, made, control])))).argmax(-1)
        said = [names[n] if n < len(names) else f"class {n}" for n in answers.tolist()]
        assert said == [row["original_class"], row["predicted"], row["control_class"]]
        assert manifest["class_label"][row["original"]].as_py() == row["original_class"] not in row["targets"]
        wrong = row["predicted"] in row["targets"]
        assert row["fooled"] == (wrong and row["predicted"] not in (row["original_class"], row["distractor_class"]))

    assert study.run(storage, nlp, Resources()).equals(pairs)
    assert "up to date" in capsys.readouterr().err
    with pytest.raises(MilanError, match="no word vectors"):
        replace(study, language="nothing").run(storage, spacy.blank("en"), Resources())
    storage.write(DESCRIPTIONS, table.slice(0, 3), "less", **keys)
    with pytest.raises(MilanError, match="has the 8 units that its last layer reads"):
        study.run(storage, nlp, Resources())
