"""Editing a network: units found by their descriptions ─► importance ─► accuracy without them ─► edited weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa
import torch

from milan_ray.config import Fingerprint, Resources
from milan_ray.engine import references
from milan_ray.errors import MilanError
from milan_ray.models.edit import edited
from milan_ray.models.heads import HeadTraining
from milan_ray.models.registry import ModelSpec
from milan_ray.models.weights import weights_digest
from milan_ray.probe.manifest import image_refs
from milan_ray.progress import say
from milan_ray.report import figures
from milan_ray.schema import ABLATIONS, CRITERIA, EXEMPLARS, FIGURE
from milan_ray.stages.exemplars import store_manifest
from milan_ray.storage import Storage
from milan_ray.studies.ablation.run import run_ablations
from milan_ray.studies.analysis.run import (
    Curve,
    ablation_rows,
    described_model,
    descriptions_of,
    distinct_sets,
    figure_path,
    read_descriptions,
)
from milan_ray.studies.analysis.statistics import RANDOM, units_of
from milan_ray.studies.editing.fine_tune import Tuned, fine_tune
from milan_ray.studies.editing.statistics import EVERY, FOUND, MOST, TEXT, mentioning, removal_orders, stop
from milan_ray.studies.exemplar_images import (
    exemplar_views,
    model_views,
    unit_exemplars,
    unit_masks,
    veiled,
    visible_views,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KERNEL_VERSION = "editing-1"

VALIDATION, TEST = "validation", "test"
"""Splits: images like those of training, which choose; images that the network must not fail on, which judge."""

ALONE = "validation accuracy without the unit"
"""The criterion by which units are removed."""

IMAGES = "images"
"""Stem of the figure of images, beside that of accuracies."""

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
    """What came of it.

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


def run_editing(
    storage: Storage,
    model: references.ModelRef,
    validation: references.ProbeRef,
    test: references.ProbeRef | None,
    config: EditingConfig,
    resources: Resources,
    name: str = "editing",
) -> Edit:
    """Removes the units whose descriptions have some words, one by one, doing only what is missing.

    Args:
        storage: The run directory, which holds descriptions of the model's layers.
        model: The classifier.
        validation: Images with classes, like those of training: they order units and say when to stop.
        test: Images with classes that judge, e.g. with misleading texts; None for none.
        config: How.
        resources: What of the cluster to use; Ray must be connected.
        name: Name of the experiment in the tables.

    Raises:
        MilanError: A layer has no descriptions, none has the words, or images have no classes.
    """
    spec, layers = described_model(storage, model, config.labeler)
    every = replace(model, layers=layers)
    probes = splits(validation, test)
    digests = {split: store_manifest(storage, probe)[1] for split, probe in probes.items()}
    fingerprint = editing_fingerprint(storage, spec, layers, digests, config)
    public = {"experiment": name, "model": spec.name}
    units, found = unwanted_units(storage, spec.name, layers, config)
    if storage.why(ABLATIONS, fingerprint, **public) is None:
        say(f"{name} of {spec.name}: up to date")
        alone = _stored_scores(storage, units, public)
    else:
        say(f"{name}: {len(found)} of {len(units)} units of {spec.name} speak of {', '.join(config.words)}")
        single = [units_of(units, np.array([place])) for place in range(len(units))]
        counted = run_ablations(storage, every, validation, single, resources, fingerprint.hash)
        alone = counted.accuracy
        _store_scores(storage, units, alone, fingerprint, public)
    orders = removal_orders(alone, found, config.trials, config.seed)
    if storage.why(ABLATIONS, fingerprint, **public) is not None:
        most = min(config.most, len(found))
        steps = [[order.units[:count] for count in range(most + 1)] for order in orders]
        sets, places = distinct_sets([units_of(units, step) for of_order in steps for step in of_order])
        tables = []
        for split, probe in probes.items():
            fractions = [count / len(units) for count in range(most + 1)]
            curves = [Curve(o.criterion, o.trial, split, fractions, tuple(range(most + 1))) for o in orders]
            accuracies = run_ablations(storage, every, probe, sets, resources, fingerprint.hash)
            tables.append(ablation_rows(public, curves, accuracies, places))
        table = pa.concat_tables(tables)
        first = units[orders[0].units[:SHOWN_UNITS]]
        for stem, figure in (
            (FIGURE, draw(pl.DataFrame(pl.from_arrow(table)))),
            (IMAGES, draw_images(storage, spec, probes, first)),
        ):
            for ending, picture in figures.files(figure).items():
                storage.put(figure_path(storage, public, ending, stem), picture)
        storage.write(ABLATIONS, table, fingerprint, **public)  # last: it says that all is done
    storage.remove_work(fingerprint.hash)
    rows = pl.DataFrame(pl.from_arrow(storage.read(ABLATIONS, **public))).filter(pl.col("class") == "")
    order = tuple(units[orders[0].units].select("layer", "unit").iter_rows())
    edit = Edit(rows, order, 0, len(units))
    return replace(edit, stop=stop(edit.accuracy(VALIDATION)))


