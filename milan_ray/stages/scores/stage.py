"""Scores of descriptions (docs/scores.md): does a description say when its unit fires, on images that did not make it?

descriptions ─► texts: own, shuffled, constant ─► text_embeddings ─┐
pooled, image_embeddings, exemplars ───────────────────────────────┴─► [per block of units: all scores] ─► unit_scores
unit_scores ─► [means, intervals, differences] ─► scores
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from milan_ray.config import Fingerprint, Resources
from milan_ray.engine import references
from milan_ray.engine.actor_pool import Row
from milan_ray.engine.stage import (
    Job,
    Known,
    Output,
    RunnableStage,
    Shard,
    ShardedStage,
    Shards,
    ShardWorker,
    run_stages,
)
from milan_ray.engine.tasks import FEW_IMAGES
from milan_ray.errors import MilanError
from milan_ray.models.image_text import Embedder, ImageTextRef
from milan_ray.schema import IMAGE_EMBEDDINGS, POOLED, UNIT_SCORES, VERDICTS
from milan_ray.scoring.class_names import SIMILARITY, TOP1, class_scores
from milan_ray.scoring.simulation import Moments, Sigmoid, average_precision, highest, retrieval
from milan_ray.stages.embeddings import (
    ImageEmbeddings,
    embedded_ids,
    embeddings_of,
    lists_of,
    padded,
    products,
    rows_of,
    text_embeddings,
)
from milan_ray.stages.scores.exemplars import ExemplarScores
from milan_ray.stages.scores.inputs import (
    KERNEL_VERSION,
    ROWS_SCHEMA,
    SYSTEMS,
    Classes,
    Described,
    ScoreConfig,
    Texts,
    UnitActivations,
    begun,
    unit_scores,
    units_of,
    upstream,
)
from milan_ray.stages.scores.sanity import Sanity, truth_of
from milan_ray.stages.scores.summary import summarise, summarise_verdicts
from milan_ray.stages.scores.verdicts import Learning, verdict_stages
from milan_ray.storage import Storage

UNITS_PER_SHARD = 64
"""Units per shard, which bounds memory: a few times images × units × 4 bytes."""

IMAGES = 1024
"""Images per block of sums."""


class ScoreWorker(ShardWorker):
    """Scores a block of units of one layer."""

    def __init__(self, images: dict[str, str], config: ScoreConfig, curve: Sigmoid | None, **context: Any) -> None:
        super().__init__(**context)
        self._images, self._config, self._curve = images, config, curve
        self._embedded = embedded_ids(self._storage, **images)

    def __call__(self, row: Row) -> Row:
        """Scores one block by every metric, each system's descriptions in turn."""
        (number,) = row["outputs"]
        block = slice(row["start"], row["stop"])
        tables = {system: self._storage.get_work(self._work, f"texts/{number}/{system}")[block] for system in SYSTEMS}
        units = tables[SYSTEMS[0]]["unit"].to_pylist()
        layer = Described.of(self._outputs[number])
        responses = UnitActivations.read(self._storage, layer, units, self._config, self._embedded)
        images = embeddings_of(self._storage, **self._images, image_ids=responses.ids)
        used = responses.use.sum(axis=0).tolist()
        rows: list[dict[str, object]] = []
        for system, table in tables.items():
            scores = score_units(images, rows_of(table["embedding"]), responses, self._config, self._curve)
            for column, (unit, text) in enumerate(zip(units, table["description"].to_pylist(), strict=True)):
                about = {"unit": unit, "system": system, "description": text, "images": used[column]}
                rows += [about | {"metric": metric, "value": float(of[column])} for metric, of in scores.items()]
        self._store(row, [(number, pa.Table.from_pylist(rows, schema=ROWS_SCHEMA))])
        return {}


