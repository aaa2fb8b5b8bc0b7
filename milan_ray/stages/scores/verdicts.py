"""Verdicts on descriptions (docs/verdicts.md): is a description better than others of its layer would be?

descriptions ─► distinct texts ─► text_embeddings ─┐
pooled, image_embeddings, exemplars ───────────────┴─► [per block of units: score with every text] ─► verdicts
verdicts of known concepts and of untrained networks ─► calibrations
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import Fingerprint
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
    TaskStage,
)
from milan_ray.engine.tasks import FEW_IMAGES
from milan_ray.errors import MilanError
from milan_ray.exemplars.ties import ties_of_tables
from milan_ray.models.image_text import ImageTextRef
from milan_ray.schema import CALIBRATIONS, EXEMPLARS, IMAGE_EMBEDDINGS, LEVELS, POOLED, VERDICTS
from milan_ray.scoring.auroc import auroc
from milan_ray.scoring.clarity import clarity
from milan_ray.scoring.evaluation import SHUFFLED
from milan_ray.scoring.presence import METRICS, score_presence
from milan_ray.scoring.simulation import Sigmoid
from milan_ray.scoring.verdicts import (
    Calibration,
    Evidence,
    calibrate,
    cross_correlations,
    decide,
    likeness_p,
    weigh,
)
from milan_ray.stages.embeddings import (
    IMAGES,
    ImageEmbeddings,
    embedded_ids,
    embeddings_of,
    lists_of,
    padded,
    products,
    rows_of,
    text_embeddings,
)
from milan_ray.stages.scores.inputs import (
    OWN,
    SYSTEMS,
    Classes,
    Described,
    ScoreConfig,
    Texts,
    UnitActivations,
    begun,
    check_pooled,
    upstream,
)
from milan_ray.stages.scores.sanity import DescribedSanity
from milan_ray.storage import EXEMPLARS_KEY, Storage

KERNEL_VERSION = "verdicts-1"

TRUTH = "truth"
"""Pseudo-labeler: the concepts that units are known to stand for."""

UNITS_PER_SHARD = 64
"""Units per shard."""

WIDTH = UNITS_PER_SHARD
"""Columns of a product, whatever the number of units: results must not depend on how units were cut."""

_INDEX = {system: f"{system}_text" for system in SYSTEMS}
"""System → column of a piece that has the number of a unit's text."""

_PIECE = pa.schema(
    [
        ("unit", pa.int32()),
        *((column, pa.int32()) for column in _INDEX.values()),
        *((system, pa.string()) for system in SYSTEMS),
        *((f"{system} {metric}", pa.float64()) for system in SYSTEMS for metric in METRICS),
        ("images", pa.int64()),
        ("likeness", pa.float64()),
        ("scores", pa.list_(pa.float64())),
    ]
)


class VerdictWorker(ShardWorker):
    """Scores a block of units with every description of their layer."""

    def __init__(self, images: dict[str, str], config: ScoreConfig, curve: Sigmoid | None, **context: Any) -> None:
        super().__init__(**context)
        self._images, self._config, self._curve = images, config, curve
        self._embedded = embedded_ids(self._storage, **images)

    def __call__(self, row: Row) -> Row:
        """Scores one block."""
        (number,) = row["outputs"]
        block = self._storage.get_work(self._work, f"units/{number}")[row["start"] : row["stop"]]
        texts = self._storage.get_work(self._work, f"texts/{number}")
        units, layer = block["unit"].to_pylist(), Described.of(self._outputs[number])
        responses = UnitActivations.read(self._storage, layer, units, self._config, self._embedded)
        images = embeddings_of(self._storage, **self._images, image_ids=responses.ids)
        vectors = _vectors(texts)
        spans = (slice(start, start + IMAGES) for start in range(0, len(images), IMAGES))
        blocks = (
            (responses.activations[span], responses.use[span], products(images[span], vectors, len(vectors)).numpy())
            for span in spans
        )
        scores = cross_correlations(blocks, WIDTH)
        columns = {name: block[name] for name in block.column_names}
        for system in SYSTEMS:
            fit = products(
                images, padded(rows_of(texts["embedding"])[block[_INDEX[system]].to_numpy()], WIDTH), len(units)
            )
            presence = fit.numpy() if self._curve is None else self._curve(fit.numpy())
            figures = score_presence(responses.activations, responses.use, presence, self._config.top)
            columns |= {f"{system} {metric}": pa.array(of, from_pandas=True) for metric, of in figures.items()}
        columns |= {
            "images": pa.array(responses.use.sum(axis=0)),
            "likeness": pa.array(self._likeness(layer, units, images)),
            "scores": lists_of(scores),
        }
        self._store(row, [(number, pa.table([columns[name] for name in _PIECE.names], schema=_PIECE))])
        return {}

    def _likeness(self, layer: Described, units: Sequence[int], images: np.ndarray) -> np.ndarray:
        """p-values of the likeness of each unit's exemplars: float64, NaN where there are too few."""
        table = self._storage.read(EXEMPLARS, ["unit", "image_id"], model=layer.model, layer=layer.layer)
        of, shown = table["unit"].to_numpy(), table["image_id"].to_numpy()
        ids = np.unique(shown[np.isin(of, units)])
        vectors = _unit_length(embeddings_of(self._storage, **self._images, image_ids=ids))
        sets = [vectors[np.searchsorted(ids, shown[of == unit])] for unit in units]
        alike, sizes = np.array([clarity(one) for one in sets]), np.array([len(one) for one in sets])
        others, p = _unit_length(images), np.full(len(units), np.nan)
        for k in np.unique(sizes).tolist():
            p[sizes == k] = likeness_p(alike[sizes == k], others, k, seed=self._config.seed)
        return p