def splits(validation: references.ProbeRef, test: references.ProbeRef | None) -> dict[str, references.ProbeRef]:
    """Split → images, of an editing."""
    return {VALIDATION: validation, **({} if test is None else {TEST: test})}


def editing_fingerprint(
    storage: Storage, spec: ModelSpec, layers: Sequence[str], probes: Mapping[str, str], config: EditingConfig
) -> Fingerprint:
    """What decides an editing.

    Args:
        storage: The run directory.
        spec: The classifier.
        layers: Its layers, which are described.
        probes: Split → digest of its images.
        config: How.
    """
    return Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "descriptions": descriptions_of(storage, spec.name, layers, config.labeler),
            "weights": weights_digest(spec.load()),
            "probes": dict(probes),
            "editing": config,
        }
    )


def unwanted_units(
    storage: Storage, model: str, layers: Sequence[str], config: EditingConfig
) -> tuple[pl.DataFrame, np.ndarray]:
    """All described units, and the places of those whose descriptions have the words.

    Raises:
        MilanError: None has.
    """
    units = read_descriptions(storage, layers, {"labeler": config.labeler, "model": model})
    found = mentioning(units["description"].to_list(), config.words)
    if not len(found):
        raise MilanError(
            f"no description of {model} by {config.labeler} contains {' or '.join(config.words)}: choose --words."
        )
    return units, found


def tuned_name(name: str) -> str:
    """What the experiment is called that fine-tunes after an editing."""
    return f"{name}, fine-tuned"


def run_fine_tuning(
    storage: Storage,
    model: references.ModelRef,
    train: references.ProbeRef,
    probes: Mapping[str, references.ProbeRef],
    edit: Edit,
    count: int,
    config: HeadTraining,
    resources: Resources,
    name: str = "editing",
) -> tuple[pl.DataFrame, Tuned]:
    """Fine-tunes the last layer with all units, and without the first so many of those found.

    Args:
        storage: The run directory.
        model: The classifier.
        train: Images with classes, to learn from.
        probes: Split → images with classes, to count accuracy on.
        edit: From :func:`run_editing`.
        count: Units removed.
        config: How to learn.
        resources: What of the cluster to use; Ray must be connected.
        name: Name of the editing; the rows' is ``NAME, fine-tuned``.

    Returns:
        Rows of schema ABLATIONS over all classes, and the last layer without the units.
    """
    steps = tuple(dict.fromkeys((0, count)))
    tuned, accuracies = fine_tune(model, train, probes, [edit.removed(step) for step in steps], config, resources)
    public = {"experiment": tuned_name(name), "model": model.name}
    units = edit.units
    tables = [
        ablation_rows(
            public, [Curve(FOUND, 0, split, [step / units for step in steps], steps)], found, range(len(steps))
        )
        for split, found in accuracies.items()
    ]
    fingerprint = Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "weights": weights_digest(references.model(model).load()),
            "units": [list(unit) for unit in edit.order[:count]],
            "probes": {split: store_manifest(storage, probe)[1] for split, probe in {"train": train, **probes}.items()},
            "training": config,
        }
    )
    table = pa.concat_tables(tables)
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


