"""Re-ranking on a real local Ray, against loops over units, exemplars and candidates; and through the command line."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import toy_captioner

import milan_ray
from milan_ray import cli
from milan_ray.captioner.captioner import Captioner
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine import stage
from milan_ray.engine.actor_pool import run_pool
from milan_ray.engine.references import ModelRef, ProbeRef
from milan_ray.engine.stage import run_stage, run_stages
from milan_ray.engine.status import status
from milan_ray.exemplars import masks
from milan_ray.labelers.clip import CLIP, Clip
from milan_ray.labelers.milan import MILAN
from milan_ray.models.image_text import ImageText
from milan_ray.schema import CANDIDATES, DESCRIPTIONS, ENCODINGS, EXEMPLARS, VIEWS
from milan_ray.stages import rerank
from milan_ray.stages.captioners import EncoderRef, load_captioner, save_captioner
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.encodings import Encodings, unit_features
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.rerank import reranking_stages
from milan_ray.storage import Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
ENCODER = EncoderRef("tiny", plugins=(PLUGIN,))
LAYERS = {"tiny/cnn": ("0", "2")}
SEARCH = Search("toy", beam_size=6, length=5, lam=0.5)
CLIP_ENCODER, TABLE = "tiny-clip", "toy+clip"


def captioner() -> Captioner:
    return toy_captioner(length=5, beam_size=6, lam=0.5)


def rerank_all(storage: Storage, clip: Clip) -> None:
    stages = reranking_stages(LAYERS, SEARCH, load_captioner(storage, "toy"), clip)
    run_stages(stages, storage, Resources())


@pytest.fixture(scope="module")
def clip(save_clip, tmp_path_factory) -> Clip:
    return Clip(save_clip(tmp_path_factory.mktemp("models") / CLIP_ENCODER))


@pytest.fixture(scope="module")
def reranked(ray_session, photos, clip, tmp_path_factory) -> Storage:
    """A run directory with re-ranked descriptions of two layers."""
    storage = Storage(tmp_path_factory.mktemp("run"))
    request = ModelRef("tiny/cnn", layers=LAYERS["tiny/cnn"], plugins=(PLUGIN,))
    Exemplars([request], ProbeRef((str(photos),)), ExemplarConfig(k=4, batch_size=16)).run(storage, Resources())
    run_stage(Encodings(LAYERS, ENCODER), storage, Resources())
    save_captioner(storage, "toy", captioner(), "A toy.")
    run_descriptions(storage, LAYERS, SEARCH, Resources())
    rerank_all(storage, clip)
    return storage


@pytest.fixture
def storage(reranked, tmp_path) -> Storage:
    """A copy of it for each test."""
    return Storage(shutil.copytree(reranked.root, tmp_path / "copy"))


def views(storage: Storage) -> dict[int, np.ndarray]:
    rows = [row for keys in storage.partitions(VIEWS) for row in storage.read(VIEWS, **keys).to_pylist()]
    return {row["image_id"]: np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows}


def by_hand(storage: Storage, layer: str, model: ImageText, z: float) -> dict[int, dict[str, float]]:
    """Unit → candidate → similarity, one image and one text at a time, as the reference does it."""
    meta = storage.metadata(EXEMPLARS, model="tiny/cnn", layer=layer)
    assert meta is not None
    size, images = (int(meta["mask_height"]), int(meta["mask_width"])), views(storage)
    exemplars: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for row in storage.read(EXEMPLARS, model="tiny/cnn", layer=layer).to_pylist():
        image = torch.from_numpy(images[row["image_id"]].copy()).permute(2, 0, 1)[None] / 255
        mask = torch.from_numpy(masks.unpack([row["mask"]], size)).float()
        inside, whole = model.pool(model.maps(model.fit(image)), mask, torch.tensor([0]))[0].chunk(2)
        exemplars.setdefault(row["unit"], []).append((inside, whole))
    found: dict[int, dict[str, float]] = {}
    for row in storage.read(CANDIDATES, decoder=TABLE, model="tiny/cnn", layer=layer).to_pylist():
        text, pairs = model.embed_texts([row["text"]])[0], exemplars[row["unit"]]
        total = sum((1 - z) * float(region @ text) + z * float(image @ text) for region, image in pairs)
        found.setdefault(row["unit"], {})[row["text"]] = total / len(pairs)
    return found


def test_reranked_descriptions_equal_loops_over_exemplars_and_candidates(storage, clip):
    for layer in LAYERS["tiny/cnn"]:
        expected = by_hand(storage, layer, clip.load(), clip.z)
        rows = storage.read(DESCRIPTIONS, labeler=CLIP, model="tiny/cnn", layer=layer).to_pylist()
        assert [row["unit"] for row in rows] == sorted(expected)
        for row in rows:
            of_unit = expected[row["unit"]]
            assert row["score"] == pytest.approx(max(of_unit.values()), abs=1e-5)
            assert of_unit[row["description"]] == pytest.approx(row["score"], abs=1e-5)
            assert row["n_best"][0]["text"] == row["description"]
            for label in row["n_best"]:
                assert of_unit[label["text"]] == pytest.approx(label["score"], abs=1e-5)
            assert row["lam"] is None and row["logp_d_given_e"] < 0


def test_reranked_candidates_are_a_wide_search_by_mutual_information(storage):
    ours = captioner()
    words = ours.decoder.config.ids.total
    rows = storage.read(CANDIDATES, decoder=TABLE, model="tiny/cnn", layer="2").to_pylist()
    assert {row["beam_size"] for row in rows} == {words} and len(rows) == 8 * words
    encodings = unit_features(storage.read(ENCODINGS, encoder="tiny", model="tiny/cnn", layer="2"))
    found = ours.candidates(np.stack([encodings[0]]), words, 5, mi_lam=0.5)
    assert [row["text"] for row in rows[:words]] == found.texts[0] and found.logp_d is not None
    for row, searched, prior in zip(rows, found.logp_d_given_e[0], found.logp_d[0], strict=False):
        assert row["logp_d_given_e"] - 0.5 * row["logp_d"] == pytest.approx(searched, abs=1e-5)
        assert row["logp_d"] == pytest.approx(prior, abs=1e-5)
    forced = ours.score([row["text"] for row in rows[:3]], encodings[0][None], mi=False)
    finished = [row["finished"] and "<unk>" not in row["text"] for row in rows[:3]]
    for row, likely, whole in zip(rows, forced, finished, strict=False):
        assert not whole or row["logp_d_given_e"] == pytest.approx(likely, abs=1e-4)


def test_library_call_says_the_same_as_the_job(storage, clip):
    milan = milan_ray.load("toy+clip", storage.root, clip=clip.folder, device="cpu", plugins=(PLUGIN,))
    layer, units, seen = "2", [0, 3, 5], []
    exemplars = milan_ray.open_exemplars(storage.root)
    seen = [exemplars.lookup(layer, unit) for unit in units]
    images, regions = np.stack([unit.images for unit in seen]), np.stack([unit.masks for unit in seen])
    found = milan.describe(images, regions, resize=True)
    rows = storage.read(DESCRIPTIONS, labeler=CLIP, model="tiny/cnn", layer=layer).to_pylist()
    texts = [[label["text"] for label in rows[unit]["n_best"]] for unit in units]  # texts of equal tokens are equal
    assert all(text in best for text, best in zip(found["description"], texts, strict=True))
    np.testing.assert_allclose(found["score"], [rows[unit]["score"] for unit in units], atol=1e-5)
    assert found["lam"].null_count() == len(units)
    plain = milan_ray.load("toy", storage.root, device="cpu", plugins=(PLUGIN,)).describe(images, regions, resize=True)
    rows = storage.read(DESCRIPTIONS, labeler=MILAN, model="tiny/cnn", layer=layer).to_pylist()
    assert plain["description"].to_list() == [rows[unit]["description"] for unit in units]


def test_command_line_plans_and_reranks_selected_units(storage, clip, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MILAN_MODELS_DIR", str(Path(clip.folder).parent))
    other = Storage(tmp_path / "run")
    for folder in ("exemplars", "levels", "views", "captioners"):
        os.makedirs(other.root, exist_ok=True)
        os.symlink(f"{storage.root}/{folder}", f"{other.root}/{folder}")
    options = ["--model", "tiny/cnn", "--layers", "2", "--plugin", PLUGIN, "--storage", other.root, "--no-report"]
    options += ["--decoder", "toy+clip", "--clip", CLIP_ENCODER, "--units", "0,5", "--beam-size", "6"]
    assert cli.main(["describe", *options, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    for part in (
        f"encodings     {CLIP_ENCODER} tiny/cnn 2",
        f"candidates    {TABLE} tiny/cnn 2",
        "milan+clip tiny/cnn 2",
    ):
        assert part in planned
    assert cli.main(["describe", *options]) == 0
    keys = {"model": "tiny/cnn", "layer": "2"}
    whole = storage.read(DESCRIPTIONS, labeler=CLIP, **keys).to_pylist()
    part = other.read(DESCRIPTIONS, labeler=CLIP, **keys).to_pylist()
    assert [row["unit"] for row in part] == [0, 5]
    assert [row["score"] for row in part] == pytest.approx([whole[0]["score"], whole[5]["score"]], abs=1e-5)
    capsys.readouterr()
    assert cli.main(["describe", *options, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("0 tables would be made")


def test_command_line_without_the_model_is_one_sentence(storage, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    options = ["--model", "tiny/cnn", "--plugin", PLUGIN, "--storage", storage.root]
    assert cli.main(["describe", *options, "--decoder", "toy+clip"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for part in ("clip-vit-base-patch32/config.json", str(tmp_path), "$MILAN_MODELS_DIR", "--clip"):
        assert part in error


def stamps(storage: Storage, *tables) -> dict[str, int]:
    files = [path for table in tables for path in storage.files(table.name)]
    return {path: os.stat(f"{storage.root}/{path}").st_mtime_ns for path in files}


def test_reranking_again_does_nothing_and_another_z_only_compares_again_in_any_chunks(
    storage, clip, monkeypatch, capsys
):
    tables = CANDIDATES, ENCODINGS, DESCRIPTIONS
    before = stamps(storage, *tables)
    rerank_all(storage, clip)
    assert stamps(storage, *tables) == before and "milan+clip): all up to date" in capsys.readouterr().err
    answers = []

    def watched(*arguments):
        for answer in run_pool(*arguments):
            answers.append(answer)
            yield answer

    monkeypatch.setattr(stage, "run_pool", watched)
    written: list[str] = []
    reads: list[tuple[int, int]] = []
    put, read = storage.put, rerank.SimilarityWorker._read_queries

    def noted_put(path, data):
        written.append(path)
        put(path, data)

    def noted_read(worker, number):
        reads.append((id(worker), number))
        return read(worker, number)

    monkeypatch.setattr(storage, "put", noted_put)
    monkeypatch.setattr(rerank.SimilarityWorker, "_read_queries", noted_read)
    monkeypatch.setattr(rerank, "PAIRS", 40)
    monkeypatch.setattr(rerank, "FEW_ROWS", -1)  # by tasks, as for many
    rerank_all(storage, replace(clip, z=1.0))
    assert len([path for path in written if "/pieces/" in path]) == len(answers)  # not one for each layer too
    assert len(reads) == len(set(reads)) < 2 * len(answers)  # each worker reads a layer's queries once
    after = stamps(storage, *tables)
    keys = [{"model": "tiny/cnn", "layer": layer} for layer in LAYERS["tiny/cnn"]]
    assert {path for path in before if after[path] != before[path]} == {
        storage.path(DESCRIPTIONS, labeler=CLIP, **of_layer) for of_layer in keys
    }
    texts = [
        text
        for of_layer in keys
        for text in storage.read(CANDIDATES, ["text"], decoder=TABLE, **of_layer)["text"].to_pylist()
    ]
    assert len(answers) > 2 and sum(answer["texts"] for answer in answers) == len(set(texts)) < len(texts)
    for of_layer in keys:
        expected = by_hand(storage, of_layer["layer"], clip.load(), 1.0)
        for row in storage.read(DESCRIPTIONS, labeler=CLIP, **of_layer).to_pylist():
            assert row["score"] == pytest.approx(max(expected[row["unit"]].values()), abs=1e-5)
    found = status(storage)
    assert not any(partition.state for partition in found.partitions) and not found.work


def test_chunks_of_texts_grow_before_they_become_many():
    assert [rerank.chunks_of(pairs) for pairs in (0, 8191, 16_384, 10**6)] == [1, 1, 2, 122]
    assert [rerank.chunks_of(pairs) for pairs in (8_000_000, 24_576_000)] == [512, 750]
