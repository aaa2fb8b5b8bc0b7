"""Scores of descriptions (docs/scores.md): does a description say when its unit fires, on images that did not make it?

descriptions ─► texts: own, shuffled, constant ─► text_embeddings ─┐
pooled, image_embeddings, exemplars ───────────────────────────────┴─► [per block of units: all scores] ─► unit_scores
unit_scores ─► [means, intervals, differences] ─► scores
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from milan_ray.config import Fingerprint, Resources, config_hash
from milan_ray.device import torch_threads
from milan_ray.engine import references
from milan_ray.engine.run_log import Cost, record_run
from milan_ray.engine.stage import Known, Output, Stage, TaskStage, run_stage
from milan_ray.engine.tasks import FEW_IMAGES, removed_if_damaged, retry_if_overtaken, run_parallel
from milan_ray.errors import MilanError
from milan_ray.exemplars.pooled import matrix
from milan_ray.models.image_text import Embedder, ImageText, ImageTextRef
from milan_ray.progress import Progress, say
from milan_ray.schema import DESCRIPTIONS, EXEMPLARS, IMAGE_EMBEDDINGS, POOLED, SCORES, UNIT_SCORES
from milan_ray.scoring.bootstrap import difference, interval, ratio, resampling_counts
from milan_ray.scoring.clarity import clarity, polysemanticity, redundancy
from milan_ray.scoring.evaluation import CONSTANT, SHUFFLED, Row, score_table, shuffled, unit_values
from milan_ray.scoring.score_sanity import sanity
from milan_ray.scoring.score_sanity import scores as measures
from milan_ray.scoring.simulation import (
    SIGMOIDS,
    Moments,
    Sigmoid,
    average_precision,
    held_out,
    highest,
    retrieval,
)
from milan_ray.stages.embeddings import (
    embeddings_of,
    image_embeddings,
    lists_of,
    rows_of,
    run_image_embeddings,
    text_embeddings,
)
from milan_ray.storage import Storage

KERNEL_VERSION = "scores-1"

OWN = "own"
"""System: a unit's own description, beside those that cost nothing."""

SYSTEMS = (OWN, SHUFFLED, CONSTANT)

WORDLESS = "exemplars"
"""In the place of a labeler: scores of exemplars alone."""

UNITS = 64
"""Units per piece of work: what bounds memory, images × units × 4 bytes a few times over."""

IMAGES = 1024
"""Images per matrix product, and per block of sums."""

READINGS = {
    "simulation": "correlation of the unit's activation with what its description predicts (sigmoid of the fit)",
    "correlation": "correlation of the unit's activation with the fit of image and description as it is",
    "auprc": "area under precision and recall of the fit, for the images that excite the unit most",
    "retrieval-auc": "AUC of the unit's activation for the images nearest to its description; blind to what it leaves "
    "out",
    "retrieval-mad": "how many standard deviations more the unit fires on the images nearest to its description; blind "
    "to what it leaves out",
    "cosy-auc": "AUC of the unit's activation for images generated from its description; blind to what it leaves out",
    "cosy-mad": "how many standard deviations more the unit fires on images generated from its description; blind to "
    "what it leaves out",
    "class-similarity": "product of the embeddings of description and class name",
    "class-top1": "share of units whose class name is nearer to the description than all other class names",
    "clarity": "mean cosine of two of the unit's exemplars",
    "polysemanticity": "1 − cosine of the two clusters that the unit's exemplars fall into",
    "redundancy": "highest cosine of the unit's mean exemplar with another unit's of the layer",
}
"""Every metric, and how to read it."""

_NOTES = {
    SHUFFLED: "the labeler's own descriptions, each given to another unit of the layer",
    CONSTANT: "the labeler's most frequent description of the layer, given to every unit",
}

ROWS_SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),
        ("system", pa.string()),
        ("description", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("images", pa.int64()),
    ]
)
"""What a piece of work leaves of table ``unit_scores``."""


