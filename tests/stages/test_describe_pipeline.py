"""Encodings, training and descriptions on a real local Ray, against the kernels called by hand."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from toys import toy_captioner, train_here

import milan_ray
from milan_ray import cli
from milan_ray.captioner.captioner import best_descriptions
from milan_ray.captioner.fit import Sizes
from milan_ray.captioner.quirks import NO_QUIRKS, REFERENCE
from milan_ray.config import ExemplarConfig, Resources, TrainingConfig
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.labelers.milan import LIKELIHOOD, MILAN
from milan_ray.library.run_directory import RunExemplars
from milan_ray.report import write_report
from milan_ray.schema import ANNOTATIONS, CANDIDATES, DESCRIPTIONS, ENCODINGS, EXEMPLARS, TRAINING, VIEWS
from milan_ray.stages import descriptions as describe
from milan_ray.stages.captioners import EncoderRef, load_captioner, save_captioner
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.encodings import Encodings, unit_features
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.training import Training, TrainingJob
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
ENCODER = EncoderRef("tiny", plugins=(PLUGIN,))
LAYERS = {"tiny/cnn": ("0", "2")}
BEAM, LENGTH, LAM = 6, 5, 0.5
SEARCH = Search("toy", beam_size=BEAM, length=LENGTH, lam=LAM)


@pytest.fixture(scope="module")
def storage(ray_session, photos, tmp_path_factory) -> Storage:
    """A run directory with exemplars, encodings and descriptions of two layers.

    Beside them are a model of which one layer has no exemplars, and one without descriptions.
    """
    storage = Storage(tmp_path_factory.mktemp("run"))
    models = {**LAYERS, "tiny/broken": ("good", "nan"), "tiny/twin": ("0",)}
    requests = [ModelRef(name, layers=layers, plugins=(PLUGIN,)) for name, layers in models.items()]
    one = Resources()
    Exemplars(requests, ProbeRef((str(photos),)), ExemplarConfig(k=4, batch_size=16)).run(storage, one)
    del models["tiny/twin"]
    run_stage(Encodings(models, ENCODER), storage, one)
    save_captioner(storage, "toy", toy_captioner(), "A toy.")
    run_descriptions(storage, models, SEARCH, one)
    return storage


def by_hand(storage: Storage, layer: str) -> dict[int, np.ndarray]:
    """Every exemplar through the encoder on its own, as the reference does it."""
    encoder = ENCODER.load()
    meta = storage.metadata(EXEMPLARS, model="tiny/cnn", layer=layer)
    assert meta is not None
    size = int(meta["mask_height"]), int(meta["mask_width"])
    images = {}
    for keys in storage.partitions(VIEWS):
        for row in storage.read(VIEWS, **keys).to_pylist():
            images[row["image_id"]] = np.asarray(Image.open(io.BytesIO(row["image"])))
    found: dict[int, list[np.ndarray]] = {}
    for row in storage.read(EXEMPLARS, model="tiny/cnn", layer=layer).to_pylist():
        image = torch.from_numpy(images[row["image_id"]].copy()).permute(2, 0, 1)[None] / 255
        mask = torch.from_numpy(masks.unpack([row["mask"]], size)).float()
        found.setdefault(row["unit"], []).append(encoder(image, mask)[0].numpy())
    return {unit: np.stack(rows) for unit, rows in found.items()}


def test_encodings_equal_one_encoder_pass_per_exemplar(storage):
    for layer in LAYERS["tiny/cnn"]:
        expected = by_hand(storage, layer)
        found = unit_features(storage.read(ENCODINGS, encoder="tiny", model="tiny/cnn", layer=layer))
        assert found.keys() == expected.keys()
        for unit, features in expected.items():
            np.testing.assert_allclose(found[unit], features, atol=1e-5)


def test_descriptions_equal_the_kernel(storage):
    captioner = toy_captioner()
    for layer in LAYERS["tiny/cnn"]:
        features = by_hand(storage, layer)
        units = sorted(features)
        candidates = captioner.candidates(np.stack([features[u] for u in units]), SEARCH.beam_size, SEARCH.length)
        for labeler, lam in ((MILAN, LAM), (LIKELIHOOD, 0.0)):
            table = storage.read(DESCRIPTIONS, labeler=labeler, model="tiny/cnn", layer=layer).to_pylist()
            best = best_descriptions(candidates, lam)
            assert [row["unit"] for row in table] == units
            assert [row["description"] for row in table] == [unit[0].text for unit in best]
            np.testing.assert_allclose([row["score"] for row in table], [unit[0].score for unit in best], atol=1e-4)
            assert [row["lam"] for row in table] == [lam] * len(units)


def test_candidates_keep_tokens_and_both_log_probabilities(storage):
    rows = storage.read(CANDIDATES, decoder="toy", model="tiny/cnn", layer="2").to_pylist()
    assert len(rows) == 8 * BEAM
    indexer = toy_captioner().indexer
    for row in rows:
        assert indexer.reconstruct(row["tokens"]) == row["text"]
        assert row["logp_d_given_e"] < 0 and row["logp_d"] < 0
        assert row["finished"] == (row["tokens"][-1] == indexer.ids.stop)
    ranks = [row["logp_d_given_e"] for row in rows[: SEARCH.beam_size]]
    assert ranks == sorted(ranks, reverse=True)


def test_n_best_is_sorted_distinct_and_led_by_the_description(storage):
    for row in storage.read(DESCRIPTIONS, labeler=MILAN, model="tiny/cnn", layer="0").to_pylist():
        texts = [other["text"] for other in row["n_best"]]
        scores = [other["score"] for other in row["n_best"]]
        assert texts[0] == row["description"] and len(set(texts)) == len(texts)
        assert scores == sorted(scores, reverse=True)


def test_descriptions_again_do_nothing_and_another_lambda_only_rescores(storage):
    paths = [storage.path(CANDIDATES, decoder="toy", model="tiny/cnn", layer=layer) for layer in LAYERS["tiny/cnn"]]
    paths += [storage.path(DESCRIPTIONS, labeler=LIKELIHOOD, model="tiny/cnn", layer="0")]
    before = [os.stat(f"{storage.root}/{path}").st_mtime_ns for path in paths]
    run_stage(Encodings(LAYERS, ENCODER), storage, Resources())
    run_descriptions(storage, LAYERS, replace(SEARCH, lam=0.9), Resources())
    assert [os.stat(f"{storage.root}/{path}").st_mtime_ns for path in paths] == before
    table = storage.read(DESCRIPTIONS, labeler=MILAN, model="tiny/cnn", layer="0")
    assert table["lam"].to_pylist() == pytest.approx([0.9] * 6)
    run_descriptions(storage, LAYERS, SEARCH, Resources())


def test_reference_quirks_change_log_p_d_as_the_kernel_does(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(describe, "FEW_ROWS", -1)  # by tasks, as for many
    for folder in ("encodings", "captioners"):
        shutil.copytree(f"{storage.root}/{folder}", tmp_path / folder)
    other, wide = Storage(tmp_path), replace(SEARCH, beam_size=14, quirks=REFERENCE)  # all tokens, <stop> among them
    run_descriptions(other, {"tiny/cnn": ("2",)}, wide, Resources())
    found = np.array(other.read(CANDIDATES, decoder="toy", model="tiny/cnn", layer="2")["logp_d"])
    features = by_hand(storage, "2")
    stacked = np.stack([features[unit] for unit in sorted(features)])
    with_quirks, without = (
        toy_captioner().candidates(stacked, wide.beam_size, wide.length, quirks=quirks).logp_d
        for quirks in (REFERENCE, NO_QUIRKS)
    )
    assert with_quirks is not None and without is not None
    np.testing.assert_allclose(found, with_quirks.ravel(), atol=1e-4)
    assert (found < without.ravel() - 1e-3).any()  # one token more is counted past <stop>


def test_library_calls_say_what_the_jobs_wrote(storage):
    milan = milan_ray.load("toy", storage.root, device="cpu")
    exemplars = milan_ray.open_exemplars(storage.root, "tiny/cnn")
    assert isinstance(exemplars, RunExemplars)
    for layer in LAYERS["tiny/cnn"]:
        units = [exemplars.lookup(layer, unit) for name, unit in exemplars.units() if name == layer]
        images, masks_ = ([getattr(unit, name) for unit in units] for name in ("images", "masks"))
        encodings = unit_features(storage.read(ENCODINGS, encoder="tiny", model="tiny/cnn", layer=layer))
        np.testing.assert_allclose(milan.encode(images, masks_), list(encodings.values()), atol=1e-5)
        said = replace(milan, captioner=replace(milan.captioner, length=LENGTH))
        found = said.describe(images, masks_, lam=SEARCH.lam, beam_size=SEARCH.beam_size)
        assert found["description"].to_list() == [unit.description for unit in units]


def test_polars_reads_all_descriptions_by_the_documented_glob(storage):
    frame = pl.scan_parquet(f"{storage.root}/descriptions/**/*.parquet", hive_partitioning=True)
    counts = frame.filter(labeler="milan", model="tiny/cnn").group_by("model", "layer").len().sort("layer").collect()
    assert counts.rows() == [("tiny/cnn", "0", 6), ("tiny/cnn", "2", 8)]


def test_encodings_without_exemplars_say_what_to_run(storage):
    with pytest.raises(MilanError, match=r"jobs\.exemplars"):
        run_stage(Encodings({"tiny/cnn": ("6",)}, ENCODER), storage, Resources())


def test_captioner_survives_the_round_trip_through_the_run_directory(storage):
    again, original = load_captioner(storage, "toy"), toy_captioner()
    features = torch.rand(2, 4, 10)
    assert again.candidates(features, 4).texts == original.candidates(features, 4).texts
    assert again.encoder_name == "tiny"


def annotate(storage: Storage) -> None:
    for layer, texts in (("0", ("dark areas", "dark")), ("2", ("the dog", "dogs"))):
        units = sorted(by_hand(storage, layer))
        table = ANNOTATIONS.table(
            {
                "source": ["people"] * 2 * len(units),
                "model": ["tiny/cnn"] * 2 * len(units),
                "layer": [layer] * 2 * len(units),
                "unit": units * 2,
                "annotator": ["a"] * len(units) + ["b"] * len(units),
                "text": [text for text in texts for _ in units],
            }
        )
        storage.write(ANNOTATIONS, table, f"by hand {layer}", source="people", model="tiny/cnn", layer=layer)


def test_training_learns_keeps_the_best_epoch_and_is_not_repeated(storage):
    annotate(storage)
    job = TrainingJob(
        "taught",
        "people",
        tuple(("tiny/cnn", layer) for layer in LAYERS["tiny/cnn"]),
        ENCODER,
        TrainingConfig(
            max_epochs=25, patience=25, learning_rate=0.02, decoder_batch_size=8, lm_batch_size=8, hold_out=0.35
        ),
        Sizes(8, 16),
    )
    train_here(storage, job)
    history = storage.read(TRAINING, decoder="taught").to_pylist()
    for part in ("lm", "decoder"):
        losses = [row["train_loss"] for row in history if row["part"] == part]
        assert losses[-1] < losses[0]
        (kept,) = [row for row in history if row["part"] == part and row["kept"]]
        sign = -1 if part == "lm" else 1
        best = max(sign * row["validation"] for row in history if row["part"] == part)
        assert sign * kept["validation"] == best
    captioner = load_captioner(storage, "taught")
    assert captioner.encoder_state is not None
    features = by_hand(storage, "2")
    said = [unit[0].text for unit in captioner.describe(np.stack(list(features.values())), lam=0, beam_size=4)]
    assert {"dog", "dogs"} & set(" ".join(said).lower().split())
    assert not Training(job).run(storage)
    assert not [file for file in storage.files("_work") if file != "_work/writable"]


@pytest.mark.slow
def test_errors_inside_actors_reach_the_user_as_one_sentence(storage):
    with pytest.raises(MilanError, match="beam"):
        run_descriptions(storage, LAYERS, replace(SEARCH, beam_size=400), Resources(actors=1))


def test_layers_without_any_exemplar_go_through_every_stage(storage):
    counts = [len(storage.read(DESCRIPTIONS, labeler=MILAN, model="tiny/broken", layer=x)) for x in ("good", "nan")]
    assert counts == [4, 0]


def test_report_leaves_out_descriptions_of_earlier_exemplars(storage, photos, tmp_path, capsys):
    copy = Storage(tmp_path / "copy")
    shutil.copytree(storage.root, copy.root)
    request = ModelRef("tiny/cnn", layers=("2",), plugins=(PLUGIN,))
    Exemplars([request], ProbeRef((str(photos),)), ExemplarConfig(k=3, batch_size=16)).run(copy, Resources())
    write_report(copy, tmp_path / "report", models=["tiny/cnn"])
    said = capsys.readouterr().err
    assert "left out descriptions of tiny/cnn 2" in said and "tiny/cnn 0" not in said


def test_report_of_a_model_without_descriptions_beside_one_with(storage, tmp_path):
    report = str(tmp_path / "report")
    assert cli.main(["report", "--storage", storage.root, "--model", "tiny/twin", "--report", report]) == 0
    assert (tmp_path / "report/index.html").is_file()


def test_tables_carry_the_configuration_that_made_them(storage):
    for table in (EXEMPLARS, ENCODINGS, CANDIDATES, DESCRIPTIONS):
        for keys in storage.partitions(table):
            file = Path(storage.root) / storage.path(table, **keys)
            assert b"milan_ray.config" in pq.read_schema(file).metadata