def _store_scores(
    storage: Storage, units: pl.DataFrame, alone: np.ndarray, fingerprint: Fingerprint, public: dict[str, str]
) -> None:
    columns = {name: units[name].to_list() for name in ("layer", "unit", "description")}
    keys = {key: [value] * len(units) for key, value in public.items()}
    table = CRITERIA.table({**keys, **columns, "criterion": [ALONE] * len(units), "score": alone})
    storage.write(CRITERIA, table, fingerprint, **public)


def _stored_scores(storage: Storage, units: pl.DataFrame, public: dict[str, str]) -> np.ndarray:
    rows = pl.DataFrame(pl.from_arrow(storage.read(CRITERIA, ["layer", "unit", "score"], **public)))
    return units.join(rows, on=["layer", "unit"], how="left", maintain_order="left")["score"].to_numpy()


def draw(rows: pl.DataFrame) -> Figure:
    """The paper's Figures 8 and 15: accuracy as units are removed, on each split."""
    rows = rows.filter(pl.col("class") == "")
    splits = [split for split in (TEST, VALIDATION) if split in set(rows["split"])]
    figure = figures.new_figure(4.5 * len(splits), 3.6)
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        here = rows.filter(pl.col("split") == split)
        random = here.filter(pl.col("condition") == RANDOM).group_by("ablated").agg(
            pl.col("accuracy").mean().alias("mean"), pl.col("accuracy").min().alias("low"),
            pl.col("accuracy").max().alias("high"),
        ).sort("ablated")  # fmt: skip
        if len(random):
            axes.plot(random["ablated"], random["mean"], "--", color="0.4", label="random, mean and range")
            axes.fill_between(random["ablated"], random["low"], random["high"], color="0.4", alpha=0.2)
        for condition, label in ((FOUND, "found by description"), (EVERY, "all units")):
            line = here.filter(pl.col("condition") == condition).sort("ablated")
            axes.plot(line["ablated"], line["accuracy"], label=label)
        axes.axhline(here.filter(pl.col("ablated") == 0)["accuracy"][0], color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xlabel("units removed")
        axes.set_ylabel("accuracy")
        axes.set_title(f"{split} images (n = {here['n'][0]:,})", fontsize="medium")
        axes.legend(fontsize="x-small")
    figure.suptitle(rows["model"][0], fontsize="small")
    return figure


def draw_images(
    storage: Storage, spec: ModelSpec, probes: Mapping[str, references.ProbeRef], units: pl.DataFrame
) -> Figure:
    """The paper's Figure 7: images of each split, and exemplars of units found by their descriptions.

    Args:
        storage: The run directory; a unit without exemplars in it is left out.
        spec: The model.
        probes: Split → images.
        units: Columns layer, unit, description.
    """
    rows: list[tuple[str, np.ndarray]] = []
    for split, probe in probes.items():
        refs = image_refs(references.probe(probe).manifest().slice(0, SHOWN_IMAGES))
        rows.append((f"{split} images", visible_views(probe, refs, spec)))
    for layer, unit, text in units.select("layer", "unit", "description").iter_rows():
        if storage.metadata(EXEMPLARS, model=spec.name, layer=layer) is None:
            continue
        mine = unit_exemplars(storage, spec.name, layer, unit).head(SHOWN_IMAGES)
        found = exemplar_views(storage, spec.name, layer, mine["image_id"].to_list())
        masks = unit_masks(storage, spec.name, layer, mine["mask"].to_list())
        rows.append((f"{layer} {unit}\n“{text}”", veiled(found, masks)))
    figure = figures.new_figure(1.1 * SHOWN_IMAGES + 1.5, 1.15 * len(rows))
    panels = figure.subplots(len(rows), SHOWN_IMAGES, squeeze=False)
    for places, (title, images) in zip(panels, rows, strict=True):
        places[0].set_ylabel(title, fontsize="x-small", rotation=0, ha="right", va="center")
        for number, axes in enumerate(places):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_frame_on(False)
            if number < len(images):
                axes.imshow(images[number])
    return figure


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
