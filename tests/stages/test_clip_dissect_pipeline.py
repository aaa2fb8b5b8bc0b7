"""CLIP-Dissect and its embeddings on a real local Ray, against dense matrices."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from milan_ray.config import ContrastConfig, ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef, probe
from milan_ray.engine.stage import run_stage
from milan_ray.engine.status import status
from milan_ray.errors import MilanError
from milan_ray.exemplars.pooled import matrix
from milan_ray.labelers.clip_dissect import CLIP_DISSECT, CLIP_DISSECT_CONTRAST, SIMILARITIES, WPMI, ClipDissect
from milan_ray.models.image_text import ImageText, ImageTextRef
from milan_ray.probe.manifest import image_refs
from milan_ray.schema import CONTRASTS, DESCRIPTIONS, EXEMPLARS, IMAGE_EMBEDDINGS, MANIFEST, POOLED, TEXT_EMBEDDINGS
from milan_ray.scoring.simulation import held_out
from milan_ray.stages import clip_dissect, embeddings
from milan_ray.stages.clip_dissect import clip_dissect_stages
from milan_ray.stages.contrasts import ContrastSource
from milan_ray.stages.embeddings import ImageEmbeddings, image_embeddings, text_embeddings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.storage import EXEMPLARS_KEY, Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/tiny_models.py")
LAYERS = {"tiny/cnn": ("0", "2")}
WORDS = ("a", "red", "house", "dog", "dogs", "on", "grass", "dark", "areas", "the")
CONCEPTS = tuple(f"{one} {other}" for one in WORDS[:4] for other in WORDS)
HOLD_OUT = {"soft_wpmi": 0.3, "cos_similarity": 0.5}
CONFIG = ExemplarConfig(k=4, batch_size=16, pooled=True)
ONE = Resources()


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory) -> Path:
    """Fifty photographs and a file that is none."""
    place = tmp_path_factory.mktemp("probe")
    for file in sorted(photos.rglob("*.png"))[:50]:
        (place / file.name).write_bytes(file.read_bytes())
    (place / "020x.png").write_bytes(b"no image")
    return place


@pytest.fixture(scope="module")
def request_of(save_clip, tmp_path_factory) -> ImageTextRef:
    return ImageTextRef(save_clip(tmp_path_factory.mktemp("models") / "tiny-clip"))


@pytest.fixture(scope="module")
def dissected(ray_session, folder, tmp_path_factory) -> Storage:
    storage = Storage(tmp_path_factory.mktemp("run"))
    request = ModelRef("tiny/cnn", layers=LAYERS["tiny/cnn"], plugins=(PLUGIN,))
    Exemplars([request], ProbeRef((str(folder),)), CONFIG).run(storage, ONE)
    return storage


@pytest.fixture
def storage(dissected, tmp_path) -> Storage:
    """A copy of it for each test."""
    return Storage(shutil.copytree(dissected.root, tmp_path / "copy"))


def source(folder: Path) -> ProbeRef:
    return ProbeRef((str(folder),))


def dissect(
    storage: Storage, layers: dict, folder: Path, how: ClipDissect, ref: ImageTextRef, units: tuple = ()
) -> None:
    for stage in clip_dissect_stages(layers, source(folder), how, ref, units):
        run_stage(stage, storage, ONE)


def stamps(storage: Storage, *tables) -> dict[str, int]:
    files = [path for table in tables for path in storage.files(table.name)]
    return {path: os.stat(f"{storage.root}/{path}").st_mtime_ns for path in files}


def test_every_readable_image_is_embedded_once_as_if_alone(storage, folder, request_of, monkeypatch, capsys):
    monkeypatch.setattr(embeddings, "SHARD", 20)
    stage = ImageEmbeddings(request_of, source(folder))
    run_stage(stage, storage, ONE)
    digest = stage.digest
    ids, found = image_embeddings(storage, "tiny-clip", digest)
    model = ImageText(request_of.folder)
    manifest = storage.read(MANIFEST, probe=digest)
    expected = []
    for ref in image_refs(manifest):
        if ref.path != "020x.png":
            view = model.view(Image.open(folder / ref.path).convert("RGB"))
            pixels = torch.from_numpy(view.copy()).permute(2, 0, 1)[None].float() / 255
            expected.append((ref.image_id, model.maps(pixels)[1][0].numpy()))
    assert ids.tolist() == [image_id for image_id, _ in expected] and len(ids) == 50
    np.testing.assert_allclose(found, np.stack([row for _, row in expected]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert "1 of 51 images could not be read" in capsys.readouterr().err
    before = stamps(storage, IMAGE_EMBEDDINGS)
    run_stage(stage, storage, ONE)
    assert stamps(storage, IMAGE_EMBEDDINGS) == before
    few = embeddings.embeddings_of(storage, "tiny-clip", digest, ids[[3, 30]])
    np.testing.assert_array_equal(few, found[[3, 30]])


def test_texts_are_embedded_once_by_driver_or_pool(storage, request_of, monkeypatch):
    texts = ["red house", "a dog", "red house", "dark areas"]
    found = text_embeddings(storage, texts, request_of, ONE)
    expected = ImageText(request_of.folder).embed_texts(texts).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[0], found[2])
    before = stamps(storage, TEXT_EMBEDDINGS)
    text_embeddings(storage, texts[::-1], request_of, ONE)
    assert stamps(storage, TEXT_EMBEDDINGS) == before
    monkeypatch.setattr(embeddings, "FEW_TEXTS", 1)
    monkeypatch.setattr(embeddings, "CHUNK", 2)
    np.testing.assert_allclose(text_embeddings(storage, texts[1:], request_of, ONE), expected[1:], atol=1e-6)


def dense(storage: Storage, layer: str, request: ImageTextRef, how: ClipDissect) -> np.ndarray:
    """Similarities (units, concepts) from whole matrices, as CLIP-Dissect's paper says."""
    (keys,) = storage.partitions(IMAGE_EMBEDDINGS)
    ids, images = image_embeddings(storage, **keys)
    texts = ImageText(request.folder).embed_texts(how.concepts).numpy()
    fit = (images @ texts.T).astype(float)
    table = storage.read(POOLED, model="tiny/cnn", layer=layer)
    assert table["image_id"].to_pylist() == ids.tolist()
    act = matrix(table[how.pooling]).astype(float)
    kept = ~held_out(ids, how.hold_out)
    ids, fit, act = ids[kept], fit[kept], act[kept]
    if how.similarity.startswith("cos"):
        own, near = (values - values.mean(axis=0) for values in (act, fit))
        if how.similarity.endswith("cubed"):
            own, near = own**3, near**3
        lengths = [np.maximum(np.linalg.norm(values, axis=0), 1e-3) for values in (own, near)]
        return (own / lengths[0]).T @ (near / lengths[1])
    order = np.argsort(-act, axis=0, kind="stable")[: how.images(len(ids))].T
    found = np.zeros((act.shape[1], len(how.concepts)))
    for unit, best in enumerate(order):
        if how.similarity == "rank_reorder":
            own, near = act[best, unit], fit[best]
            ranks = np.argsort(np.argsort(-near, axis=0, kind="stable"), axis=0)
            rng = np.random.default_rng(0)
            usual = np.mean([np.mean(np.abs(own - own[rng.permutation(len(own))]) ** 3) for _ in range(5)])
            errors = np.mean(np.abs(own[:, None] - own[ranks]) ** 3, axis=0)
            found[unit] = -errors / max(usual, 1e-300) / np.sqrt(np.maximum(near.mean(axis=0), 1e-3))
            continue
        parameters = WPMI[how.similarity]
        p = np.exp(parameters.a * fit)
        p = (p / p.sum(axis=1, keepdims=True))[best]
        if how.similarity == "wpmi":
            found[unit] = np.log(p + 1e-7).sum(axis=0)
        else:
            w = 0.998 - np.arange(len(best)) / len(best) * 0.028
            found[unit] = np.log(1 + w[:, None] * (p - 1) + 1e-7).sum(axis=0)
    if how.wpmi is None:
        return found
    prior = np.log(np.exp(found - found.max(axis=0)).mean(axis=0)) + found.max(axis=0)
    return found - how.wpmi.lam * prior


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_labels_equal_dense_matrices(storage, folder, request_of, similarity, monkeypatch):
    how = ClipDissect(CONCEPTS, similarity, "max" if similarity == "wpmi" else "mean", HOLD_OUT.get(similarity, 0.0))
    assert clip_dissect.chunk_of(len(CONCEPTS)) == 16  # three chunks, the last of eight
    if similarity == "soft_wpmi":
        monkeypatch.setattr(clip_dissect, "FEW", 0)  # by tasks of Ray
    dissect(storage, LAYERS, folder, how, request_of)
    for layer in LAYERS["tiny/cnn"]:
        expected = dense(storage, layer, request_of, how)
        keys = {"labeler": CLIP_DISSECT, "model": "tiny/cnn", "layer": layer}
        rows = storage.read(DESCRIPTIONS, **keys).to_pylist()
        assert [row["unit"] for row in rows] == list(range(len(expected)))
        alive = storage.read(POOLED, model="tiny/cnn", layer=layer)[how.pooling]
        spread = np.ptp(matrix(alive), axis=0)
        for row, own in zip(rows, expected, strict=True):
            if not spread[row["unit"]]:
                assert row["description"] == "none" and row["score"] == 0
                continue
            assert row["score"] == pytest.approx(own.max(), rel=1e-4, abs=1e-4)
            for label, score in zip(row["n_best"], np.sort(own)[::-1], strict=False):
                assert label["score"] == pytest.approx(score, rel=1e-4, abs=1e-4)
                assert own[CONCEPTS.index(label["text"])] == pytest.approx(label["score"], rel=1e-4, abs=1e-4)
        meta = storage.metadata(DESCRIPTIONS, **keys)
        assert meta[EXEMPLARS_KEY] == storage.config_of(EXEMPLARS, model="tiny/cnn", layer=layer)
    assert not storage.files("_work")


