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
from milan_ray.studies.ablation.run import run_ablations
from milan_ray.studies.analysis.run import (
    Curve,
    ablation_rows,
    described_model,
    descriptions_of,
    distinct_sets,
    read_descriptions,
)
from milan_ray.studies.analysis.statistics import RANDOM, units_of
from milan_ray.studies.editing.fine_tune import Tuned, fine_tune
from milan_ray.studies.editing.plot import plot_editing, plot_images
from milan_ray.studies.editing.statistics import (
    EVERY,
    FOUND,
    MOST,
    TEST,
    TEXT,
    VALIDATION,
    mentioning,
    removal_orders,
    stop,
)
from milan_ray.studies.exemplar_images import (
    exemplar_views,
    model_views,
    unit_exemplars,
    unit_masks,
    veiled,
    visible_views,
)

KERNEL_VERSION = "editing-1"

ALONE = "validation accuracy without the unit"
"""The criterion by which units are removed."""

IMAGES = "images"
"""Stem of the figure of images."""

SHOWN_IMAGES, SHOWN_UNITS = 8, 3
"""In that figure: images of each split and exemplars of each unit; units."""

CHECKED = 8
"""Images on which edited weights are compared with switched-off units."""


@dataclass(frozen=True)
class EditingConfig:
    """How a network is edited; the defaults are the paper's.

    Attributes:
        labeler: Whose descriptions.
        words: What descriptions of unwanted units contain.
        most: Units removed at most.
        trials: Random orders.
        seed: Of the random orders.
    """

    labeler: str = "milan"
    words: tuple[str, ...] = TEXT
    most: int = MOST
    trials: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Edit:
    """Result of an editing.

    Attributes:
        rows: Rows of schema ABLATIONS, over all classes.
        order: Layer and unit of those whose descriptions have the words, in the order of removal.
        stop: How many of them to remove, by validation accuracy.
        units: Units of the network that are described.
    """

    rows: pl.DataFrame
    order: tuple[tuple[str, int], ...]
    stop: int
    units: int

    def removed(self, count: int) -> dict[str, list[int]]:
        """The first units of the order, by layer."""
        units: dict[str, list[int]] = {}
        for layer, unit in self.order[:count]:
            units.setdefault(layer, []).append(unit)
        return units

    def accuracy(self, split: str, condition: str = FOUND, trial: int = 0) -> list[float]:
        """Accuracy without the first 0, 1, 2, … units of an order."""
        where = (pl.col("split") == split, pl.col("condition") == condition, pl.col("trial") == trial)
        return self.rows.filter(*where).sort("ablated")["accuracy"].to_list()


