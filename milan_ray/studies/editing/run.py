"""Editing a network: units found by their descriptions ─► importance ─► accuracy without them ─► edited weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from milan_ray.config import Fingerprint, Resources
from milan_ray.engine import references
from milan_ray.engine.planner import Plan, Step
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.errors import MilanError
from milan_ray.models.edit import edited
from milan_ray.models.heads import HeadTraining
from milan_ray.models.weights import weights_digest
from milan_ray.probe.manifest import digest, image_refs
from milan_ray.progress import say
from milan_ray.report.figures import store_figure
from milan_ray.schema import ABLATIONS, CRITERIA, EXEMPLARS
from milan_ray.stages.exemplars import store_manifest
from milan_ray.storage import Storage
from milan_ray.studies.ablation.curves import RANDOM, ablation_rows, step_sets, units_of
from milan_ray.studies.ablation.run import run_ablations
from milan_ray.studies.editing import statistics as editing
from milan_ray.studies.editing.fine_tune import Tuned, fine_tune
from milan_ray.studies.editing.plot import plot_editing, plot_images
from milan_ray.studies.exemplar_images import (
    exemplar_views,
    model_views,
    unit_exemplars,
    unit_masks,
    veiled,
    visible_views,
)
from milan_ray.studies.tables import (
    by_layer,
    described_model,
    descriptions_of,
    frame_of,
    of_all_classes,
    read_descriptions,
    read_frame,
    settings,
    supported_inputs,
    write_frame,
)

KERNEL_VERSION = "editing-1"

ALONE = "validation accuracy without the unit"
"""The criterion by which units are removed."""

IMAGES = "images"
"""Stem of the figure of images."""

SHOWN_IMAGES, SHOWN_UNITS = 8, 3
"""Images per row, and number of units, in that figure."""

CHECKED = 8
"""Number of images on which edited weights are compared with switched-off units."""


@dataclass(frozen=True)
class EditingConfig:
    """Settings of an editing; the defaults are the paper's.

    Attributes:
        labeler: Labeler whose descriptions are read.
        words: Words that descriptions of unwanted units contain.
        most: Maximum number of units removed.
        trials: Random orders.
        seed: Seed of the random orders.
        supported_by: Judge whose verdicts decide which descriptions are read: supported ones; None reads all.
    """

    labeler: str = "milan"
    words: tuple[str, ...] = editing.TEXT
    most: int = editing.MOST
    trials: int = 5
    seed: int = 0
    supported_by: str | None = None


@dataclass(frozen=True)
class Edit:
    """Result of an editing.

    Attributes:
        rows: Rows of schema ABLATIONS, over all classes.
        order: Layer and unit of the unwanted units, in the order of removal.
        stop: Number of them to remove, chosen by validation accuracy.
        units: Number of described units of the network.
    """

    rows: pl.DataFrame
    order: tuple[tuple[str, int], ...]
    stop: int
    units: int

    def removed(self, count: int) -> dict[str, list[int]]:
        """The first units of the order, by layer."""
        return by_layer(self.order[:count])

    def accuracy(self, split: str, condition: str = editing.FOUND, trial: int = 0) -> list[float]:
        """Accuracy without the first 0, 1, 2, … units of an order."""
        where = (pl.col("split") == split, pl.col("condition") == condition, pl.col("trial") == trial)
        return self.rows.filter(*where).sort("ablated")["accuracy"].to_list()


@dataclass(frozen=True)
class Editing(Stage):
    """Accuracy of a classifier as units are removed, by order.

    Attributes:
        model: The classifier.
        validation: Images with classes, like the training images: they order the units and decide when to stop.
        test: Images with classes to measure the effect on, e.g. with misleading texts; None for none.
        config: Settings.
        name: Name of the experiment in the tables.
    """

    table = ABLATIONS

    model: references.ModelRef
    validation: references.ProbeRef
    test: references.ProbeRef | None
    config: EditingConfig
    name: str = "editing"

    @property
    def probes(self) -> dict[str, references.ProbeRef]:
        """Split → images."""
        return {editing.VALIDATION: self.validation, **({} if self.test is None else {editing.TEST: self.test})}

    @property
    def tuned_name(self) -> str:
        """Name of the experiment that fine-tunes afterwards."""
        return f"{self.name}, fine-tuned"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The accuracies, determined by descriptions, weights and images.

        Raises:
            MilanError: A layer has no descriptions, or none contains the words.
        """
        spec, layers = described_model(known.storage, self.model, self.config.labeler)
        unwanted_units(known.storage, spec.name, layers, self.config)
        yield Output(
            {"experiment": self.name, "model": spec.name},
            Fingerprint.of(
                {
                    "kernel": KERNEL_VERSION,
                    "descriptions": descriptions_of(known, spec.name, layers, self.config.labeler),
                    "weights": weights_digest(spec.load()),
                    "probes": {
                        split: digest(references.probe(probe).manifest()) for split, probe in self.probes.items()
                    },
                    "editing": settings(self.config),
                    **supported_inputs(
                        known.storage, self.config.supported_by, self.config.labeler, {spec.name: layers}
                    ),
                }
            ),
        )

    def plan(self, storage: Storage, tuned: bool) -> Plan:
        """The dry run, with or without fine-tuning, which always runs again because nothing of it is stored."""
        plan = Plan.of(storage, [self])
        if tuned:
            keys = (self.tuned_name, references.model(self.model).name)
            plan.steps.append(Step(ABLATIONS.name, keys, "made anew by every run"))
        return plan

    def run(self, storage: Storage, resources: Resources) -> Edit:
        """Removes the units whose descriptions contain the words, one by one, unless the result is up to date.

        Args:
            storage: The run directory, which holds descriptions of the model's layers.
            resources: The part of the cluster to use; Ray must be connected.

        Raises:
            MilanError: A layer has no descriptions, none contains the words, or images have no classes.
        """
        (output,) = self.outputs(Known(storage))
        _, layers = described_model(storage, self.model, self.config.labeler)
        units, unwanted = unwanted_units(storage, output.model, layers, self.config)
        if self.why(storage, output) is None:
            say(f"{self.name} of {output.model}: up to date")
        else:
            _edit(storage, self, output, layers, units, unwanted, resources)
        storage.remove_work(output.fingerprint.hash)
        scores = read_frame(storage, CRITERIA, ["layer", "unit", "score"], **output.keys)
        alone = units.join(scores, on=["layer", "unit"], how="left", maintain_order="left")["score"].to_numpy()
        first = editing.removal_orders(alone, unwanted, trials=0)[0]
        rows = of_all_classes(read_frame(storage, ABLATIONS, **output.keys))
        edit = Edit(rows, tuple(units[first.units].select("layer", "unit").iter_rows()), 0, len(units))
        return replace(edit, stop=editing.stop(edit.accuracy(editing.VALIDATION)))