class Verdicts(ShardedStage):
    """Verdicts on descriptions by a model of images and texts.

    Args:
        described: What to judge.
        images: The probe as the model sees it.
        config: Which images count, and how activations are pooled.
        truth: Layers whose units' concepts are known, to be judged as descriptions by :data:`TRUTH`.
        learning: Networks that a calibration is going to learn from in this job; None where none is made. Then the
            stored calibration gives probabilities.
    """

    worker = VerdictWorker
    table, name, counted, uses_gpus = VERDICTS, "verdicts", "blocks", False

    def __init__(
        self,
        described: Sequence[Described],
        images: ImageEmbeddings,
        config: ScoreConfig,
        truth: Classes | None = None,
        learning: Sequence[str] | None = None,
    ) -> None:
        self._truth = {Described(TRUTH, *layer): names for layer, names in (truth or {}).items()}
        self._described, self._learning = [*self._truth, *described], learning
        self._ref, self._plugins = images.ref, images.probe.plugins
        self._images, self._config, self._curve = images.keys, config, config.curve(images.embedder)
        self._identity = images.embedder.text_identity()
        self.title, self.label = f"verdicts by {images.ref.name}", f"verdicts ({images.ref.name})"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Verdicts on every labeler's descriptions of every layer.

        Raises:
            MilanError: Pooled activations are missing.
        """
        config = self._config
        identity = {
            "kernel": KERNEL_VERSION,
            "config": [config.pooling, config.share, config.seed, config.top],
            "curve": self._curve,
            "texts": self._identity,
            "images": known.config(IMAGE_EMBEDDINGS, **self._images),
        }
        learned = self._learned(known.storage)
        for layer in self._described:
            if layer in self._truth:
                check_pooled(known.storage, layer, self._images["probe"])
                of = {"model": layer.model, "layer": layer.layer}
                above: dict[str, object] = {"concepts": self._truth[layer]}
                above |= {"pooled": known.config(POOLED, **of), "exemplars": known.config(EXEMPLARS, **of)}
            else:
                above = {**upstream(known.storage, layer, self._images["probe"])}
            if learned is not None and layer.model not in learned:
                above["calibration"] = known.config(CALIBRATIONS, predictor=self._ref.name)
            yield Output({"predictor": self._ref.name, **layer.keys}, Fingerprint.of({**identity, **above}))

    def _learned(self, storage: Storage) -> Sequence[str] | None:
        """Networks that the calibration has learned from, whose units get no probability; None without one."""
        if self._learning is not None:
            return self._learning
        stored = storage.metadata(CALIBRATIONS, predictor=self._ref.name) is not None
        return calibration_of(storage, self._ref.name)[1] if stored else None

    def shards(self, job: Job) -> Shards:
        """Blocks of units, with the embeddings of their layer's distinct descriptions in the work."""
        storage = job.storage
        texts = {number: self._texts(storage, self._described[number]) for number in begun(job)}
        every = sorted(set().union(*(of_layer.every() for of_layer in texts.values())))
        embedded = text_embeddings(storage, every, self._ref, job.resources, self._plugins)
        vectors = dict(zip(every, embedded, strict=True))
        shards, few = [], True
        for output in job.due:
            own, number = texts[output.number], output.number
            few &= storage.count(POOLED, **output.of_layer) <= FEW_IMAGES
            distinct = sorted(set(own.systems[OWN]))
            place = {text: index for index, text in enumerate(distinct)}
            units: dict[str, object] = {"unit": pa.array(own.units, pa.int32())}
            for system, of_system in own.systems.items():
                units |= {_INDEX[system]: [place[text] for text in of_system], system: list(of_system)}
            storage.put_work(job.work, f"units/{number}", pa.table(units))
            matrix = np.array([vectors[text] for text in distinct], np.float32).reshape(len(distinct), -1)
            storage.put_work(job.work, f"texts/{number}", pa.table({"embedding": lists_of(matrix)}))
            for start in range(0, len(own.units), UNITS_PER_SHARD):
                row = {"start": start, "stop": start + UNITS_PER_SHARD}
                shards.append(Shard(f"{number:04d}-{start:07d}", (number,), row))
        return Shards(shards, merged_in_driver=True, run_in_driver=few)

    def _texts(self, storage: Storage, layer: Described) -> Texts:
        if layer in self._truth:
            names = self._truth[layer]
            return Texts.of(range(len(names)), names, self._config.seed)
        return Texts.read(storage, layer, self._config.seed)

    def arguments(self, job: Job) -> dict[str, Any]:
        """Which images count, and how a fit becomes a probability."""
        return {"images": self._images, "config": self._config, "curve": self._curve}

    def merge(self, storage: Storage, output: Output, pieces: Iterable[pa.Table]) -> pa.Table:
        """A layer's verdicts, from the scores of all its units with all its descriptions."""
        table = pa.concat_tables([_PIECE.empty_table(), *pieces])
        learned = self._learned(storage)
        calibration = None
        if learned is not None and output.model not in learned:
            calibration = calibration_of(storage, self._ref.name)[0]
        scores = rows_of(table["scores"]).reshape(len(table), -1)
        silent = _silent(storage, output, table["unit"].to_numpy())
        likeness = table["likeness"].to_numpy()
        rows = []
        for system in SYSTEMS:
            evidence = weigh(scores, table[_INDEX[system]].to_numpy())
            rows.append(_rows(table, system, evidence, decide(evidence, silent, likeness), calibration))
        of_exemplars = {EXEMPLARS_KEY: storage.config_of(EXEMPLARS, **output.of_layer)}
        return VERDICTS.table(output.columns(pa.concat_tables(rows)), of_exemplars)