class Scores(ShardedStage):
    """Scores of descriptions by a model of images and texts.

    Args:
        described: What to score.
        images: The probe as the model sees it.
        config: How to score.
        classes: What each unit of a layer stands for, where that is known (:func:`class_layers`).
    """

    worker = ScoreWorker
    table, name, counted, uses_gpus = UNIT_SCORES, "scores", "blocks", False

    def __init__(
        self, described: Sequence[Described], images: ImageEmbeddings, config: ScoreConfig, classes: Classes
    ) -> None:
        self._described, self._classes = described, classes
        self._ref, self._plugins, self._width = images.ref, images.probe.plugins, images.embedder.width
        self._images, self._config, self._curve = images.keys, config, config.curve(images.embedder)
        self._texts = images.embedder.text_identity()
        self.title, self.label = f"scores by {images.ref.name}", f"scores ({images.ref.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Scores of every labeler's descriptions of every layer.

        Raises:
            MilanError: Pooled activations are missing, or there are not as many classes as units.
        """
        identity = {"kernel": KERNEL_VERSION, "config": self._config, "curve": self._curve, "texts": self._texts}
        images = known.config(IMAGE_EMBEDDINGS, **self._images)
        for layer in self._described:
            above = upstream(known.storage, layer, self._images["probe"])
            names = self._classes.get((layer.model, layer.layer))
            if names is not None and (units := units_of(known.storage, layer.model, layer.layer)) != len(names):
                raise MilanError(
                    f"{layer.model} {layer.layer} has {units} units and the model names {len(names)} classes: class "
                    "names are for the layer that puts them out; choose it with --layers."
                )
            fingerprint = Fingerprint.of({**identity, "images": images, **above, "classes": names})
            yield Output({"predictor": self._ref.name, **layer.keys}, fingerprint)

    def shards(self, job: Job) -> Shards:
        """Blocks of units, with the embeddings of their descriptions in the work.

        A last shard of a layer holds the scores by class names: they are a few products, which are made at once.
        """
        storage, config = job.storage, self._config
        texts = {number: Texts.read(storage, self._described[number], config.seed) for number in begun(job)}
        every = sorted(set().union(*(of_layer.every() for of_layer in texts.values())))
        embedded = text_embeddings(storage, every, self._ref, job.resources, self._plugins)
        vectors = dict(zip(every, embedded, strict=True))
        shards, few = [], True
        for output in job.due:
            own, number = texts[output.number], output.number
            few &= storage.count(POOLED, **output.of_layer) <= FEW_IMAGES
            for system, of_system in own.systems.items():
                embedding = np.array([vectors[text] for text in of_system], np.float32).reshape(-1, self._width)
                columns = {"unit": own.units, "description": of_system, "embedding": lists_of(embedding)}
                storage.put_work(job.work, f"texts/{number}/{system}", pa.table(columns))
            for start in range(0, len(own.units), UNITS_PER_SHARD):
                row = {"start": start, "stop": start + UNITS_PER_SHARD}
                shards.append(Shard(f"{number:04d}-{start:07d}", (number,), row))
            if names := self._classes.get((output.model, output.layer)):
                shards.append(Shard(f"{number:04d}-classes", (number,)))
                embedder = references.load(self._ref, self._plugins)
                job.store(shards[-1].name, [(number, _class_rows(own, names, vectors, embedder))])
        return Shards(shards, merged_in_driver=True, run_in_driver=few)

    def arguments(self, job: Job) -> dict[str, Any]:
        """How to score."""
        return {"images": self._images, "config": self._config, "curve": self._curve}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """A layer's scores, by block of units, and those by class names."""
        return unit_scores(output.keys, pa.concat_tables([ROWS_SCHEMA.empty_table(), *pieces]))


def score_stages(
    described: Sequence[Described],
    probe: references.ProbeRef,
    ref: ImageTextRef,
    config: ScoreConfig,
    classes: Classes | None = None,
    judged: Classes | None = None,
    learning: Learning | None = None,
) -> list[RunnableStage]:
    """The stages that score descriptions by a model of images and texts, and give them verdicts.

    Args:
        described: What to score.
        probe: The probe that it is of.
        ref: The model of images and texts, or the truth of concept maps.
        config: How to score.
        classes: What each unit of a layer stands for, to compare descriptions with.
        judged: The same, for layers on which the scores themselves are judged.
        learning: What the probabilities of verdicts are learned from in this job; None for what was learned earlier.

    Raises:
        MilanError: The model is missing, or scores are to be judged by a model.
    """
    images = ImageEmbeddings(ref, probe, None if judged is None else truth_of(ref, probe))
    scores = Scores(described, images, config, classes or {})
    stages: list[RunnableStage] = [images, scores, ExemplarScores(described, images)]
    stages += verdict_stages(described, images, config, learning)
    return stages if judged is None else [*stages, Sanity(images, config, judged)]