def _edit(
    storage: Storage,
    study: Editing,
    output: Output,
    layers: tuple[str, ...],
    units: pl.DataFrame,
    unwanted: np.ndarray,
    resources: Resources,
) -> None:
    """Makes all tables and figures of an editing."""
    config, keys, work = study.config, output.keys, output.fingerprint.hash
    model = replace(study.model, layers=layers)
    words = ", ".join(config.words)
    say(f"{study.name}: {len(unwanted)} of {len(units)} units of {output.model} speak of {words}")
    single = [units_of(units, np.array([place])) for place in range(len(units))]
    alone = run_ablations(storage, model, study.validation, single, resources, work).accuracy
    scores = units.with_columns(pl.lit(ALONE).alias("criterion"), pl.Series("score", alone))
    write_frame(storage, CRITERIA, scores, output.fingerprint, **keys)
    orders = editing.removal_orders(alone, unwanted, config.trials, config.seed)
    counts = range(min(config.most, len(unwanted)) + 1)
    sets = step_sets(units, orders, counts)
    curves = [(order.criterion, order.trial) for order in orders]
    steps = [(count / len(units), count) for count in counts]
    table = pa.concat_tables(
        ablation_rows(keys, split, curves, steps, run_ablations(storage, model, probe, sets, resources, work))
        for split, probe in study.probes.items()
    )
    store_figure(storage, ABLATIONS, plot_editing(frame_of(table)), **keys)
    images = example_images(storage, study, units[orders[0].units[:SHOWN_UNITS]])
    store_figure(storage, ABLATIONS, plot_images(images, SHOWN_IMAGES), IMAGES, **keys)
    storage.write(ABLATIONS, table, output.fingerprint, **keys)  # last: marks the editing as complete


def unwanted_units(
    storage: Storage, model: str, layers: Sequence[str], config: EditingConfig
) -> tuple[pl.DataFrame, np.ndarray]:
    """All described units, and the places of those whose descriptions contain the words.

    Raises:
        MilanError: No description contains them.
    """
    units = read_descriptions(storage, model, layers, config.labeler, config.supported_by)
    places = editing.mentioning(units["description"].to_list(), config.words)
    if not len(places):
        raise MilanError(
            f"no description of {model} by {config.labeler} contains {' or '.join(config.words)}: choose --words."
        )
    return units, places