@pytest.mark.parametrize("similarity", ["soft_wpmi", "wpmi"])
def test_labels_with_contrasts_equal_dense_matrices(storage, folder, request_of, similarity):
    how, plain = ClipDissect(CONCEPTS, similarity, mu=0.6), ClipDissect(CONCEPTS, similarity)
    model = ModelRef("tiny/cnn", layers=LAYERS["tiny/cnn"], plugins=(PLUGIN,))
    images = ImageEmbeddings(request_of, source(folder))
    contrasts = ContrastSource(images, {"tiny/cnn": model}, CONFIG, ContrastConfig(3, 2))
    for stage in clip_dissect_stages(LAYERS, source(folder), how, request_of, (), contrasts):
        run_stage(stage, storage, ONE)
    parameters = WPMI[similarity]
    ids, embedded = image_embeddings(storage, **images.keys)
    p = np.exp(parameters.a * (embedded @ ImageText(request_of.folder).embed_texts(CONCEPTS).numpy().T).astype(float))
    p /= p.sum(axis=1, keepdims=True)
    for layer in LAYERS["tiny/cnn"]:
        expected, keys = dense(storage, layer, request_of, plain), {"model": "tiny/cnn", "layer": layer}
        chosen = storage.read(CONTRASTS, encoder=images.ref.name, **keys).to_pylist()
        most = max(row["rank"] for row in chosen) + 1
        for row in storage.read(DESCRIPTIONS, labeler=CLIP_DISSECT_CONTRAST, **keys).to_pylist():
            own = expected[row["unit"]]
            others = np.searchsorted(ids, [each["image_id"] for each in chosen if each["unit"] == row["unit"]])
            if len(others):
                w = np.ones(most) if parameters.soft is None else 0.998 - np.arange(most) / most * 0.028
                near, small = p[others], 1e-7
                terms = near + small if parameters.soft is None else 1 + w[: len(near), None] * (near - 1) + small
                own = own - 0.6 * how.images(len(ids)) / len(others) * np.log(terms).sum(axis=0)
            elif row["description"] == "none":
                continue
            for label in row["n_best"]:
                assert own[CONCEPTS.index(label["text"])] == pytest.approx(label["score"], rel=1e-4, abs=1e-4)
            assert row["score"] == pytest.approx(own.max(), rel=1e-4, abs=1e-4)
        meta = storage.metadata(DESCRIPTIONS, labeler=CLIP_DISSECT_CONTRAST, **keys) or {}
        assert meta["contrasts"] == images.ref.name and meta["mu"] == "0.6"
    assert not storage.partitions(DESCRIPTIONS, labeler=CLIP_DISSECT)


