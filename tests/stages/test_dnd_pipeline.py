"""Describe-and-Dissect through the whole pipeline on a real local Ray, on units whose truth is built in."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from milan_ray import cli
from milan_ray.config import ExemplarConfig, Resources
from milan_ray.engine.references import ModelRef, ProbeRef, load, model, probe
from milan_ray.engine.status import status
from milan_ray.errors import MilanError
from milan_ray.labelers.dnd.crops import attention_boxes, crop
from milan_ray.labelers.dnd.labeler import DescribeAndDissect, best
from milan_ray.models.chat import KEYS, Limits
from milan_ray.models.generators import GeneratorRef
from milan_ray.models.image_captions import ImageCaptionerRef
from milan_ray.models.image_text import ImageTextRef
from milan_ray.probe.base import LatentProbe
from milan_ray.probe.manifest import image_refs
from milan_ray.schema import DESCRIPTIONS, DRAWINGS, EXEMPLARS, IMAGE_EMBEDDINGS, POOLED, RUNS
from milan_ray.schema.table import Table
from milan_ray.stages.dnd import stage as dnd
from milan_ray.stages.dnd.config import DndConfig, SummariserRef, drawings_identity
from milan_ray.stages.dnd.stage import dnd_stages, read_drawings, run_dnd
from milan_ray.stages.exemplars import DissectedModels, Exemplars
from milan_ray.storage import EXEMPLARS_KEY, Storage

PLUGIN = str(Path(__file__).resolve().parents[1] / "plugins/colours.py")
MODEL = ModelRef("colours/watcher", plugins=(PLUGIN,))
PROBE = ProbeRef(("colours",), plugins=(PLUGIN,))
CONFIG = ExemplarConfig(k=3, batch_size=16, shard_size=96, pooled=True)
KEYS_OF: dict[str, Any] = {"model": "colours/watcher", "layer": "seen"}
TRUTH = ("red", "green", "blue")
ONE = Resources()


@pytest.fixture(scope="module")
def how() -> DndConfig:
    return DndConfig(
        DescribeAndDissect("topk-squared-mean"), ImageCaptionerRef("colours/names"), SummariserRef(),
        GeneratorRef("world/painter"), ImageTextRef("colours/grid"), images=6, crops=2, drawn=8,
        plugins=(PLUGIN,),
    )  # fmt: skip


def run(storage: Storage, how: DndConfig, **named) -> DissectedModels:
    done = Exemplars([MODEL], PROBE, CONFIG).run(storage, ONE)
    assert dissect(storage, done, how, **named) == {}
    return done


def dissect(storage: Storage, done: DissectedModels, how: DndConfig, **named) -> dict[str, str]:
    identity = drawings_identity(storage, how)
    return run_dnd(storage, dnd_stages([MODEL], done.models, PROBE, CONFIG, how, identity, **named), ONE)


@pytest.fixture(scope="module")
def storage(ray_session, how, tmp_path_factory) -> Storage:
    found = Storage(tmp_path_factory.mktemp("dissected"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dnd, "UNITS_PER_BLOCK", 3)
        run(found, how)
    return found


def described(storage: Storage, labeler: str = "dnd") -> dict[int, dict]:
    return {row["unit"]: row for row in storage.read(DESCRIPTIONS, labeler=labeler, **KEYS_OF).to_pylist()}


def test_built_in_truth_is_named(storage):
    rows = described(storage)
    assert sorted(rows) == [0, 1, 2, 3]
    for unit, colour in enumerate(TRUTH):
        assert colour in rows[unit]["description"], rows[unit]
        assert rows[unit]["n_best"][0]["text"] == rows[unit]["description"] and rows[unit]["logp_d"] is None


class Slow:
    """The method's passes, an image at a time."""

    def __init__(self, how: DndConfig) -> None:
        self.how, self.spec, source = how, model(MODEL), probe(PROBE)
        self.network, self.embedder = self.spec.load(), load(how.embedder) if how.embedder else None
        assert not isinstance(source, LatentProbe)
        refs = image_refs(source.manifest())
        self.views = {ref.image_id: self.spec.preprocess.view(source.read(ref).image) for ref in refs}
        self.seen = {image_id: self.maps(view) for image_id, view in self.views.items()}

    def maps(self, image: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return self.network(self.spec.prepare(torch.from_numpy(image.copy())[None]))[0]

    def mean(self, image: np.ndarray, unit: int) -> float:
        return float(self.maps(image)[unit].mean())

    def embed(self, image: np.ndarray) -> np.ndarray:
        assert self.embedder is not None
        return self.embedder.embed_images(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255)[0].numpy()

    def top(self, unit: int) -> list[int]:
        return sorted(self.seen, key=lambda image_id: -float(self.seen[image_id][unit].mean()))[: self.how.images]

    def exemplars(self, unit: int) -> np.ndarray:
        """Embeddings of the unit's images and crops."""
        top = self.top(unit)
        images = [self.views[image_id] for image_id in top]
        images += [
            crop(self.views[image_id], box)
            for image_id in top
            for box in attention_boxes(self.seen[image_id][unit], (64, 64), self.how.crops)
        ]
        assert len(images) > self.how.images  # there is something to crop
        images.sort(key=lambda image: -self.mean(image, unit))
        return np.stack([self.embed(image) for image in images[: self.how.images]])


@pytest.fixture(scope="module")
def slow(how) -> Slow:
    return Slow(how)


def test_drawings_equal_loops_over_images(storage, how, slow):
    """The method once more, an image at a time."""
    drawn = load(how.generator)
    found = read_drawings(storage, "dnd", **KEYS_OF)
    for unit in range(3):
        exemplars = slow.exemplars(unit)
        assert found[unit]
        for one in found[unit]:
            new = [
                slow.spec.preprocess.view(Image.fromarray(image))
                for image in drawn.generate(how.prompt.format(one.text), how.drawn, how.seed)
            ]
            assert one.activations == pytest.approx([slow.mean(image, unit) for image in new], rel=1e-4)
            cosines = [float((exemplars @ slow.embed(image)).mean()) for image in new]
            assert one.similarities == pytest.approx(cosines, abs=1e-4)


def test_tables_say_what_they_speak_of(storage):
    for table in (DRAWINGS, DESCRIPTIONS):
        meta = storage.metadata(table, labeler="dnd", **KEYS_OF)
        assert meta[EXEMPLARS_KEY] == storage.config_of(EXEMPLARS, **KEYS_OF)
    (ran,) = [storage.read(RUNS, **keys) for keys in storage.partitions(RUNS, stage="dnd")]
    assert ran["rows"][0].as_py() == storage.count(DRAWINGS, labeler="dnd", **KEYS_OF) > 4
    assert not storage.files("_work")
    found = status(storage)
    assert "drawings" in {partition.table for partition in found.partitions}
    assert not any(partition.state for partition in found.partitions)


def stamps(storage: Storage) -> dict[str, int]:
    files = [*storage.files(DRAWINGS.name), *storage.files(DESCRIPTIONS.name)]
    return {path: os.stat(storage.uri(path)).st_mtime_ns for path in files}


def test_a_second_run_does_nothing_and_another_scoring_function_only_scores_again(storage, how, tmp_path, capsys):
    other = Storage(shutil.copytree(storage.root, tmp_path / "again", copy_function=shutil.copy2))
    before = stamps(other)
    run(other, how)
    assert stamps(other) == before and "dnd of colours/watcher: all up to date" in capsys.readouterr().err
    for scoring in ("topk-compare", "image-products", "mean"):
        run(other, replace(how, labeler=DescribeAndDissect(scoring)))
        after = stamps(other)
        assert {path for path in after if after[path] != before[path]} == {
            other.path(DESCRIPTIONS, labeler="dnd", **KEYS_OF)
        }
        for unit, drawn in read_drawings(other, "dnd", **KEYS_OF).items():
            row = described(other)[unit]
            expected = [(label.text, pytest.approx(label.score, rel=1e-5)) for label in best(scoring, drawn)]
            assert [(label["text"], label["score"]) for label in row["n_best"]] == expected


@pytest.fixture(scope="module")
def found(storage, how, tmp_path_factory) -> Storage:
    """The same units, their candidates scored by probe images; several labels at a time in two blocks of units."""
    other = Storage(shutil.copytree(storage.root, tmp_path_factory.mktemp("found") / "run"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dnd, "UNITS_PER_BLOCK", 3)
        patched.setattr(dnd, "LABELS_FOUND", 2)
        run(other, replace(how, generator=None, labeler=DescribeAndDissect("topk-squared-mean", "probe")))
    return other


def test_without_a_generator_candidates_are_scored_by_the_probe_images_that_fit_them_best(found, how, slow):
    """The search once more, an image at a time: the unit's own images are left out."""
    drawings = read_drawings(found, "dnd-probe", **KEYS_OF)
    assert sorted(drawings) == [0, 1, 2, 3]
    for unit in range(3):
        others, exemplars = set(slow.views) - set(slow.top(unit)), slow.exemplars(unit)
        for one in drawings[unit]:
            text = slow.embedder.embed_texts([one.text])[0].numpy()
            fit = {image_id: float(slow.embed(slow.views[image_id]) @ text) for image_id in others}
            best = sorted(others, key=lambda image_id: (-fit[image_id], image_id))[: how.drawn]
            expected = [slow.mean(slow.views[image_id], unit) for image_id in best]
            assert one.activations == pytest.approx(expected, rel=1e-4) and len(expected) == how.drawn
            cosines = [float((exemplars @ slow.embed(slow.views[image_id])).mean()) for image_id in best]
            assert one.similarities == pytest.approx(cosines, abs=1e-4)
    rows = described(found, "dnd-probe")
    for unit, colour in enumerate(TRUTH):
        assert colour in rows[unit]["description"], rows[unit]


def test_finding_images_draws_nothing_and_is_said(found, how, tmp_path, capsys):
    found = Storage(shutil.copytree(found.root, tmp_path / "again"))
    assert "generator" not in drawings_identity(found, replace(how, generator=None))
    again = replace(how, generator=None, labeler=DescribeAndDissect("topk-squared-mean", "probe"))
    run(found, again)
    assert "dnd-probe of colours/watcher: all up to date" in capsys.readouterr().err
    run(found, replace(again, drawn=3))
    assert "nothing is drawn: the probe images that fit a candidate best" in capsys.readouterr().err
    assert {len(one.activations) for of in read_drawings(found, "dnd-probe", **KEYS_OF).values() for one in of} == {3}
    with pytest.raises(MilanError, match="found by a model of images and texts: name one with --clip"):
        replace(again, embedder=None)


def test_found_images_do_not_depend_on_blocks(storage, found, how, tmp_path):
    other = Storage(shutil.copytree(storage.root, tmp_path / "again"))
    done = Exemplars([MODEL], PROBE, CONFIG).run(other, ONE)
    again = replace(how, generator=None, labeler=DescribeAndDissect("topk-squared-mean", "probe"))
    stages = dnd_stages([MODEL], done.models, PROBE, CONFIG, again, drawings_identity(other, again))
    assert run_dnd(other, stages, ONE) == {}
    keys = {"labeler": "dnd-probe", **KEYS_OF}
    for table in (DRAWINGS, DESCRIPTIONS):
        assert other.read(table, **keys).equals(found.read(table, **keys))


def keep(storage: Storage, table: Table, kept: set[int], **keys: str) -> dict[int, dict[str, Any]]:
    """Leaves the rows of some images in a table whose fingerprint stays; image → its row."""
    path = storage.uri(storage.path(table, **keys))
    rows = pq.ParquetFile(path).read()
    rows = rows.filter(pc.is_in(rows["image_id"], pa.array(sorted(kept))))
    pq.write_table(rows, path)
    return {row["image_id"]: row for row in rows.to_pylist()}


def test_images_that_the_model_or_the_embedder_could_not_read_fit_no_candidate(found, how, slow, tmp_path):
    holes = Storage(shutil.copytree(found.root, tmp_path / "holes"))
    embeddings = holes.partitions(IMAGE_EMBEDDINGS)[0]
    pooled = keep(holes, POOLED, {image for image in slow.views if image % 3}, **KEYS_OF)
    embedded = keep(holes, IMAGE_EMBEDDINGS, {image for image in slow.views if image % 4}, **embeddings)
    assert pooled.keys() - embedded.keys() and embedded.keys() - pooled.keys()
    run(holes, replace(how, generator=None, labeler=DescribeAndDissect("topk-squared-mean", "holes")))
    drawings = read_drawings(holes, "dnd-holes", **KEYS_OF)
    for unit in range(3):
        of_unit = {image: row["mean"][unit] for image, row in pooled.items()}
        own = sorted(of_unit, key=lambda image: (-of_unit[image], image))[: how.images]
        others = (of_unit.keys() & embedded.keys()) - set(own)
        for one in drawings[unit]:
            text = slow.embedder.embed_texts([one.text])[0].numpy()
            fit = {image: float(np.array(embedded[image]["embedding"], np.float32) @ text) for image in others}
            best = sorted(others, key=lambda image: (-fit[image], image))[: how.drawn]
            assert one.activations.tolist() == [of_unit[image] for image in best]


def test_a_probe_without_other_images_than_the_units_own_says_so(found, how, slow, tmp_path):
    other = Storage(shutil.copytree(found.root, tmp_path / "all"))
    all_own = replace(how, generator=None, images=len(slow.views), crops=0)
    with pytest.raises(MilanError, match=rf"has no probe image beside the {len(slow.views)} .* a smaller --top"):
        run(other, all_own)


@pytest.fixture
def server(monkeypatch, serve_chat) -> tuple[str, ThreadingHTTPServer]:
    """A language model's server that answers with what it is asked: the end of a caption, the first of a list."""
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        asked = request["messages"][-1]["content"]
        said = asked.split()[-2] + " things" if asked.startswith("Caption:") else asked.splitlines()[0][2:]
        return {"choices": [{"message": {"content": f"Label: {said}."}}]}

    http = serve_chat(answer)
    return f"http://127.0.0.1:{http.server_port}/v1", http


def test_a_killed_job_with_a_language_model_goes_on_without_asking_again(
    storage, how, server, tmp_path, monkeypatch, capsys
):
    other = Storage(shutil.copytree(storage.root, tmp_path / "killed"))
    url, http = server
    asks = SummariserRef(url, "small", limits=Limits(per_minute=1e9, tries=1))
    served = replace(how, labeler=DescribeAndDissect("topk-squared-mean", "served"), summariser=asks, embedder=None)

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dnd, "_publish", killed)
        run(other, served, units=(0, 2))
    assert "language model small:" in capsys.readouterr().err
    http.shutdown()
    http.server_close()
    run(other, served, units=(0, 2))
    said = capsys.readouterr().err
    for stage in ("augmented", "captions", "candidates", "drawn"):
        assert f"{stage} of colours/watcher: 1 of 1 blocks are done already" in said
    rows = described(other, "dnd-served")
    assert sorted(rows) == [0, 2] and rows[0]["description"] == "red things" and rows[2]["description"] == "blue things"
    assert all(one.similarities is None for of in read_drawings(other, "dnd-served", **KEYS_OF).values() for one in of)
    assert described(other) == described(storage)  # another tag is another partition


def test_command_line_plans_and_says_what_is_missing(storage, how, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MILAN_MODELS_DIR", str(tmp_path))
    options = ["dnd", "--model", "colours/watcher", "--probe", "colours", "--plugin", PLUGIN, "--storage", storage.root]
    options += ["--k", "3", "--batch-size", "16", "--llm", "frequent", "--dry-run"]
    same = ["--captioner", "colours/names", "--generator", "world/painter", "--clip", "colours/grid"]
    same += ["--scoring", "topk-squared-mean", "--top", "6", "--crops", "2", "--drawn", "8"]
    assert cli.main([*options, *same]) == 0
    assert capsys.readouterr().out.startswith("0 tables would be made")
    assert cli.main([*options, *same, "--units", "1", "--tag", "b", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "drawings" in out and "dnd-b colours/watcher seen" in out and out.count("missing") == 2

    assert cli.main([*options, *same, "--generator", "probe"]) == 0
    out = capsys.readouterr().out
    assert "image_embeddings" in out and "dnd-probe colours/watcher seen" in out

    for option, table in (
        (["--pooling", "max"], "drawings"),
        (["--reference-quirks"], "exemplars"),
    ):
        assert cli.main([*options, *same, *option]) == 0
        assert f"\n{table}" in f"\n{capsys.readouterr().out}"

    def error(*arguments: str) -> str:
        assert cli.main([*options, *arguments]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    assert "nobody" in error(*same, "--clip", "nobody")
    assert "clip-vit-base-patch16/config.json" in error()
    assert "blip-image-captioning-base/config.json" in error("--scoring", "mean")
    own = ("--scoring", "mean", "--captioner", "colours/names")
    assert "stable-diffusion-v1-5/model_index.json" in error(*own)
    assert "unknown generator 'world/painte'; nearest: world/painter" in error(*own, "--generator", "world/painte")
    assert "name one with --llm-model" in error(*own, "--generator", "world/painter", "--llm", "http://localhost/v1")
    assert "has no {}" in error(*own, "--prompt", "a photo")
    assert "clip-vit-base-patch16/config.json" in error(*own, "--generator", "probe")
    assert "draws nothing, --seed would do nothing" in error(*own, "--generator", "probe", "--seed", "1")


def test_what_cannot_be_dissected_says_so(storage, how):
    done = Exemplars([MODEL], PROBE, CONFIG).run(storage, ONE)
    with pytest.raises(MilanError, match="has 4 units, numbered from 0, and --units asks for 7"):
        dissect(storage, done, how, units=(7,))
    with pytest.raises(MilanError, match="scoring by topk-compare compares images"):
        replace(how, labeler=DescribeAndDissect(), embedder=None)
    with pytest.raises(MilanError, match="unknown pooling 'maxx'; nearest: max"):
        replace(how, pooling="maxx")
    truth = replace(how, embedder=ImageTextRef("world/truth"))
    with pytest.raises(MilanError, match="cannot look at drawn images"):
        dissect(storage, done, truth)