def run_fine_tuning(
    storage: Storage,
    study: Editing,
    edit: Edit,
    count: int,
    train: references.ProbeRef,
    config: HeadTraining,
    resources: Resources,
) -> tuple[pl.DataFrame, Tuned]:
    """Fine-tunes the last layer with all units, and without the first ``count`` unwanted units.

    Args:
        storage: The run directory.
        study: The editing.
        edit: From :meth:`Editing.run`.
        count: Number of units removed.
        train: Images with classes to learn from.
        config: Optimisation.
        resources: The part of the cluster to use; Ray must be connected.

    Returns:
        Rows of schema ABLATIONS over all classes, and the last layer without the units.
    """
    steps = tuple(dict.fromkeys((0, count)))
    sets = [edit.removed(step) for step in steps]
    tuned, accuracies = fine_tune(study.model, train, study.probes, sets, config, resources)
    keys = {"experiment": study.tuned_name, "model": study.model.name}
    shares = [(step / edit.units, step) for step in steps]
    table = pa.concat_tables(
        ablation_rows(keys, split, [(editing.FOUND, 0)], shares, of_split) for split, of_split in accuracies.items()
    )
    probes = {"train": train, **study.probes}
    fingerprint = Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "weights": weights_digest(references.model(study.model).load()),
            "units": [list(unit) for unit in edit.order[:count]],
            "probes": {split: store_manifest(storage, probe)[1] for split, probe in probes.items()},
            "training": config,
        }
    )
    storage.write(ABLATIONS, table, fingerprint, **keys)
    return of_all_classes(frame_of(table)), tuned[-1]


def edited_weights(
    model: references.ModelRef, units: Mapping[str, Sequence[int]], probe: references.ProbeRef
) -> dict[str, torch.Tensor]:
    """Weights of a network without some units; see :func:`milan_ray.models.edit.edited`.

    Args:
        model: The network.
        units: Layer → units.
        probe: Images; the weights are checked on a few of them.
    """
    spec = references.model(replace(model, layers=tuple(units) or model.layers))
    views = model_views(probe, image_refs(references.probe(probe).manifest().slice(0, CHECKED)), spec)
    return edited(spec, spec.load(), units, torch.from_numpy(views))


def example_images(storage: Storage, study: Editing, units: pl.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Title and images, uint8 (n, H, W, 3), of each row of the paper's Figure 7.

    Args:
        storage: The run directory; units without exemplars are left out.
        study: The editing; images of its splits come first.
        units: Columns layer, unit, description. Exemplars of each are shown, darkened outside of their masks.
    """
    spec = references.model(study.model)
    rows: list[tuple[str, np.ndarray]] = []
    for split, probe in study.probes.items():
        refs = image_refs(references.probe(probe).manifest().slice(0, SHOWN_IMAGES))
        rows.append((f"{split} images", visible_views(probe, refs, spec)))
    for layer, unit, text in units.select("layer", "unit", "description").iter_rows():
        if storage.metadata(EXEMPLARS, model=spec.name, layer=layer) is not None:
            exemplars = unit_exemplars(storage, spec.name, layer, unit).head(SHOWN_IMAGES)
            views = exemplar_views(storage, spec.name, layer, exemplars["image_id"].to_list())
            masks = unit_masks(storage, spec.name, layer, exemplars["mask"].to_list())
            rows.append((f"{layer} {unit}\n“{text}”", veiled(views, masks)))
    return rows


def summary(edit: Edit) -> str:
    """Accuracy with all units, at the number given by the stopping rule, and at the best number for the images."""
    lines = [f"{len(edit.order)} units found; removing {edit.stop} keeps validation accuracy"]
    for split in dict.fromkeys(edit.rows["split"]):
        parts = [f"{edit.accuracy(split)[0]:.3f} with all units"]
        for condition in (editing.FOUND, editing.EVERY):
            values = edit.accuracy(split, condition)
            parts.append(f"{condition} {values[edit.stop]:.3f}, best {max(values):.3f} at {np.argmax(values)}")
        trials = edit.rows.filter(pl.col("condition") == RANDOM)["trial"].unique()
        if len(trials):
            random = np.mean([edit.accuracy(split, RANDOM, trial)[edit.stop] for trial in trials])
            parts.append(f"{RANDOM} {random:.3f} (mean of {len(trials)})")
        lines.append(f"  {split}: {'; '.join(parts)}")
    return "\n".join(lines)