def test_contrasts_of_a_similarity_that_has_no_use_for_them_are_one_sentence():
    with pytest.raises(MilanError, match="--similarity soft_wpmi or wpmi"):
        ClipDissect(CONCEPTS, "rank_reorder", mu=0.1)
    assert "mu" not in ClipDissect(CONCEPTS).identity()


def test_a_killed_job_goes_on_and_a_second_run_does_nothing(storage, folder, request_of, tmp_path, monkeypatch, capsys):
    mine = Storage(shutil.copytree(storage.root, tmp_path / "killed"))
    how = ClipDissect(CONCEPTS[::-1])
    dissect(storage, LAYERS, folder, how, request_of)
    whole = {path: storage.get(path) for path in storage.files("descriptions")}

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(clip_dissect, "publish", killed)
        dissect(mine, LAYERS, folder, how, request_of)
    compared = [path for path in mine.files("_work") if "/best/" in path]  # one piece per chunk, not per layer too
    assert len(compared) == len({Path(path).name for path in compared}) > 1
    (gone,) = [path for path in compared if path.endswith("/0000016.parts")]
    mine.remove_file(gone)
    dissect(mine, LAYERS, folder, how, request_of)
    assert {path: mine.get(path) for path in mine.files("descriptions")} == whole
    before = stamps(mine, DESCRIPTIONS)
    capsys.readouterr()
    dissect(mine, LAYERS, folder, how, request_of)
    assert stamps(mine, DESCRIPTIONS) == before and "clip-dissect): all up to date" in capsys.readouterr().err
    assert not any(partition.state for partition in status(mine).partitions)


def test_what_cannot_be_labelled_says_so(storage, folder, request_of, tmp_path):
    how = ClipDissect(CONCEPTS)
    with pytest.raises(MilanError, match="has 6 units, numbered from 0, and --units asks for 9"):
        dissect(storage, {"tiny/cnn": ("0",)}, folder, how, request_of, (9,))
    mine = Storage(shutil.copytree(storage.root, tmp_path / "refused"))
    mine.remove(POOLED.name)
    with pytest.raises(MilanError, match="no pooled activations of this probe; make them with --pooled"):
        dissect(mine, LAYERS, folder, how, request_of)
    assert probe(source(folder)).manifest().num_rows == 51