def _rows(
    table: pa.Table,
    system: str,
    evidence: Evidence,
    verdicts: Sequence[tuple[str, str]],
    calibration: Calibration | None,
) -> pa.Table:
    """One system's rows of the table of verdicts, without the keys of the partition."""
    nothing = np.full(len(table), np.nan)
    figures = {
        **evidence._asdict(),
        "likeness": table["likeness"].to_numpy(),
        "probability": nothing if calibration is None else calibration(evidence.excess),
    }
    return pa.table(
        {
            "unit": table["unit"],
            "system": [system] * len(table),
            "description": table[system],
            "verdict": [verdict for verdict, _ in verdicts],
            "reason": [reason for _, reason in verdicts],
            **{name: pa.array(values, pa.float64(), from_pandas=True) for name, values in figures.items()},
            **{metric: table[f"{system} {metric}"] for metric in METRICS},
            "images": table["images"],
        }
    )


def _silent(storage: Storage, output: Output, units: np.ndarray) -> np.ndarray:
    """Bool (U,): units that are never active, or all of whose exemplars have the highest activation."""
    exemplars = storage.read(EXEMPLARS, ["unit", "rank", "activation"], **output.of_layer)
    stored = storage.metadata(LEVELS, **output.of_layer) is not None
    levels = storage.read(LEVELS, ["unit", "level", "positions"], **output.of_layer) if stored else None
    ties = ties_of_tables(
        exemplars,
        LEVELS.schema.empty_table() if levels is None else levels,
        storage.metadata(EXEMPLARS, **output.of_layer) or {},
    )
    every = np.union1d(exemplars["unit"].to_numpy(), [] if levels is None else levels["unit"].to_numpy())
    return np.isin(units, every[ties.dead | ties.tied])