@dataclass(frozen=True)
class ScoreConfig:
    """How descriptions are scored.

    Attributes:
        pooling: ``mean`` or ``max``: what stands for an activation map.
        share: Share of the probe's images that are used, chosen by id; 1 uses all. A unit's exemplars never count.
        top: Of AUPRC: share of the images that count as exciting the unit.
        retrieved: Of retrieval: images nearest to a description.
        sigmoid: How a fit becomes a prediction; None takes what belongs to the kind of model, and the fit as it is
            for others.
        seed: Seed of the shuffle and the bootstrap.
        samples: Bootstrap resamples.
    """

    pooling: Literal["mean", "max"] = "mean"
    share: float = 1.0
    top: float = 0.01
    retrieved: int = 50
    sigmoid: Sigmoid | None = None
    seed: int = 0
    samples: int = 1000

    def curve(self, embedder: Embedder) -> Sigmoid | None:
        """The sigmoid for a model of images and texts."""
        if self.sigmoid is None and isinstance(embedder, ImageText):
            return SIGMOIDS[embedder.kind]
        return self.sigmoid


@dataclass(frozen=True)
class Described:
    """One labeler's descriptions of one layer.

    Attributes:
        labeler: The labeler.
        model: Name of the model.
        layer: Module path.
    """

    labeler: str
    model: str
    layer: str

    @property
    def keys(self) -> dict[str, str]:
        """Its partition of descriptions."""
        return {"labeler": self.labeler, "model": self.model, "layer": self.layer}


@dataclass(frozen=True)
class Texts:
    """What is said of a layer's units.

    Attributes:
        units: The U units.
        systems: System → U descriptions.
    """

    units: tuple[int, ...]
    systems: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, storage: Storage, what: Described, seed: int) -> Texts:
        """A labeler's descriptions, beside the same shuffled and the most frequent one for all."""
        table = storage.read(DESCRIPTIONS, ["unit", "description"], **what.keys)
        own = table["description"].to_pylist()
        often = Counter(own)
        constant = min(often, key=lambda text: (-often[text], text)) if own else ""
        said = {OWN: own, SHUFFLED: shuffled(own, seed), CONSTANT: [constant] * len(own)}
        return cls(tuple(table["unit"].to_pylist()), {system: tuple(texts) for system, texts in said.items()})

    def every(self) -> set[str]:
        """The distinct descriptions."""
        return set().union(*self.systems.values())


def described_layers(
    storage: Storage, models: Sequence[str], labelers: Sequence[str] = (), layers: Sequence[str] = ()
) -> list[Described]:
    """What a storage holds of some models' descriptions.

    Raises:
        MilanError: There is nothing.
    """
    found = [
        Described(keys["labeler"], keys["model"], keys["layer"])
        for keys in storage.partitions(DESCRIPTIONS)
        if keys["model"] in models
        and (not labelers or keys["labeler"] in labelers)
        and (not layers or keys["layer"] in layers)
    ]
    if not found:
        by = f" by {', '.join(labelers)}" if labelers else ""
        raise MilanError(
            f"no descriptions of {', '.join(models)}{by} in {storage.root}; run jobs.describe or jobs.label."
        )
    return found


def check_pooled(storage: Storage, what: Described, digest: str) -> None:
    """Sees that a layer's activations on a probe are there.

    Raises:
        MilanError: They are not.
    """
    meta = storage.metadata(POOLED, model=what.model, layer=what.layer)
    if meta is None or meta["probe"] != digest:
        raise MilanError(
            f"{what.model} {what.layer} has no pooled activations of this probe; make them with "
            "jobs.exemplars --pooled, on the probe that the exemplars are of."
        )


def units_of(storage: Storage, model: str, layer: str) -> int:
    """How many units a layer has, dead ones too.

    Raises:
        MilanError: It has no pooled activations.
    """
    meta = storage.metadata(POOLED, model=model, layer=layer)
    if meta is None:
        raise MilanError(f"{model} {layer} has no pooled activations; make them with jobs.exemplars --pooled.")
    return int(meta["units"])


