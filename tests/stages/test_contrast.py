"""Contrastive descriptions on threads, against loops over units, images and candidates; and by the command line."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import toy_captioner

from milan_ray import cli
from milan_ray.cli.describe import search_of
from milan_ray.config import ContrastConfig, ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage, run_stages
from milan_ray.engine.status import status
from milan_ray.errors import MilanError
from milan_ray.exemplars import masks
from milan_ray.exemplars.pooled import matrix
from milan_ray.labelers.clip import CLIP as CLIP_PLAIN
from milan_ray.labelers.clip import CLIP_CONTRAST
from milan_ray.labelers.milan import CONTRAST, MILAN
from milan_ray.models.image_text import ImageTextRef
from milan_ray.schema import (
    CANDIDATES,
    CONTRAST_ENCODINGS,
    CONTRASTS,
    DESCRIPTIONS,
    ENCODINGS,
    EXEMPLARS,
    IMAGE_EMBEDDINGS,
    POOLED,
    UNIT_SCORES,
    VIEWS,
)
from milan_ray.stages import contrast_descriptions, contrasts, encodings
from milan_ray.stages.captioners import EncoderRef, load_captioner, save_captioner
from milan_ray.stages.contrast_descriptions import contrast_stages
from milan_ray.stages.contrasts import Contrasts, ContrastSource
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.embeddings import ImageEmbeddings, rows_of
from milan_ray.stages.encodings import Encodings, unit_features
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.scores import ScoreConfig, described_layers, run_scores, score_stages
from milan_ray.storage import CONTRASTS_KEY, Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
ENCODER = EncoderRef("tiny", plugins=(PLUGIN,))
LAYERS = {"tiny/cnn": ("0", "2")}
SEARCH = Search("toy", beam_size=6, length=5, lam=0.5)
MODEL = ModelRef("tiny/cnn", layers=LAYERS["tiny/cnn"], plugins=(PLUGIN,))
CONFIG = ExemplarConfig(k=3, batch_size=16, pooled=True)
CHOICE = ContrastConfig(similar=4, random=2, quantile=0.5)
CLIP = "tiny-clip"
MU = 0.4

Run = tuple[Storage, ContrastSource]


def contrast(storage: Storage, source: ContrastSource, mu: float = MU) -> None:
    captioner = load_captioner(storage, "toy")
    run_stages(contrast_stages(LAYERS, SEARCH, captioner, ENCODER, source, mu), storage, Resources())


@pytest.fixture(scope="module")
def made(ray_session, photos, save_clip, tmp_path_factory) -> Run:
    """A run directory with contrastive descriptions of two layers."""
    storage = Storage(tmp_path_factory.mktemp("run"))
    probe = ProbeRef((str(photos),))
    Exemplars([MODEL], probe, CONFIG).run(storage, Resources())
    run_stage(Encodings(LAYERS, ENCODER), storage, Resources())
    save_captioner(storage, "toy", toy_captioner(length=5, beam_size=6, lam=0.5), "A toy.")
    run_descriptions(storage, LAYERS, SEARCH, Resources())
    images = ImageEmbeddings(ImageTextRef(save_clip(tmp_path_factory.mktemp("models") / CLIP)), probe)
    run_stage(images, storage, Resources())
    source = ContrastSource(images, {"tiny/cnn": MODEL}, CONFIG, CHOICE)
    contrast(storage, source)
    return storage, source


@pytest.fixture
def run(made, tmp_path) -> Run:
    """A copy of it for each test."""
    storage, source = made
    return Storage(shutil.copytree(storage.root, tmp_path / "copy")), source


def layers() -> list[dict[str, str]]:
    return [{"model": model, "layer": layer} for model, of_model in LAYERS.items() for layer in of_model]


def test_contrasts_are_the_nearest_images_that_do_not_excite_their_unit(run):
    storage, source = run
    embedded = storage.read(IMAGE_EMBEDDINGS, **source.images.keys)
    ids, vectors = embedded["image_id"].to_numpy(), rows_of(embedded["embedding"])
    for keys in layers():
        pooled = storage.read(POOLED, **keys)
        assert pooled["image_id"].to_numpy().tolist() == ids.tolist()
        rows = storage.read(CONTRASTS, encoder=CLIP, **keys).to_pylist()
        exemplars = defaultdict(list)
        for row in storage.read(EXEMPLARS, **keys).to_pylist():
            exemplars[row["unit"]].append(row["image_id"])
        for unit, own in enumerate(matrix(pooled["max"]).T):
            chosen = [row for row in rows if row["unit"] == unit]
            threshold = np.quantile(own, 0.5, method="lower")
            free = [n for n in range(len(ids)) if own[n] <= threshold and ids[n] not in exemplars[unit]]
            free = [n for n in free if own[n] < min(own[ids == image][0] for image in exemplars[unit])]
            assert [row["rank"] for row in chosen] == list(range(min(6, len(free))))
            for row in chosen[:4]:  # each exemplar in turn
                image = exemplars[unit][row["rank"] % 3]
                near = {n: float(vectors[n] @ vectors[ids == image][0]) for n in free}
                best = max(near.values())
                (place,) = np.flatnonzero(ids == row["image_id"])
                assert row["kind"] == "similar" and row["exemplar"] == row["rank"] % 3
                assert near[int(place)] == pytest.approx(best, abs=1e-6)
                assert row["similarity"] == pytest.approx(best, abs=1e-6)
                assert row["activation"] == own[place]
                assert row["quantile"] == pytest.approx((own < own[place]).mean())
                free.remove(int(place))
            assert all(row["kind"] == "random" for row in chosen[4:])
            assert {row["image_id"] for row in chosen[4:]} <= set(ids[free].tolist())
            assert not {row["image_id"] for row in chosen} & set(exemplars[unit])


@pytest.mark.parametrize("part", ["exemplar", "whole"])
def test_descriptions_with_contrasts_equal_loops_over_candidates(run, part):
    storage, source = run
    contrast(storage, replace(source, masks=part))
    captioner, encoder = load_captioner(storage, "toy").to("cpu"), ENCODER.load()
    views = {
        row["image_id"]: np.asarray(Image.open(io.BytesIO(row["image"])))
        for keys in storage.partitions(VIEWS)
        for row in storage.read(VIEWS, **keys).to_pylist()
    }
    for keys in layers():
        meta = storage.metadata(EXEMPLARS, **keys)
        size = int(meta["mask_height"]), int(meta["mask_width"])
        of_exemplar = {
            (row["unit"], row["rank"]): torch.from_numpy(masks.unpack([row["mask"]], size))
            for row in storage.read(EXEMPLARS, **keys).to_pylist()
        }
        features = defaultdict(list)
        for row in storage.read(CONTRASTS, encoder=CLIP, **keys).to_pylist():
            image = torch.from_numpy(views[row["image_id"]].copy()).permute(2, 0, 1)[None] / 255
            mask = of_exemplar[row["unit"], row["exemplar"]] if part == "exemplar" else torch.ones(1, *size)
            features[row["unit"]].append(encoder(encoder.fit(image), mask)[0])
        expected: dict[int, dict[str, float]] = defaultdict(dict)
        for row in storage.read(CANDIDATES, decoder="toy", **keys).to_pylist():
            targets = torch.tensor([row["tokens"]])
            given = torch.stack(features[row["unit"]])[None]
            with torch.no_grad():
                log_probs, _ = captioner.decoder(given, targets)
            unlike = float(log_probs[0].gather(1, targets.T).sum())
            score = row["logp_d_given_e"] - 0.5 * row["logp_d"] - MU * unlike
            expected[row["unit"]][row["text"]] = max(score, expected[row["unit"]].get(row["text"], -np.inf))
        for row in storage.read(DESCRIPTIONS, labeler=CONTRAST, **keys).to_pylist():
            assert row["n_best"]
            for label in row["n_best"]:
                near = [score for score in expected[row["unit"]].values() if abs(score - label["score"]) < 1e-4]
                assert near
            assert row["lam"] == 0.5 and row["logp_d"] < 0


def test_contrast_with_mu_0_is_milan(run):
    storage, source = run
    contrast(storage, source, 0.0)
    for keys in layers():
        ours, milan = (storage.read(DESCRIPTIONS, labeler=name, **keys).to_pylist() for name in (CONTRAST, MILAN))
        assert [row["n_best"] for row in ours] == [row["n_best"] for row in milan]


def test_mu_changes_labels_and_nothing_before_them(run):
    storage, source = run
    before = {path: os.stat(f"{storage.root}/{path}").st_mtime_ns for path in storage.files("")}
    contrast(storage, source, 0.1)
    after = {path: os.stat(f"{storage.root}/{path}").st_mtime_ns for path in before}
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {storage.path(DESCRIPTIONS, labeler=CONTRAST, **keys) for keys in layers()}
    assert not status(storage).work


def test_contrasts_are_the_same_for_any_shards(run, monkeypatch):
    storage, source = run
    tables = [(CONTRASTS, CLIP), (CONTRAST_ENCODINGS, "tiny")]
    before = [storage.read(table, encoder=name, **keys) for table, name in tables for keys in layers()]
    labels = [storage.read(DESCRIPTIONS, labeler=CONTRAST, **keys) for keys in layers()]
    for table in (CONTRASTS, CONTRAST_ENCODINGS):
        storage.remove(table.name)
    storage.remove(f"{DESCRIPTIONS.name}/labeler={CONTRAST}")
    for module, size in ((contrasts, 3), (contrast_descriptions, 1)):
        monkeypatch.setattr(module, "UNITS_PER_SHARD", size)
    monkeypatch.setattr(encodings, "chunk_starts", lambda ids, exemplars: tuple(ids[::5]))
    contrast(storage, source)
    after = [storage.read(table, encoder=name, **keys) for table, name in tables for keys in layers()]
    assert all(a.equals(b) for a, b in zip(before, after, strict=True))
    again = [storage.read(DESCRIPTIONS, labeler=CONTRAST, **keys) for keys in layers()]
    assert all(a.equals(b) for a, b in zip(labels, again, strict=True))


def test_contrasts_of_selected_units_are_those_of_all(run):
    storage, source = run
    keys = layers()[1]
    whole = storage.read(CONTRASTS, encoder=CLIP, **keys)
    storage.remove(CONTRASTS.name)
    run_stage(Contrasts({"tiny/cnn": ("2",)}, source, (1, 4)), storage, Resources())
    part = storage.read(CONTRASTS, encoder=CLIP, **keys)
    assert part.to_pylist() == [row for row in whole.to_pylist() if row["unit"] in (1, 4)]


def test_labels_say_which_contrasts_made_them(run):
    storage, _ = run
    for keys in layers():
        meta = storage.metadata(DESCRIPTIONS, labeler=CONTRAST, **keys)
        assert meta["contrasts"] == CLIP and float(meta["mu"]) == MU
        assert meta[CONTRASTS_KEY] == storage.config_of(CONTRASTS, encoder=CLIP, **keys)


def test_scores_leave_out_exemplars_and_the_contrasts_of_a_label(run):
    storage, source = run
    described = described_layers(storage, ["tiny/cnn"], [CONTRAST, MILAN])
    config = ScoreConfig(samples=20)
    run_scores(storage, score_stages(described, source.images.probe, source.images.ref, config), config, Resources())
    embedded = storage.read(IMAGE_EMBEDDINGS, **source.images.keys)
    ids, vectors = embedded["image_id"].to_numpy(), rows_of(embedded["embedding"])
    embedder = source.images.embedder
    for keys in layers():
        act = matrix(storage.read(POOLED, **keys)["mean"]).astype(float)
        made = {MILAN: [storage.read(EXEMPLARS, **keys)]}
        made[CONTRAST] = [*made[MILAN], storage.read(CONTRASTS, encoder=CLIP, **keys)]
        for labeler, tables in made.items():
            rows = storage.read(UNIT_SCORES, predictor=CLIP, labeler=labeler, **keys).to_pylist()
            for row in (row for row in rows if row["metric"] == "correlation" and row["system"] == "own"):
                own = {
                    each["image_id"] for table in tables for each in table.to_pylist() if each["unit"] == row["unit"]
                }
                use = ~np.isin(ids, list(own))
                assert row["images"] == use.sum()
                fit = vectors[use] @ embedder.embed_texts([row["description"]])[0].numpy()
                if row["value"] is not None and fit.std() > 1e-4:
                    expected = np.corrcoef(act[use, row["unit"]], fit)[0, 1]
                    assert row["value"] == pytest.approx(expected, abs=1e-4)


def test_scores_of_labels_whose_contrasts_are_others_are_one_sentence(run):
    storage, source = run
    run_stage(Contrasts(LAYERS, replace(source, config=replace(CHOICE, quantile=0.2))), storage, Resources())
    described = described_layers(storage, ["tiny/cnn"], [CONTRAST])
    with pytest.raises(MilanError, match="make the labels again"):
        stages = score_stages(described, source.images.probe, source.images.ref, ScoreConfig())
        run_scores(storage, stages, ScoreConfig(), Resources())


def test_scores_of_labels_whose_contrasts_are_gone_for_other_units_are_one_sentence(run):
    storage, source = run
    storage.remove(CONTRASTS.name)
    run_stage(Contrasts(LAYERS, source, units=(1,)), storage, Resources())
    described = described_layers(storage, ["tiny/cnn"], [CONTRAST])
    with pytest.raises(MilanError, match="make the labels again"):
        run_scores(
            storage,
            score_stages(described, source.images.probe, source.images.ref, ScoreConfig()),
            ScoreConfig(),
            Resources(),
        )


def test_contrast_without_pooled_activations_is_one_sentence(run):
    storage, source = run
    storage.remove(POOLED.name)
    with pytest.raises(MilanError, match=r"jobs\.exemplars --pooled"):
        contrast(storage, source)


@pytest.mark.parametrize("mu", [-0.1, 0.51])
def test_mu_beyond_the_trade_is_one_sentence(run, mu):
    storage, source = run
    with pytest.raises(MilanError, match="--mu"):
        contrast(storage, source, mu)


def test_command_line_describes_with_contrasts_from_nothing(made, photos, tmp_path, capsys, monkeypatch):
    storage, source = made
    monkeypatch.setenv("MILAN_MODELS_DIR", str(Path(source.images.ref.folder).parent))
    run = Storage(tmp_path / "run")
    os.makedirs(run.root)
    os.symlink(f"{storage.root}/captioners", f"{run.root}/captioners")
    options = ["--model", "tiny/cnn", "--layers", "0", "2", "--plugin", PLUGIN, "--probe", str(photos)]
    options += ["--storage", run.root, "--no-report", "--decoder", "toy", "--k", "3", "--batch-size", "16"]
    options += ["--beam-size", "6", "--lam", "0.5", "--length", "5", "--contrast", CLIP, "--mu", str(MU)]
    options += ["--contrasts", "4", "--random-contrasts", "2", "--contrast-quantile", "0.5"]
    assert cli.main(["describe", *options, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    for table in ("pooled", "image_embeddings", "contrasts", "contrast_encodings"):
        assert f"\n{table}" in f"\n{planned}"
    assert cli.main(["describe", *options]) == 0
    for keys in layers():
        ours, theirs = (of.read(DESCRIPTIONS, labeler=CONTRAST, **keys) for of in (run, storage))
        assert ours.equals(theirs)
    capsys.readouterr()
    assert cli.main(["describe", *options, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("0 tables would be made")
    audit = ["audit", "--pair", "tiny/cnn", "tiny/twin", "--words", "red"]
    for verb in (["describe"], audit):
        for changed, table, reason in CHANGES:
            assert cli.main([*verb, *options, *changed.split(), "--dry-run", "--json"]) == 0
            planned = json.loads(capsys.readouterr().out)["planned"]
            found = {" ".join([step["table"], *step["keys"]]): step["reason"] for step in planned}
            assert reason in found[table], (changed, found)


def test_reranking_sets_exemplars_against_contrasts(made, photos, tmp_path, capsys, monkeypatch):
    storage, source = made
    monkeypatch.setenv("MILAN_MODELS_DIR", str(Path(source.images.ref.folder).parent))
    run = Storage(shutil.copytree(storage.root, tmp_path / "run"))
    options = ["--model", "tiny/cnn", "--layers", "2", "--plugin", PLUGIN, "--probe", str(photos)]
    options += ["--storage", run.root, "--no-report", "--decoder", "toy", "--k", "3", "--batch-size", "16"]
    options += ["--beam-size", "6", "--lam", "0.5", "--length", "5", "--contrast", CLIP, "--mu", str(MU)]
    options += ["--contrasts", "4", "--random-contrasts", "2", "--clip", CLIP, "--clip-z", "1", "--clip-beam-size", "5"]
    keys = {"model": "tiny/cnn", "layer": "2"}
    assert cli.main(["describe", *options, "--clip-gamma", "0.7"]) == 0
    exemplars, others = (
        unit_features(run.read(table, encoder=CLIP, **keys)) for table in (ENCODINGS, CONTRAST_ENCODINGS)
    )
    rows = run.read(DESCRIPTIONS, labeler=CLIP_CONTRAST, **keys).to_pylist()
    plain = run.read(DESCRIPTIONS, labeler=CLIP_PLAIN, **keys).to_pylist()
    candidates = run.read(CANDIDATES, decoder="toy+clip", **keys).to_pylist()
    for row in rows:
        own, other = (np.split(of[row["unit"]], 2, axis=1)[1].mean(axis=0) for of in (exemplars, others))
        texts = sorted({each["text"] for each in candidates if each["unit"] == row["unit"]})
        scores = source.images.embedder.embed_texts(texts).numpy() @ (own - 0.7 * other)
        for label in row["n_best"]:
            assert min(abs(scores - label["score"])) < 1e-4  # z = 1: whole images
    assert [row["unit"] for row in rows] == [row["unit"] for row in plain]
    assert [row["score"] for row in rows] != [row["score"] for row in plain]
    meta = run.metadata(DESCRIPTIONS, labeler=CLIP_CONTRAST, **keys) or {}
    assert meta["contrasts"] == CLIP and meta["gamma"] == "0.7"
    capsys.readouterr()
    assert cli.main(["describe", *options, "--clip-gamma", "0.7", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("0 tables would be made")
    assert cli.main(["describe", *options, "--clip-gamma", "0.2", "--dry-run"]) == 0
    assert "gamma changed" in capsys.readouterr().out


CHANGES = (
    ("--mu 0.1", f"descriptions {CONTRAST} tiny/cnn 0", "mu changed"),
    ("--contrasts 3", f"contrasts {CLIP} tiny/cnn 0", "config changed"),
    ("--random-contrasts 1", f"contrasts {CLIP} tiny/cnn 0", "config changed"),
    ("--contrast-quantile 0.4", f"contrasts {CLIP} tiny/cnn 0", "config changed"),
    ("--contrast-masks whole", "contrast_encodings tiny tiny/cnn 0", "masks changed"),
)
"""Option → a table that is stale with it, and why."""


def test_setting_chosen_for_contrasts_gives_mu_and_is_refused_without_them(tmp_path):
    setting = tmp_path / "setting.yaml"
    setting.write_text("beam_size: 6\nlength: 5\nlam: 0.3\nmu: 0.45\n")

    def options(*more: str) -> argparse.Namespace:
        command = ["describe", "--model", "m", "--decoder", "toy", "--setting", str(setting), *more]
        return cli.build_parser().parse_args(command)

    args = options("--contrast", "c")
    search = search_of(args, "toy")
    assert (search.lam, search.beam_size, args.mu) == (0.3, 6, 0.45)
    args = options("--contrast", "c", "--mu", "0.2")
    search_of(args, "toy")
    assert args.mu == 0.2
    for line, expected in (("mu: 0.0\n", 0.0), ("mu: null\n", None), ("", None)):  # not chosen; not tried
        setting.write_text(f"beam_size: 6\nlength: 5\nlam: 0.3\n{line}")
        args = options("--contrast", "c")
        search_of(args, "toy")
        assert args.mu == expected
    setting.write_text("beam_size: 6\nlength: 5\nlam: 0.3\nmu: 0.45\n")
    with pytest.raises(MilanError, match="--contrast MODEL"):
        search_of(options(), "toy")
    assert search_of(options("--lam", "0.2"), "toy").lam == 0.2