@dataclass(frozen=True)
class Editing(Stage):
    """Accuracy of a classifier as units are removed, by order; :meth:`run` makes it.

    Attributes:
        model: The classifier.
        validation: Images with classes, like those of training: they order units and say when to stop.
        test: Images with classes that judge, e.g. with misleading texts; None for none.
        config: How to edit.
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
        return {VALIDATION: self.validation, **({} if self.test is None else {TEST: self.test})}

    @property
    def tuned_name(self) -> str:
        """Name of the experiment that fine-tunes afterwards."""
        return f"{self.name}, fine-tuned"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The accuracies, which follow from descriptions, weights and images.

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
                    "editing": self.config,
                }
            ),
        )

    def plan(self, storage: Storage, tuned: bool) -> Plan:
        """The dry run, with or without fine-tuning, which is stored nowhere to resume from."""
        plan = Plan.of(storage, [self])
        if tuned:
            keys = (self.tuned_name, references.model(self.model).name)
            plan.steps.append(Step(ABLATIONS.name, keys, "made anew by every run"))
        return plan

    def run(self, storage: Storage, resources: Resources) -> Edit:
        """Removes the units whose descriptions have some words, one by one, doing only what is missing.

        Args:
            storage: The run directory, which holds descriptions of the model's layers.
            resources: What of the cluster to use; Ray must be connected.

        Raises:
            MilanError: A layer has no descriptions, none has the words, or images have no classes.
        """
        (output,) = self.outputs(Known(storage))
        config, public, work = self.config, output.keys, output.fingerprint.hash
        _, layers = described_model(storage, self.model, config.labeler)
        model = replace(self.model, layers=layers)
        units, unwanted = unwanted_units(storage, output.model, layers, config)
        due = self.why(storage, output)
        if due is None:
            say(f"{self.name} of {output.model}: up to date")
            alone = _stored_scores(storage, units, public)
        else:
            words = ", ".join(config.words)
            say(f"{self.name}: {len(unwanted)} of {len(units)} units of {output.model} speak of {words}")
            single = [units_of(units, np.array([place])) for place in range(len(units))]
            alone = run_ablations(storage, model, self.validation, single, resources, work).accuracy
            _store_scores(storage, units, alone, output)
        orders = removal_orders(alone, unwanted, config.trials, config.seed)
        if due is not None:
            counts = range(min(config.most, len(unwanted)) + 1)
            steps = [units_of(units, order.units[:count]) for order in orders for count in counts]
            sets, places = distinct_sets(steps)
            tables = []
            for split, probe in self.probes.items():
                fractions = [count / len(units) for count in counts]
                curves = [Curve(order.criterion, order.trial, split, fractions, tuple(counts)) for order in orders]
                accuracies = run_ablations(storage, model, probe, sets, resources, work)
                tables.append(ablation_rows(public, curves, accuracies, places))
            table = pa.concat_tables(tables)
            store_figure(storage, ABLATIONS, plot_editing(pl.DataFrame(pl.from_arrow(table))), **public)
            images = example_images(storage, self, units[orders[0].units[:SHOWN_UNITS]])
            store_figure(storage, ABLATIONS, plot_images(images, SHOWN_IMAGES), IMAGES, **public)
            storage.write(ABLATIONS, table, output.fingerprint, **public)  # last: it says that all is done
        storage.remove_work(work)
        rows = pl.DataFrame(pl.from_arrow(storage.read(ABLATIONS, **public))).filter(pl.col("class") == "")
        edit = Edit(rows, tuple(units[orders[0].units].select("layer", "unit").iter_rows()), 0, len(units))
        return replace(edit, stop=stop(edit.accuracy(VALIDATION)))


def unwanted_units(
    storage: Storage, model: str, layers: Sequence[str], config: EditingConfig
) -> tuple[pl.DataFrame, np.ndarray]:
    """All described units, and the places of those whose descriptions have the words.

    Raises:
        MilanError: None has.
    """
    units = read_descriptions(storage, model, layers, config.labeler)
    places = mentioning(units["description"].to_list(), config.words)
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
    """Fine-tunes the last layer with all units, and without the first so many of those found.

    Args:
        storage: The run directory.
        study: The editing.
        edit: From :meth:`Editing.run`.
        count: Units removed.
        train: Images with classes, to learn from.
        config: How to learn.
        resources: What of the cluster to use; Ray must be connected.

    Returns:
        Rows of schema ABLATIONS over all classes, and the last layer without the units.
    """
    steps = tuple(dict.fromkeys((0, count)))
    sets = [edit.removed(step) for step in steps]
    tuned, accuracies = fine_tune(study.model, train, study.probes, sets, config, resources)
    public = {"experiment": study.tuned_name, "model": study.model.name}
    fractions = [step / edit.units for step in steps]
    table = pa.concat_tables(
        ablation_rows(public, [Curve(FOUND, 0, split, fractions, steps)], of_split, range(len(steps)))
        for split, of_split in accuracies.items()
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
    storage.write(ABLATIONS, table, fingerprint, **public)
    return pl.DataFrame(pl.from_arrow(table)).filter(pl.col("class") == ""), tuned[-1]


def edited_weights(
    model: references.ModelRef, units: Mapping[str, Sequence[int]], probe: references.ProbeRef
) -> dict[str, torch.Tensor]:
    """Weights of a network without some units; see :func:`milan_ray.models.edit.edited`.

    Args:
        model: The network.
        units: Layer → units.
        probe: Images, a few of which the weights are checked on.
    """
    spec = references.model(replace(model, layers=tuple(units) or model.layers))
    views = model_views(probe, image_refs(references.probe(probe).manifest().slice(0, CHECKED)), spec)
    return edited(spec, spec.load(), units, torch.from_numpy(views))


def _store_scores(storage: Storage, units: pl.DataFrame, alone: np.ndarray, output: Output) -> None:
    columns = {name: units[name].to_list() for name in ("layer", "unit", "description")}
    keys = {key: [value] * len(units) for key, value in output.keys.items()}
    table = CRITERIA.table({**keys, **columns, "criterion": [ALONE] * len(units), "score": alone})
    storage.write(CRITERIA, table, output.fingerprint, **output.keys)


def _stored_scores(storage: Storage, units: pl.DataFrame, public: Mapping[str, str]) -> np.ndarray:
    rows = pl.DataFrame(pl.from_arrow(storage.read(CRITERIA, ["layer", "unit", "score"], **public)))
    return units.join(rows, on=["layer", "unit"], how="left", maintain_order="left")["score"].to_numpy()


def example_images(storage: Storage, study: Editing, units: pl.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Title and images, uint8 (n, H, W, 3), of each row of the paper's Figure 7.

    Args:
        storage: The run directory; a unit without exemplars in it is left out.
        study: The editing, whose splits come first.
        units: Columns layer, unit, description; exemplars of each, darkened outside of their masks.
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
    """Accuracy with all units, at the stopping rule's number, and at the best that the images would have told."""
    lines = [f"{len(edit.order)} units found; removing {edit.stop} keeps validation accuracy"]
    for split in dict.fromkeys(edit.rows["split"]):
        by_condition = {}
        for condition in (FOUND, EVERY):
            values = edit.accuracy(split, condition)
            by_condition[condition] = (
                f"{condition} {values[edit.stop]:.3f}, best {max(values):.3f} at {np.argmax(values)}"
            )
        trials = edit.rows.filter(pl.col("condition") == RANDOM)["trial"].unique()
        random = [edit.accuracy(split, RANDOM, trial)[edit.stop] for trial in trials]
        at_random = f"; {RANDOM} {np.mean(random):.3f} (mean of {len(random)})" if random else ""
        before = edit.accuracy(split)[0]
        lines.append(f"  {split}: {before:.3f} with all units; {'; '.join(by_condition.values())}{at_random}")
    return "\n".join(lines)