def _vectors(texts: pa.Table) -> torch.Tensor:
    """The texts' embeddings (T, D)."""
    return torch.from_numpy(rows_of(texts["embedding"]).copy())


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, D) at length 1, float64; zeros stay."""
    vectors = vectors.astype(np.float64)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


@dataclass(frozen=True)
class Learning:
    """What a calibration learns from.

    Attributes:
        truth: Layers whose units' concepts are known: true descriptions, and false ones when shuffled.
        untrained: Descriptions of networks with random weights: false ones.
    """

    truth: Classes
    untrained: tuple[Described, ...]

    @property
    def models(self) -> list[str]:
        """The networks, whose own units get no probability."""
        return sorted({*(model for model, _ in self.truth), *(layer.model for layer in self.untrained)})


class Calibrations(TaskStage):
    """The curve from evidence to probability, of one judge.

    Args:
        ref: The model of images and texts.
        learning: What it learns from.
    """

    table, name, title = CALIBRATIONS, "calibrations", "calibration"

    def __init__(self, ref: ImageTextRef, learning: Learning) -> None:
        self._name, self._models = ref.name, learning.models
        self._layers = [*(Described(TRUTH, *layer) for layer in learning.truth), *learning.untrained]

    def outputs(self, known: Known) -> Iterator[Output]:
        """The curve, by the verdicts that it learns from."""
        verdicts = [known.config(VERDICTS, predictor=self._name, **layer.keys) for layer in self._layers]
        yield Output({"predictor": self._name}, Fingerprint.of({"calibration": 1, "verdicts": verdicts}))

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """Fits the curve.

        Raises:
            MilanError: No true or no false description has evidence.
        """
        excess: list[np.ndarray] = []
        true: list[np.ndarray] = []
        for layer in self._layers:
            table = storage.read(VERDICTS, ["system", "excess"], predictor=self._name, **layer.keys)
            systems = np.array(table["system"].to_pylist())
            values = table["excess"].to_numpy()
            of_layer = (OWN, SHUFFLED) if layer.labeler == TRUTH else (OWN,)
            for system in of_layer:
                chosen = values[systems == system]
                excess.append(chosen)
                true.append(np.full(len(chosen), layer.labeler == TRUTH and system == OWN))
        evidence, is_true = np.concatenate(excess), np.concatenate(true)
        finite = np.isfinite(evidence)
        evidence, is_true = evidence[finite], is_true[finite]
        if not is_true.any() or is_true.all():
            raise MilanError(
                "a calibration needs true and false descriptions with evidence: layers of 6 units or more "
                "with different concepts, and untrained networks with different descriptions."
            )
        curve = calibrate(evidence, is_true)
        apart = float(auroc(evidence[:, None], is_true[:, None])[0, 0])
        columns: dict[str, Any] = {"intercept": [curve.intercept], "slope": [curve.slope], "auroc": [apart]}
        columns |= {"true": [int(is_true.sum())], "false": [int((~is_true).sum())], "models": [self._models]}
        return CALIBRATIONS.table(columns, **output.keys)


def calibration_of(storage: Storage, predictor: str) -> tuple[Calibration, list[str]]:
    """A judge's stored curve, and the networks that it learned from."""
    (row,) = storage.read(CALIBRATIONS, predictor=predictor).to_pylist()
    return Calibration(row["intercept"], row["slope"]), row["models"]


def verdict_stages(
    described: Sequence[Described], images: ImageEmbeddings, config: ScoreConfig, learning: Learning | None = None
) -> list[RunnableStage]:
    """The stages that judge descriptions, and first learn a calibration if there is one to learn.

    Args:
        described: What to judge.
        images: The probe as the judge sees it.
        config: Which images count.
        learning: What a calibration learns from; None takes the stored one, if any.
    """
    judged: list[RunnableStage] = [DescribedSanity(described, images, config)] if images.embedder.view is None else []
    if learning is None:
        return [Verdicts(described, images, config), *judged]
    others = [layer for layer in described if layer not in learning.untrained]
    return [
        Verdicts(learning.untrained, images, config, learning.truth, learning.models),
        Calibrations(images.ref, learning),
        Verdicts(others, images, config, learning=learning.models),
        *judged,
    ]
