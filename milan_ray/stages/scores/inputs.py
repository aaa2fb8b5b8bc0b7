"""Inputs of scores: descriptions, activations of the images that count; rows of the resulting table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from milan_ray.engine.stage import Job, Output, piece_schema
from milan_ray.errors import MilanError
from milan_ray.exemplars.pooled import matrix
from milan_ray.models.image_text import Embedder, ImageText
from milan_ray.names import SIGN
from milan_ray.progress import say
from milan_ray.schema import CONTRASTS, DESCRIPTIONS, EXEMPLARS, POOLED, UNIT_SCORES
from milan_ray.scoring.evaluation import CONSTANT, SHUFFLED, shuffled
from milan_ray.scoring.simulation import SIGMOIDS, Sigmoid, held_out
from milan_ray.storage import CONTRASTS_KEY, UNITS_KEY, Storage

KERNEL_VERSION = "scores-1"

OWN = "own"
"""System: a unit's own description, alongside trivial baselines."""

SYSTEMS = (OWN, SHUFFLED, CONSTANT)

WORDLESS = "exemplars"
"""Pseudo-labeler of scores that need no text."""

Classes = Mapping[tuple[str, str], tuple[str, ...]]
"""(model, layer) → the class or concept of each unit."""

ROWS_SCHEMA = piece_schema(UNIT_SCORES)
"""Columns of table ``unit_scores`` without those of the partition."""


@dataclass(frozen=True)
class ScoreConfig:
    """How descriptions are scored.

    Attributes:
        pooling: ``mean`` or ``max``: what stands for an activation map.
        share: Share of the probe's images that are used, chosen by id; 1 uses all. A unit's exemplars and the
            contrasts of its label never count.
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

    @classmethod
    def of(cls, output: Output) -> Described:
        """What an output scores."""
        return cls(*(output.keys[key] for key in ("labeler", "model", "layer")))

    @property
    def keys(self) -> dict[str, str]:
        """Its partition of descriptions."""
        return {"labeler": self.labeler, "model": self.model, "layer": self.layer}


@dataclass(frozen=True)
class Texts:
    """Descriptions of a layer's units.

    Attributes:
        units: The U units.
        systems: System → U descriptions.
    """

    units: tuple[int, ...]
    systems: dict[str, tuple[str, ...]]

    @classmethod
    def read(cls, storage: Storage, described: Described, seed: int) -> Texts:
        """Reads a labeler's descriptions; also shuffles them, and takes the most frequent one for all units."""
        table = storage.read(DESCRIPTIONS, ["unit", "description"], **described.keys)
        return cls.of(table["unit"].to_pylist(), table["description"].to_pylist(), seed)

    @classmethod
    def of(cls, units: Sequence[int], own: Sequence[str], seed: int) -> Texts:
        """Shuffles descriptions of units, and takes the most frequent one for all units."""
        counts = Counter(own)
        constant = min(counts, key=lambda text: (-counts[text], text)) if own else ""
        systems = {OWN: own, SHUFFLED: shuffled(own, seed), CONSTANT: [constant] * len(own)}
        return cls(tuple(units), {system: tuple(texts) for system, texts in systems.items()})

    def every(self) -> set[str]:
        """The distinct descriptions."""
        return set().union(*self.systems.values())


@dataclass(frozen=True)
class UnitActivations:
    """Activations of some units for the images that count.

    Attributes:
        ids: int64 (N,), ascending.
        activations: float32 (N, B), NaN where there is none.
        use: bool (N, B): finite, and neither one of the unit's exemplars nor one of the contrasts of its label.
    """

    ids: np.ndarray
    activations: np.ndarray
    use: np.ndarray

    @classmethod
    def read(
        cls, storage: Storage, layer: Described, units: Sequence[int], config: ScoreConfig, known: np.ndarray | None
    ) -> UnitActivations:
        """Reads a layer's pooled activations, a row group at a time.

        Args:
            storage: The run directory.
            layer: The layer.
            units: B units.
            config: Which images count.
            known: int64, ascending: only these images count; None for all.
        """
        keys = {"model": layer.model, "layer": layer.layer}
        ids, values = [], []
        for part in storage.stream(POOLED, ["image_id", config.pooling], **keys):
            part_ids = part["image_id"].to_numpy()
            counts = held_out(part_ids, config.share)
            if known is not None:
                counts &= np.isin(part_ids, known)
            ids.append(part_ids[counts])
            values.append(matrix(part[config.pooling])[counts][:, list(units)])
        image_ids, activations = np.concatenate(ids), np.concatenate(values)
        table = pa.concat_tables([storage.read(EXEMPLARS, ["unit", "image_id"], **keys), contrasts_of(storage, layer)])
        of, images = table["unit"].to_numpy(), table["image_id"].to_numpy()
        use = np.isfinite(activations)
        for column, unit in enumerate(units):
            use[:, column] &= ~np.isin(image_ids, images[of == unit])
        return cls(image_ids, activations, use)


def begun(job: Job) -> list[int]:
    """Numbers of the outputs that were due when the job began.

    A job that goes on after a kill reads the descriptions of all of them, and so finds these very texts embedded.
    """
    due = [output.number for output in job.due]
    if "due" not in job.storage.work_names(job.work):
        job.storage.put_work(job.work, "due", pa.table({"number": due}))
    return sorted({*due, *job.storage.get_work(job.work, "due")["number"].to_pylist()})


