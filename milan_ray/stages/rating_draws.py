"""Images for people to rate: which show what a unit's description names?

descriptions, pooled, exemplars, (image_embeddings) ─► [task per layer: draw] ─► rating_draws ─► images and task files
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from milan_ray.annotations import rating_tasks
from milan_ray.annotations.collection import TEMPLATES
from milan_ray.annotations.layout import whole_folder
from milan_ray.annotations.rating_tasks import RatingTask
from milan_ray.config import Fingerprint
from milan_ray.engine import references
from milan_ray.engine.stage import Known, Output, RunnableStage, TaskStage
from milan_ray.errors import MilanError
from milan_ray.exemplars.forward import read_views
from milan_ray.models.registry import ModelSpec
from milan_ray.probe.base import ImageRef, LatentProbe
from milan_ray.probe.manifest import digest as probe_digest
from milan_ray.progress import Progress
from milan_ray.schema import DESCRIPTIONS, IMAGE_EMBEDDINGS, MANIFEST, RATING_DRAWS
from milan_ray.scoring.rating_draws import MIXTURES, draw, features, prior_features, proposal
from milan_ray.scoring.simulation import highest
from milan_ray.stages.annotations_collect import IMAGES, LABEL_STUDIO, SMALLEST, TASKS
from milan_ray.stages.embeddings import ImageEmbeddings, embedded_ids, embeddings_of, lists_of
from milan_ray.stages.images import read_refs
from milan_ray.stages.scores.inputs import Described, ScoreConfig, UnitActivations, upstream
from milan_ray.storage import Storage

KERNEL_VERSION = "rating-draws-1"

UNITS_AT_ONCE = 64
"""Units whose activations are in memory at a time."""

FEWEST = 20
"""Fewest draws per unit: weights are calibrated on up to six features."""

PICTURES_AT_ONCE = 64
"""Images read at a time."""


@dataclass(frozen=True)
class DrawConfig:
    """How images are drawn for a description.

    Attributes:
        sampling: ``importance`` or ``uniform``.
        draws: Draws per unit.
        top: Share of the images, by highest activation, that count as exciting the unit.
        pooling: ``mean`` or ``max``: what stands for an activation map.
        seed: Seed of the draws.
    """

    sampling: Literal["importance", "uniform"] = "importance"
    draws: int = 100
    top: float = 0.01
    pooling: Literal["mean", "max"] = "mean"
    seed: int = 0


class RatingDraws(TaskStage):
    """Draws the images of every description of some layers.

    Args:
        described: Descriptions to be rated, by layer.
        digest: Digest of the manifest of the probe that activations are of.
        images: The probe as a judge sees it; None without a judge.
        config: How to draw.
        units: Which units of each layer; none takes all.

    Raises:
        MilanError: There are too few draws.
    """

    table, name, title = RATING_DRAWS, "rating_draws", "draws of images to rate"

    def __init__(
        self,
        described: Sequence[Described],
        digest: str,
        images: ImageEmbeddings | None,
        config: DrawConfig,
        units: tuple[int, ...] = (),
    ) -> None:
        if config.draws < FEWEST:
            raise MilanError(f"a score needs at least {FEWEST} images: raise --images.")
        self._described, self._digest, self._images = described, digest, images
        self._config, self._units = config, units

    def outputs(self, known: Known) -> Iterator[Output]:
        """The draws of every layer.

        Raises:
            MilanError: There are no pooled activations of the probe.
        """
        judge: dict[str, object] = {}
        if self._images is not None:
            texts = self._images.embedder.text_identity()
            judge = {"judge": known.config(IMAGE_EMBEDDINGS, **self._images.keys), "texts": texts}
        mixture = MIXTURES[self._config.sampling]
        for layer in self._described:
            above = upstream(known.storage, layer, self._digest)
            inputs = {"kernel": KERNEL_VERSION, "config": self._config, "mixture": mixture, **judge, **above}
            yield Output(layer.keys, Fingerprint.of(inputs, self._units))

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """Draws for the units that have a description."""
        table = storage.read(DESCRIPTIONS, ["unit", "description"], **output.keys)
        units = [
            (unit, text)
            for unit, text in zip(table["unit"].to_pylist(), table["description"].to_pylist(), strict=True)
            if text and (not self._units or unit in self._units)
        ]
        parts = [
            part
            for start in range(0, len(units), UNITS_AT_ONCE)
            for part in self._draw(storage, output, units[start : start + UNITS_AT_ONCE])
        ]
        if not parts:
            raise MilanError(f"none of the chosen units of {output.model} {output.layer} has a description to rate.")
        meta = {"probe": self._digest, "sampling": json.dumps(asdict(self._config))}
        rows = pa.concat_tables(parts)
        return RATING_DRAWS.table(output.columns(rows), meta)

    def _draw(self, storage: Storage, output: Output, units: Sequence[tuple[int, str]]) -> Iterator[pa.Table]:
        config, scored = self._config, ScoreConfig(pooling=self._config.pooling)
        layer, numbers = Described.of(output), [unit for unit, _ in units]
        known = None if self._images is None else embedded_ids(storage, **self._images.keys)
        responses = UnitActivations.read(storage, layer, numbers, scored, known)
        fits = None
        if self._images is not None:
            texts = self._images.embedder.embed_texts([text for _, text in units]).cpu().numpy()
            fits = embeddings_of(storage, **self._images.keys, image_ids=responses.ids) @ texts.T
        for column, (unit, text) in enumerate(units):
            use = responses.use[:, column]
            if not use.any():
                continue
            activations = responses.activations[use, column]
            fit = None if fits is None else fits[use, column]
            yield _unit_draws(unit, text, responses.ids[use], activations, fit, config)


def _unit_draws(
    unit: int, text: str, ids: np.ndarray, activations: np.ndarray, fit: np.ndarray | None, config: DrawConfig
) -> pa.Table:
    """The draws of one unit, which depend on nothing but the unit."""
    q = proposal(activations, fit, MIXTURES[config.sampling])
    drawn = draw(q, config.draws, np.random.default_rng([config.seed, unit]))
    top = highest(activations, max(1, round(config.top * len(activations))))
    columns = {
        "unit": pa.array(np.full(len(drawn), unit), pa.int32()),
        "description": pa.array([text] * len(drawn)),
        "image_id": ids[drawn],
        "weight": 1 / (len(q) * q[drawn]),
        "activation": activations[drawn].astype(np.float64),
        "top": top[drawn],
        "calibration": lists_of(features(activations, top, fit)[drawn]),
        "prior": lists_of(prior_features(activations, fit)[drawn]),
    }
    return pa.table(columns)


def draw_stages(
    described: Sequence[Described],
    probe: references.ProbeRef,
    images: ImageEmbeddings | None,
    config: DrawConfig,
    units: tuple[int, ...] = (),
) -> list[RunnableStage]:
    """The stages that draw images; arguments as of :class:`RatingDraws`.

    Raises:
        MilanError: The probe holds a generator's latents, or there are too few draws.
    """
    source = references.probe(probe)
    if isinstance(source, LatentProbe):
        raise MilanError("a generator's latents are no images to rate: give a probe of images.")
    draws = RatingDraws(described, probe_digest(source.manifest()), images, config, units)
    return [draws] if images is None else [images, draws]


def run_collect_ratings(
    storage: Storage,
    folder: Path,
    outputs: Sequence[Output],
    probe: references.ProbeRef,
    spec: ModelSpec,
    *,
    units: Sequence[int] = (),
    url: str = "",
) -> int:
    """Writes the tasks in which people rate drawn images; a folder that exists is complete.

    Into the folder: ``images/``, every drawn image as the model sees it; ``tasks.csv`` and ``mturk.html`` for
    Mechanical Turk; ``label-studio.jsonl`` and ``label-studio.xml`` for Label Studio. Tasks are in an order that tells
    raters nothing.

    Args:
        storage: The run directory.
        folder: Folder to be made.
        outputs: Of the stages of :func:`draw_stages`, which have run.
        probe: The images.
        spec: The model, whose view of the images is shown.
        units: Only tasks of these units; none takes all.
        url: What images' addresses begin with.

    Returns:
        How many tasks.

    Raises:
        MilanError: A table or an image is missing, or the folder is there already or cannot be written.
    """
    with whole_folder(folder) as part:
        tasks: list[RatingTask] = []
        for output in (each for each in outputs if "labeler" in each.keys):
            tasks += _tasks(storage, output, units, lambda image: f"{url}{IMAGES}/{image}.jpg")
        if not tasks:
            raise MilanError(f"none of the chosen units of {spec.name} has draws: choose others with --units.")
        _write_images(storage, part, probe, spec, sorted({task.image_id for task in tasks}))
        _write_tasks(part, sorted(tasks, key=lambda task: task.place))
    return len(tasks)


def _tasks(
    storage: Storage, output: Output, units: Sequence[int], address: Callable[[int], str]
) -> Iterator[RatingTask]:
    """One task for each distinct image of each unit."""
    draws = storage.config_of(RATING_DRAWS, **output.keys)
    labeler, model, layer = (output.keys[name] for name in RATING_DRAWS.partition)
    rows = storage.read(RATING_DRAWS, ["unit", "image_id", "description"], **output.keys).to_pylist()
    for unit, image, text in dict.fromkeys(tuple(row.values()) for row in rows):
        if not units or unit in units:
            yield RatingTask(labeler, model, layer, unit, image, draws, text, address(image))


def _write_images(
    storage: Storage, folder: Path, probe: references.ProbeRef, spec: ModelSpec, image_ids: Sequence[int]
) -> None:
    """Writes images as the model sees them, small ones enlarged.

    Raises:
        MilanError: One can no longer be read.
    """
    source = references.probe(probe)
    assert not isinstance(source, LatentProbe)
    (folder / IMAGES).mkdir()
    refs = _refs(storage, probe_digest(source.manifest()), image_ids)
    with Progress("pictures", len(refs), "images") as progress:
        for start in range(0, len(refs), PICTURES_AT_ONCE):
            now = refs[start : start + PICTURES_AT_ONCE]
            batch = read_views(source, now, spec.preprocess.view)
            if len(batch.ids) < len(now):
                unread = sorted({ref.image_id for ref in now} - set(batch.ids.tolist()))
                raise MilanError(f"image {unread[0]} of the probe can no longer be read: restore it and run again.")
            for image_id, view in zip(batch.ids.tolist(), batch.views, strict=False):
                picture = Image.fromarray(view)
                factor = -(-SMALLEST // min(picture.size))
                if factor > 1:
                    size = picture.width * factor, picture.height * factor
                    picture = picture.resize(size, Image.Resampling.NEAREST)
                picture.save(folder / IMAGES / f"{image_id}.jpg", quality=90, subsampling=0)
                progress.advance()


def _refs(storage: Storage, digest: str, image_ids: Sequence[int]) -> list[ImageRef]:
    """References to images of a probe, ascending."""
    wanted = set(image_ids)
    total = storage.count(MANIFEST, probe=digest)
    return [ref for ref in read_refs(storage, digest, 0, total) if ref.image_id in wanted]


def _write_tasks(folder: Path, tasks: Sequence[RatingTask]) -> None:
    files = {
        TASKS: rating_tasks.ratings_csv(tasks),
        LABEL_STUDIO: rating_tasks.ratings_jsonl(tasks),
        "mturk.html": (TEMPLATES / "mturk-rating.html").read_text(encoding="utf-8"),
        "label-studio.xml": (TEMPLATES / "label-studio-rating.xml").read_text(encoding="utf-8"),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