def class_layers(
    storage: Storage, described: Sequence[Described], classes: Mapping[str, tuple[str, ...]]
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Finds the layers whose units are classes: those of as many units. Says which these are, and which are not.

    Args:
        storage: The run directory, which holds pooled activations.
        described: Layers to choose from.
        classes: Model → the names of its classes.

    Returns:
        (model, layer) → the names of its units.

    Raises:
        MilanError: There is none, of no model.
    """
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    others: list[str] = []
    for model, layer in dict.fromkeys((what.model, what.layer) for what in described if what.model in classes):
        if (units := units_of(storage, model, layer)) == len(classes[model]):
            found[model, layer] = classes[model]
        else:
            others.append(f"{model} {layer} ({units} units, {len(classes[model])} classes)")
    if not found:
        raise MilanError(
            f"class names are for the layer that puts the classes out, which has as many units: not {', '.join(others)}"
            "; describe it (--layers outputs), or leave out --class-names and --sanity."
        )
    say(f"class names: compared in {', '.join(' '.join(keys) for keys in found)}, which have as many units as classes")
    if others:
        say(f"class names: left out {', '.join(others)}: their units are no classes")
    return found


@dataclass(frozen=True)
class _Block:
    storage: Storage
    work: str
    number: int
    what: Described
    texts: Texts
    start: int
    stop: int
    config: ScoreConfig
    curve: Sigmoid | None
    encoder: str
    probe: str

    @property
    def name(self) -> str:
        return f"rows/{self.number}/{self.start:07d}-{self.stop:07d}"

    @property
    def part(self) -> slice:
        """The block's units among the layer's."""
        return slice(self.start, self.stop)


@retry_if_overtaken
def run_scores(
    storage: Storage,
    described: Sequence[Described],
    probe: references.ProbeRef,
    ref: ImageTextRef,
    config: ScoreConfig,
    resources: Resources,
    classes: Mapping[tuple[str, str], tuple[str, ...]] | None = None,
) -> list[str]:
    """Scores every description whose scores are missing or stale, by a model of images and texts.

    Args:
        storage: The run directory, which holds descriptions, exemplars and pooled activations.
        described: What to score.
        probe: The probe that they are of.
        ref: The model of images and texts, or what takes its place.
        config: How.
        resources: What of the cluster to use; Ray must be connected.
        classes: (model, layer) → what each unit stands for, where that is known (:func:`class_layers`): of a
            classifier's outputs.

    Returns:
        The experiments of table ``scores``, one per model.

    Raises:
        MilanError: Pooled activations, exemplars or the model are missing, or there are not as many classes as units.
    """
    for (model, layer), concepts in (classes or {}).items():
        if (units := units_of(storage, model, layer)) != len(concepts):
            raise MilanError(
                f"{model} {layer} has {units} units and the model names {len(concepts)} classes: class names are for "
                "the layer that puts them out; choose it with --layers."
            )
    digest = run_image_embeddings(storage, probe, ref, resources)
    embedder = references.image_text(ref, probe.plugins)
    curve = config.curve(embedder)
    stage = Scores(described, ref, embedder, digest, config, classes)
    outputs = by_described(stage.outputs(Known(storage)))
    work = config_hash({"scores": [output.fingerprint.hash for output in outputs.values()]})
    due = [what for what in described if stage.why(storage, outputs[what])]
    if due:
        with removed_if_damaged(storage, work):
            # Of all that was due when the job began, so that one that goes on after a kill finds these very texts
            # embedded.
            begun = _begun(storage, work, [described.index(what) for what in due])
            read = {
                what: Texts.read(storage, what, config.seed) for number, what in enumerate(described) if number in begun
            }
            every = sorted(set().union(*(said.every() for said in read.values())))
            texts = {what: read[what] for what in due}
            vectors = dict(zip(every, text_embeddings(storage, every, ref, resources, probe.plugins), strict=True))
            blocks: list[_Block] = []
            for what, said in texts.items():
                number = described.index(what)
                blocks += [
                    _Block(storage, work, number, what, said, start, start + UNITS, config, curve, ref.name, digest)
                    for start in range(0, len(said.units), UNITS)
                ]
                for system, own in said.systems.items():
                    storage.put_work(
                        work,
                        f"texts/{number}/{system}",
                        pa.table({"embedding": lists_of(_stack(own, vectors, embedder))}),
                    )
            stored = set(storage.work_names(work))
            fresh = [block for block in blocks if block.name not in stored]
            say(f"scores by {ref.name}: {len(due)} layers and labelers")
            here = storage.count(POOLED, model=due[0].model, layer=due[0].layer) <= FEW_IMAGES
            costs = {what: Cost() for what in due}
            with (
                torch_threads(resources.threads),
                Progress(f"scores ({ref.name})", len(fresh), "blocks") as progress,
            ):
                for index, took in run_parallel(_score, fresh, in_driver=here):
                    progress.advance()
                    costs[fresh[index].what].add(took)
            for what, said in texts.items():
                parts = [storage.get_work(work, block.name) for block in blocks if block.what == what]
                table = pa.concat_tables([ROWS_SCHEMA.empty_table(), *parts])
                names = (classes or {}).get((what.model, what.layer))
                if names is not None:
                    table = pa.concat_tables([table, _class_rows(said, names, vectors, embedder)])
                run = outputs[what].fingerprint.hash
                record_run(storage, "scores", run, what.model, layer=what.layer, rows=len(table), cost=costs[what])
                write_unit_scores(storage, outputs[what], table)
    else:
        say(f"scores by {ref.name}: all up to date")
    storage.remove_work(work)
    run_stage(ExemplarScores(described, ref, digest), storage, resources)
    return summarise(storage, ref.name, sorted({what.model for what in described}), config)


def _begun(storage: Storage, work: str, due: Sequence[int]) -> set[int]:
    """What was due when a job began, by number, and what is now."""
    if "due" not in storage.work_names(work):
        storage.put_work(work, "due", pa.table({"number": due}))
    return {*due, *storage.get_work(work, "due")["number"].to_pylist()}


class Scores(Stage):
    """Scores of descriptions by a model of images and texts; :func:`run_scores` makes them together.

    Args:
        described: What to score.
        ref: The model of images and texts, or what takes its place.
        embedder: The same, loaded.
        digest: Digest of the probe manifest.
        config: How to score.
        classes: (model, layer) → what each unit stands for.
    """

    table, name = UNIT_SCORES, "scores"

    def __init__(
        self,
        described: Sequence[Described],
        ref: ImageTextRef,
        embedder: Embedder,
        digest: str,
        config: ScoreConfig,
        classes: Mapping[tuple[str, str], tuple[str, ...]] | None = None,
    ) -> None:
        self._described, self._digest, self._classes = described, digest, classes or {}
        self._predictor, self.title = ref.name, f"scores by {ref.name}"
        texts = {"curve": config.curve(embedder), "texts": embedder.text_identity()}
        self._identity = {"kernel": KERNEL_VERSION, "config": config, **texts}

    def outputs(self, known: Known) -> Iterator[Output]:
        """Scores of every labeler's descriptions of every layer."""
        images = known.config(IMAGE_EMBEDDINGS, encoder=self._predictor, probe=self._digest)
        for what in self._described:
            above = upstream(known.storage, what, self._digest)
            names = self._classes.get((what.model, what.layer))
            fingerprint = Fingerprint.of({**self._identity, "images": images, **above, "classes": names})
            yield Output({"predictor": self._predictor, **what.keys}, fingerprint)


def upstream(storage: Storage, what: Described, digest: str) -> dict[str, str]:
    """The configuration hashes of what scores of a layer are taken of.

    Raises:
        MilanError: Its pooled activations on the probe are missing.
    """
    check_pooled(storage, what, digest)
    keys = {"model": what.model, "layer": what.layer}
    return {
        "descriptions": storage.config_of(DESCRIPTIONS, **what.keys),
        "pooled": storage.config_of(POOLED, **keys),
        "exemplars": storage.config_of(EXEMPLARS, **keys),
    }


def _stack(texts: Sequence[str], vectors: Mapping[str, np.ndarray], embedder: Embedder) -> np.ndarray:
    return np.stack([vectors[text] for text in texts]) if texts else np.zeros((0, embedder.width), np.float32)


def unit_scores(keys: Mapping[str, str], rows: pa.Table) -> pa.Table:
    """A layer's scores: rows of unit, system, description, metric, value and images; NaN becomes null."""
    columns: dict[str, object] = {name: [value] * len(rows) for name, value in keys.items()}
    columns |= {name: rows[name] for name in rows.column_names}
    columns["value"] = pa.array(rows["value"].to_numpy(), pa.float64(), from_pandas=True)
    return UNIT_SCORES.table(columns)


def write_unit_scores(storage: Storage, output: Output, rows: pa.Table) -> None:
    """Makes a layer's scores public; see :func:`unit_scores`."""
    storage.write(UNIT_SCORES, unit_scores(output.keys, rows), output.fingerprint, **output.keys)


def by_described(outputs: Iterable[Output]) -> dict[Described, Output]:
    """Outputs by what they score."""
    return {Described(*(output.keys[key] for key in ("labeler", "model", "layer"))): output for output in outputs}


@dataclass(frozen=True)
class Seen:
    """What some units made of the images that count.

    Attributes:
        ids: int64 (N,), ascending.
        activations: float32 (N, B), NaN where there is none.
        use: bool (N, B): finite, and not one of the unit's exemplars.
    """

    ids: np.ndarray
    activations: np.ndarray
    use: np.ndarray

    @classmethod
    def read(
        cls, storage: Storage, what: Described, units: Sequence[int], config: ScoreConfig, known: np.ndarray | None
    ) -> Seen:
        """Reads a layer's pooled activations, a row group at a time.

        Args:
            storage: The run directory.
            what: The layer.
            units: B units.
            config: Which images count.
            known: int64, ascending: only these images count; None for all.
        """
        keys = {"model": what.model, "layer": what.layer}
        ids, values = [], []
        for part in storage.stream(POOLED, ["image_id", config.pooling], **keys):
            own = part["image_id"].to_numpy()
            here = held_out(own, config.share)
            if known is not None:
                here &= np.isin(own, known)
            ids.append(own[here])
            values.append(matrix(part[config.pooling])[here][:, list(units)])
        every, activations = np.concatenate(ids), np.concatenate(values)
        table = storage.read(EXEMPLARS, ["unit", "image_id"], **keys)
        of, images = table["unit"].to_numpy(), table["image_id"].to_numpy()
        use = np.isfinite(activations)
        for column, unit in enumerate(units):
            use[:, column] &= ~np.isin(every, images[of == unit])
        return cls(every, activations, use)


def _score(task: _Block) -> float:
    """Scores a block of units; returns the seconds it took."""
    started = time.monotonic()
    units = task.texts.units[task.part]
    storage = task.storage
    known = np.concatenate(
        [
            part["image_id"].to_numpy()
            for part in storage.stream(IMAGE_EMBEDDINGS, ["image_id"], encoder=task.encoder, probe=task.probe)
        ]
    )
    seen = Seen.read(storage, task.what, units, task.config, known)
    images = embeddings_of(storage, task.encoder, task.probe, seen.ids)
    rows: list[dict[str, object]] = []
    for system in SYSTEMS:
        every = rows_of(storage.get_work(task.work, f"texts/{task.number}/{system}")["embedding"])
        vectors = every[task.part].copy()  # torch wants to own what it reads
        found = score_units(images, vectors, seen, task.config, task.curve)
        for column, unit in enumerate(units):
            text = task.texts.systems[system][task.start + column]
            used = int(seen.use[:, column].sum())
            rows += [
                {
                    "unit": unit,
                    "system": system,
                    "description": text,
                    "metric": metric,
                    "value": float(values[column]),
                    "images": used,
                }
                for metric, values in found.items()
            ]
    storage.put_work(task.work, task.name, pa.Table.from_pylist(rows, schema=ROWS_SCHEMA))
    return time.monotonic() - started


def score_units(
    images: np.ndarray, texts: np.ndarray, seen: Seen, config: ScoreConfig, curve: Sigmoid | None
) -> dict[str, np.ndarray]:
    """All scores of some units' descriptions by a model of images and texts.

    Args:
        images: Embeddings of N images, float32 (N, D).
        texts: Of one description per unit, float32 (B, D).
        seen: What the units made of the images.
        config: How to score.
        curve: From a fit to a prediction; None takes the fit.

    Returns:
        Metric → float64 (B,); NaN for a unit whose activation never changes, which nothing can be right or wrong of.
    """
    fit = _products(images, texts)
    simulated, plain = Moments(), Moments()
    for block, start in enumerate(range(0, len(fit), IMAGES)):
        rows = slice(start, start + IMAGES)
        predicted = fit[rows].astype(np.float64) if curve is None else curve(fit[rows])
        simulated.update(block, seen.activations[rows], predicted, seen.use[rows])
        plain.update(block, seen.activations[rows], fit[rows], seen.use[rows])
    found = {"simulation": simulated.result(), "correlation": plain.result()}
    for name in ("auprc", "retrieval-auc", "retrieval-mad"):
        found[name] = np.full(len(texts), np.nan)
    for column in range(len(texts)):
        use = seen.use[:, column]
        own, near = seen.activations[use, column], fit[use, column]
        if not len(own) or own.min() == own.max():
            found["simulation"][column] = found["correlation"][column] = np.nan
            continue
        found["auprc"][column] = average_precision(near, highest(own, max(1, round(config.top * len(own)))))
        chosen = highest(near, min(config.retrieved, len(own) // 2))
        found["retrieval-auc"][column], found["retrieval-mad"][column] = retrieval(own, chosen)
    return found


def _products(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Products of images (N, D) and texts (B, D), float32 (N, B); always of one shape, whatever is asked for beside."""
    padded = torch.zeros(max(UNITS, len(texts)), texts.shape[1])
    padded[: len(texts)] = torch.from_numpy(texts)
    found = []
    for start in range(0, len(images), IMAGES):
        some = images[start : start + IMAGES]
        block = torch.zeros(IMAGES, images.shape[1])
        block[: len(some)] = torch.from_numpy(some)
        found.append((block @ padded.T)[: len(some), : len(texts)].numpy())
    return np.concatenate(found) if found else np.zeros((0, len(texts)), np.float32)


def _class_rows(
    texts: Texts,
    names: tuple[str, ...],
    vectors: Mapping[str, np.ndarray],
    embedder: Embedder,
) -> pa.Table:
    """How well descriptions of a classifier's outputs name their classes."""
    said = embedder.embed_texts(names).cpu().numpy()
    rows: list[dict[str, object]] = []
    for system, own in texts.systems.items():
        for unit, text in zip(texts.units, own, strict=True):
            products = said @ vectors[text]
            others = np.delete(products, unit)
            first = float(products[unit] > others.max()) if len(others) else 1.0
            rows += [
                {"unit": unit, "system": system, "description": text, "metric": metric, "value": value, "images": 0}
                for metric, value in (("class-similarity", float(products[unit])), ("class-top1", first))
            ]
    return pa.Table.from_pylist(rows, schema=ROWS_SCHEMA)


class ExemplarScores(TaskStage):
    """Clarity, polysemanticity and redundancy of layers, which need no descriptions.

    Args:
        described: Of which layers.
        ref: The model of images and texts.
        digest: Digest of the probe manifest.
    """

    table, name, recorded = UNIT_SCORES, "scores", True

    def __init__(self, described: Sequence[Described], ref: ImageTextRef, digest: str) -> None:
        self._layers = sorted({(what.model, what.layer) for what in described})
        self._predictor, self._digest = ref.name, digest
        self.title = f"scores of exemplars by {ref.name}"

    def outputs(self, known: Known) -> Iterator[Output]:
        """Scores of every layer, by what its exemplars are."""
        images = known.config(IMAGE_EMBEDDINGS, encoder=self._predictor, probe=self._digest)
        for model, layer in self._layers:
            exemplars = known.config(EXEMPLARS, model=model, layer=layer)
            fingerprint = Fingerprint.of({"kernel": KERNEL_VERSION, "images": images, "exemplars": exemplars})
            yield Output({"predictor": self._predictor, **Described(WORDLESS, model, layer).keys}, fingerprint)

    def make(self, storage: Storage, output: Output) -> pa.Table:
        """A layer's scores."""
        table = storage.read(EXEMPLARS, ["unit", "image_id"], model=output.model, layer=output.layer)
        of, images = table["unit"].to_numpy(), table["image_id"].to_numpy()
        ids = np.unique(images)
        vectors = embeddings_of(storage, self._predictor, self._digest, ids).astype(np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        units = np.unique(of)
        groups = [vectors[np.searchsorted(ids, images[of == unit])] for unit in units]
        nearest = redundancy(np.stack([group.mean(axis=0) for group in groups])) if groups else np.zeros(0)
        rows = [
            {"unit": unit, "system": OWN, "description": "", "metric": metric, "value": value, "images": len(group)}
            for unit, group, near in zip(units.tolist(), groups, nearest.tolist(), strict=True)
            for metric, value in (
                ("clarity", clarity(group)),
                ("polysemanticity", polysemanticity(group)),
                ("redundancy", near),
            )
        ]
        return unit_scores(output.keys, pa.Table.from_pylist(rows, schema=ROWS_SCHEMA))

    def runs_in_driver(self, storage: Storage, outputs: Sequence[Output]) -> bool:
        """A layer's scores are some products of matrices."""
        return True


def run_sanity(
    storage: Storage,
    probe: references.ProbeRef,
    ref: ImageTextRef,
    config: ScoreConfig,
    resources: Resources,
    classes: Mapping[tuple[str, str], tuple[str, ...]],
) -> list[str]:
    """Judges the scores themselves, on layers whose units' concepts are known (``scoring/score_sanity.py``).

    Args:
        storage: The run directory, which holds pooled activations.
        probe: The probe that they are of, with concept maps.
        ref: The truth of these.
        config: How descriptions are scored.
        resources: What of the cluster to use; Ray must be connected.
        classes: (model, layer) → the concept of each unit.

    Returns:
        The experiments of table ``scores``, one per layer.

    Raises:
        MilanError: The judge is no truth, or pooled activations are missing.
    """
    embedder = truth_of(ref, probe)
    digest = run_image_embeddings(storage, probe, ref, resources)
    ids, shown = image_embeddings(storage, ref.name, digest)
    names = []
    for (model, layer), concepts in classes.items():
        what = Described(WORDLESS, model, layer)
        check_pooled(storage, what, digest)
        made_of = storage.config_of(IMAGE_EMBEDDINGS, encoder=ref.name, probe=digest)
        fingerprint = sanity_fingerprint(storage, model, layer, concepts, made_of, config)
        names.append(sanity_name(model, layer))
        if storage.why(SCORES, fingerprint, experiment=names[-1]) is None:
            continue
        seen = Seen.read(storage, what, range(len(concepts)), config, ids)
        truth = shown[np.searchsorted(ids, seen.ids)] @ embedder.embed_texts(concepts).numpy().T
        whole = seen.use.any(axis=1) & np.isfinite(seen.activations).all(axis=1)
        table = sanity(
            names[-1],
            seen.activations[whole],
            truth[whole] > 1 - 1e-6,  # all that the concept's name names shows
            measures(config.top, config.retrieved),
            samples=config.samples,
            seed=config.seed,
        )
        storage.write(SCORES, table, fingerprint, experiment=names[-1])
    return names


def truth_of(ref: ImageTextRef, probe: references.ProbeRef) -> Embedder:
    """The truth of concept maps, by which scores are judged.

    Raises:
        MilanError: It is a model.
    """
    embedder = references.image_text(ref, probe.plugins)
    if embedder.view is not None:
        raise MilanError(f"{ref.name} is a model, not the truth: scores are judged by concept maps alone.")
    return embedder


def sanity_name(model: str, layer: str) -> str:
    """The experiment that judges scores on a layer."""
    return f"scores judged: {model} {layer}"


def sanity_fingerprint(
    storage: Storage, model: str, layer: str, concepts: Sequence[str], images: str | None, config: ScoreConfig
) -> Fingerprint:
    """What decides the judgement of scores on a layer.

    Args:
        storage: The run directory.
        model: The model.
        layer: Its layer.
        concepts: What each unit stands for.
        images: The hash of the probe's image embeddings.
        config: How descriptions are scored.
    """
    pooled = storage.config_of(POOLED, model=model, layer=layer)
    return Fingerprint.of({"sanity": 1, "pooled": pooled, "images": images, "config": config, "concepts": concepts})


def summarise(storage: Storage, predictor: str, models: Sequence[str], config: ScoreConfig) -> list[str]:
    """Sums unit scores up, one experiment per model over all its layers; returns the experiments.

    Every mean has its 95 % bootstrap interval over units; so has the paired difference to the rows that cost nothing.
    """
    names = []
    for model in models:
        every = storage.partitions(UNIT_SCORES, predictor=predictor, model=model)
        hashes = [storage.config_of(UNIT_SCORES, **keys) for keys in every]
        names.append(f"scores by {predictor}: {model}")
        fingerprint = config_hash({"summary": 1, "scores": hashes, "seed": config.seed, "samples": config.samples})
        if storage.is_current(SCORES, fingerprint, experiment=names[-1]):
            continue
        rows: list[Row] = []
        for labeler in sorted({keys["labeler"] for keys in every}):
            columns = ["layer", "unit", "system", "metric", "value"]
            tables = [storage.read(UNIT_SCORES, columns, **keys) for keys in every if keys["labeler"] == labeler]
            rows += _summary(labeler, pa.concat_tables(tables), config)
        storage.write(SCORES, score_table(names[-1], rows), fingerprint, experiment=names[-1])
    return names


def _summary(labeler: str, table: pa.Table, config: ScoreConfig) -> list[Row]:
    """Rows of one labeler: its means, those of the rows that cost nothing, and the differences."""
    values: dict[str, dict[str, dict[tuple[str, int], float]]] = {}
    for row in table.to_pylist():
        if row["value"] is not None:
            place = values.setdefault(row["metric"], {}).setdefault(row["system"], {})
            place[row["layer"], row["unit"]] = row["value"]
    rows: list[Row] = []
    for metric, systems in values.items():
        units = sorted(systems.get(OWN, {}))
        if not units:
            continue
        counts = resampling_counts(len(units), config.samples, config.seed)
        of = {
            system: unit_values(np.array([found[unit] for unit in units]))
            for system, found in systems.items()
            if all(unit in found for unit in units)
        }
        for system, statistics in of.items():
            name = labeler if system == OWN else f"{labeler}, {system}"
            score = interval(statistics, ratio, counts)
            rows.append((name, metric, score, len(units), _NOTES.get(system, READINGS[metric])))
            if system != OWN:
                gap = difference(of[OWN], statistics, ratio, counts)
                note = f"paired difference; above 0: {labeler} is better"
                rows.append((f"{labeler} − {system}", metric, gap, len(units), note))
    return rows