def contrasts_of(storage: Storage, described: Described) -> pa.Table:
    """The contrasts that a layer's labels were made with: columns unit and image_id, none for most labelers.

    Raises:
        MilanError: The contrasts are no longer those that made the labels, so that nobody knows which images did.
    """
    keys = {"model": described.model, "layer": described.layer}
    meta = storage.metadata(DESCRIPTIONS, **described.keys) or {}
    if CONTRASTS_KEY not in meta:
        return storage.read(EXEMPLARS, ["unit", "image_id"], **keys).slice(0, 0)
    encoder = meta["contrasts"]
    present = storage.metadata(CONTRASTS, encoder=encoder, **keys)
    same = present is not None and storage.all_units_of(CONTRASTS, encoder=encoder, **keys) == meta[CONTRASTS_KEY]
    if present is not None and present.get(UNITS_KEY):  # made for some units alone
        labelled = storage.read(DESCRIPTIONS, ["unit"], **described.keys)["unit"].to_pylist()
        same &= set(labelled) <= set(map(int, present[UNITS_KEY].split(",")))
    if not same:
        raise MilanError(
            f"the contrasts by {encoder} that {described.labeler} labelled {described.model} {described.layer} with "
            "are gone or others, so nobody knows which images made these labels; make the labels again."
        )
    return storage.read(CONTRASTS, ["unit", "image_id"], encoder=encoder, **keys)


def unit_scores(keys: Mapping[str, str], rows: pa.Table) -> pa.Table:
    """A layer's table of scores, from rows as of :data:`ROWS_SCHEMA`; NaN becomes null."""
    columns = {name: rows[name] for name in rows.column_names}
    columns["value"] = pa.array(rows["value"].to_numpy(), pa.float64(), from_pandas=True)
    return UNIT_SCORES.table(columns, **keys)


def upstream(storage: Storage, described: Described, digest: str) -> dict[str, str]:
    """The configuration hashes of the tables that a layer's scores are computed from.

    Raises:
        MilanError: Its pooled activations on the probe are missing, or its labels are of earlier exemplars.
    """
    check_pooled(storage, described, digest)
    keys = {"model": described.model, "layer": described.layer}
    if (of := storage.exemplars_of(DESCRIPTIONS, **described.keys)) and of != storage.config_of(EXEMPLARS, **keys):
        raise MilanError(
            f"what {described.labeler} says of {described.model} {described.layer} is of earlier exemplars: make these "
            "labels again before they are judged."
        )
    return {
        "descriptions": storage.config_of(DESCRIPTIONS, **described.keys),
        "pooled": storage.config_of(POOLED, **keys),
        "exemplars": storage.config_of(EXEMPLARS, **keys),
    }


def described_layers(
    storage: Storage, models: Sequence[str], labelers: Sequence[str] = (), layers: Sequence[str] = ()
) -> list[Described]:
    """Lists the descriptions of some models in a storage.

    Raises:
        MilanError: There is nothing.
    """
    described = [
        Described(keys["labeler"], keys["model"], keys["layer"])
        for keys in storage.partitions(DESCRIPTIONS)
        if keys["model"] in models
        and (not labelers or keys["labeler"] in labelers)
        and (not layers or keys["layer"] in layers)
    ]
    if not described:
        by = f" by {', '.join(labelers)}" if labelers else ""
        raise MilanError(
            f"no descriptions of {', '.join(models)}{by} in {storage.root}; run jobs.describe or jobs.label."
        )
    return described


def check_pooled(storage: Storage, layer: Described, digest: str) -> None:
    """Checks that a layer has pooled activations on a probe.

    Raises:
        MilanError: It has none.
    """
    meta = storage.metadata(POOLED, model=layer.model, layer=layer.layer)
    if meta is None or meta["probe"] != digest:
        raise MilanError(
            f"{layer.model} {layer.layer} has no pooled activations of this probe; make them with "
            "jobs.exemplars --pooled, on the probe that the exemplars are of."
        )


def units_of(storage: Storage, model: str, layer: str) -> int:
    """Counts the units of a layer, dead ones included.

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
    """Finds the layers whose units are classes: they have as many units as the model has classes.

    Prints which layers these are, and which are left out.

    Args:
        storage: The run directory, which holds pooled activations.
        described: Layers to choose from.
        classes: Model → the names of its classes.

    Returns:
        (model, layer) → the names of its units.

    Raises:
        MilanError: No model has such a layer.
    """
    named: dict[tuple[str, str], tuple[str, ...]] = {}
    others: list[str] = []
    for model, layer in dict.fromkeys((what.model, what.layer) for what in described if what.model in classes):
        units = units_of(storage, model, layer)
        if units == len(classes[model]) and SIGN not in layer:  # feature 5 is not class 5
            named[model, layer] = classes[model]
        else:
            others.append(f"{model} {layer} ({units} units, {len(classes[model])} classes)")
    if not named:
        raise MilanError(
            f"class names are for the layer that puts the classes out, which has as many units: not {', '.join(others)}"
            "; describe it (--layers outputs), or leave out --class-names, --sanity and --calibrate."
        )
    say(f"class names: compared in {', '.join(' '.join(keys) for keys in named)}, which have as many units as classes")
    if others:
        say(f"class names: left out {', '.join(others)}: their units are no classes")
    return named