def run_scores(
    storage: Storage, stages: Iterable[RunnableStage], config: ScoreConfig, resources: Resources
) -> list[str]:
    """Runs stages that score by one judge, and sums their scores up.

    Args:
        storage: The run directory, which holds descriptions, exemplars and pooled activations.
        stages: The stages.
        config: How they score.
        resources: What of the cluster to use; Ray must be connected.

    Returns:
        The experiments of table ``scores``: scores and verdicts per model, and those that judge scores.
    """
    keys = [output.keys for output in run_stages(stages, storage, resources)]
    scored = sorted({(of["predictor"], of["model"]) for of in keys if {"predictor", "model"} <= {*of}})
    summaries = [
        summarise(storage, predictor, model, config)
        for predictor, model in scored
        if storage.partitions(UNIT_SCORES, predictor=predictor, model=model)
    ]
    judged = [pair for pair in scored if storage.partitions(VERDICTS, predictor=pair[0], model=pair[1])]
    summaries += [summarise_verdicts(storage, predictor, model, config) for predictor, model in judged]
    return [*summaries, *(of["experiment"] for of in keys if "experiment" in of)]


def score_units(
    images: np.ndarray, texts: np.ndarray, responses: UnitActivations, config: ScoreConfig, curve: Sigmoid | None
) -> dict[str, np.ndarray]:
    """Scores the descriptions of some units by a model of images and texts.

    Args:
        images: Embeddings of N images, float32 (N, D).
        texts: Embedding of one description per unit, float32 (B, D).
        responses: Activations of the units for the images.
        config: How to score.
        curve: From a fit to a prediction; None takes the fit.

    Returns:
        Metric → float64 (B,); NaN for a unit whose activation never changes.
    """
    fit = products(images, padded(texts, max(UNITS_PER_SHARD, len(texts))), len(texts)).numpy()
    simulated, plain = Moments(), Moments()
    for block, start in enumerate(range(0, len(fit), IMAGES)):
        rows = slice(start, start + IMAGES)
        predicted = fit[rows].astype(np.float64) if curve is None else curve(fit[rows])
        simulated.update(block, responses.activations[rows], predicted, responses.use[rows])
        plain.update(block, responses.activations[rows], fit[rows], responses.use[rows])
    scores = {"simulation": simulated.result(), "correlation": plain.result()}
    for name in ("auprc", "retrieval-auc", "retrieval-mad"):
        scores[name] = np.full(len(texts), np.nan)
    for column in range(len(texts)):
        use = responses.use[:, column]
        own, near = responses.activations[use, column], fit[use, column]
        if not len(own) or own.min() == own.max():
            scores["simulation"][column] = scores["correlation"][column] = np.nan
            continue
        scores["auprc"][column] = average_precision(near, highest(own, max(1, round(config.top * len(own)))))
        chosen = highest(near, min(config.retrieved, len(own) // 2))
        scores["retrieval-auc"][column], scores["retrieval-mad"][column] = retrieval(own, chosen)
    return scores


def _class_rows(
    texts: Texts, names: tuple[str, ...], vectors: Mapping[str, np.ndarray], embedder: Embedder
) -> pa.Table:
    """Scores how well descriptions of a classifier's outputs name their classes."""
    classes = embedder.embed_texts(names).cpu().numpy()
    rows: list[dict[str, object]] = []
    for system, own in texts.systems.items():
        for unit, text in zip(texts.units, own, strict=True):
            scores = class_scores(vectors[text], classes, unit)
            rows += [
                {"unit": unit, "system": system, "description": text, "metric": metric, "value": value, "images": 0}
                for metric, value in zip((SIMILARITY, TOP1), scores, strict=True)
            ]
    return pa.Table.from_pylist(rows, schema=ROWS_SCHEMA)
