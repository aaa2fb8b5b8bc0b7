"""Section 7 on the built-in world: networks that read class names in a corner, edited by descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from milan_ray.config import ExemplarConfig
from milan_ray.engine import references
from milan_ray.engine.stage import pairs, run_stage
from milan_ray.labelers.milan import MILAN
from milan_ray.report.figures import figure_path, store_figure
from milan_ray.schema import ABLATIONS
from milan_ray.scoring.bootstrap import Interval
from milan_ray.showcase import demo
from milan_ray.showcase.paper.claims import Claim, Section, evidence, shown, unit_lines
from milan_ray.showcase.paper.experiment_context import FEW_SCENES, SMALL_PROBES, ExperimentContext
from milan_ray.showcase.paper.plot import plot_networks
from milan_ray.stages import world
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.training import Training, TrainingJob
from milan_ray.storage import Storage
from milan_ray.studies.ablation.curves import RANDOM
from milan_ray.studies.ablation.run import run_ablations
from milan_ray.studies.editing.run import IMAGES, Edit, Editing, EditingConfig
from milan_ray.studies.editing.statistics import (
    COLOURS,
    EVERY,
    FOUND,
    TEST,
    TEXT,
    VALIDATION,
    Retrieval,
    mean_interval,
    mentioning,
)
from milan_ray.studies.judges.statistics import IOU_THRESHOLD
from milan_ray.studies.tables import read_descriptions
from milan_ray.world.lexicon import NAMES, names_of
from milan_ray.world.networks import ARCHITECTURES
from milan_ray.world.training import MISLED, misled_names, misled_tasks

NAME = "editing"

CAPTIONER = "world-text"
"""A captioner trained on the networks of the demo's captioner and on a network that reads text."""

READER = "cnn-text"
"""The network that reads text; the edited networks have an architecture that the captioner was not trained on."""

EDITED, COLOURED = "resnet-text", "resnet-colour"


@dataclass(frozen=True)
class Sizes:
    """Sizes and inputs of the experiment.

    Attributes:
        networks: Number of networks that are edited.
        validation: Scenes like those of training.
        test: The held-out scenes with misleading words.
        plain: The same scenes without words.
        editing: Settings of the editing.
        exemplars: Settings of the dissection.
        captioner: Captioner that describes the units; None trains :data:`CAPTIONER`.
        concepts: Concepts of the world's maps; the units that respond to them should be found.
    """

    networks: int
    validation: references.ProbeRef
    test: references.ProbeRef
    plain: references.ProbeRef
    editing: EditingConfig
    exemplars: ExemplarConfig
    captioner: str | None = None
    concepts: tuple[str, ...] = ("text",)


FULL = Sizes(
    MISLED[EDITED][2],
    references.ProbeRef(("world/spurious-text-validation",)),
    references.ProbeRef(("world/spurious-text-test",)),
    references.ProbeRef(("world/spurious-plain",)),
    EditingConfig(words=TEXT, most=20, trials=1),
    demo.EXEMPLARS,
)

COLOUR = replace(
    FULL,
    networks=MISLED[COLOURED][2],
    validation=references.ProbeRef(("world/spurious-colour-validation",)),
    test=references.ProbeRef(("world/spurious-colour-test",)),
    editing=replace(FULL.editing, words=COLOURS),
    captioner=CAPTIONER,
    concepts=names_of("colour"),
)
"""The reference's second version, which is not in the paper."""

SMALL = Sizes(
    1,
    references.ProbeRef(("few/spurious-text-validation",), plugins=SMALL_PROBES),
    references.ProbeRef(("few/spurious-text-test",), plugins=SMALL_PROBES),
    FEW_SCENES,
    EditingConfig(words=("e",), most=2, trials=1),
    ExemplarConfig(k=3, batch_size=48),
    demo.DECODER,
)
"""Every description contains an e, so that there is always a unit to remove."""


@dataclass(frozen=True)
class Network:
    """Result of one network.

    Attributes:
        edit: Its editing.
        plain: Accuracy of the whole network on scenes without words.
        retrieval: How well the units found match the units that respond to text.
    """

    edit: Edit
    plain: float
    retrieval: Retrieval

    def curves(self, split: str, condition: str) -> list[list[float]]:
        """Accuracy without the first 0, 1, 2, … units, of each order of a condition."""
        trials = self.edit.rows.filter(pl.col("condition") == condition)["trial"].unique()
        return [self.edit.accuracy(split, condition, trial) for trial in trials]

    def gain(self, condition: str, count: int | None = None) -> float:
        """Accuracy gained on misleading scenes by removing ``count`` units; None for the number that gains most."""
        curves = np.array(self.curves(TEST, condition))
        best = curves.max(1) if count is None else curves[:, min(count, curves.shape[1] - 1)]
        return float((best - curves[:, 0]).mean())

    @property
    def best(self) -> int:
        """Number of unwanted units whose removal gains most on misleading scenes."""
        return int(np.argmax(self.edit.accuracy(TEST)))


_TITLE = "Editing: networks without the units that read text (paper, Section 7 and Appendix E)"


def run(context: ExperimentContext) -> Section:
    """Edits networks that were trained on scenes half of which show their class's name, for the claims of Section 7."""
    storage, sizes = context.storage, SMALL if context.small else FULL
    name = context.experiment(NAME)
    models = [f"world/{own}" for own in misled_names(EDITED)[: sizes.networks]]
    networks, failures, examples = edit_networks(context, name, models, sizes)
    if not networks:
        text = f"Units that read text are found by {', '.join(sizes.editing.words)} in their descriptions."
        claim = Claim(text, "300 of 1024 units (§7)", "none found", False, "the captioner names none of them")
        return Section(NAME, _TITLE, (claim,), failures=failures, examples=examples)
    tables = [evidence("Accuracy with all units, and without those found by their descriptions", _table(networks))]
    if not context.small:
        coloured = edit_networks(context, f"{NAME} of colours", [f"world/{COLOURED}"], COLOUR)[0]
        tables.append(evidence("The same with a patch in the class's colour, and words of colours", _table(coloured)))
    images = figure_path(storage, ABLATIONS, stem=IMAGES, experiment=name, model=next(iter(networks)))
    every = {"experiment": name, "model": "all networks"}
    store_figure(storage, ABLATIONS, plot_networks(list(networks.values())), **every)
    figures = (images, figure_path(storage, ABLATIONS, **every))
    return Section(NAME, _TITLE, tuple(claims(networks)), figures, tuple(tables), failures[:12], examples)


def edit_networks(
    context: ExperimentContext, name: str, models: Sequence[str], sizes: Sizes
) -> tuple[dict[str, Network], tuple[str, ...], tuple[str, ...]]:
    """Edits networks; returns the results, failures as lines of text, and some descriptions at random."""
    storage, described = context.storage, describe(context, models, sizes)
    failures: list[str] = []
    examples: list[str] = []
    networks: dict[str, Network] = {}
    for model in models:
        units = read_descriptions(storage, model, described[model], MILAN)
        examples += unit_lines(units.with_columns(pl.lit(model).alias("model")), 4)
        if not len(mentioning(units["description"].to_list(), sizes.editing.words)):
            failures.append(f"{model}: no description contains {' or '.join(sizes.editing.words)}")
            continue
        ref = references.ModelRef(model)
        study = Editing(ref, sizes.validation, sizes.test, sizes.editing, name)
        edit = study.run(storage, context.resources)
        retrieval, wrong = _retrieval(storage, model, described[model], units, sizes, edit)
        failures += wrong
        whole = run_ablations(storage, ref, sizes.plain, [{}], context.resources)
        storage.remove_work(whole.work)
        networks[model] = Network(edit, float(whole.accuracy[0]), retrieval)
    return networks, tuple(failures), tuple(examples)


def describe(context: ExperimentContext, models: Sequence[str], sizes: Sizes) -> dict[str, tuple[str, ...]]:
    """Describes the networks' units; returns their layers."""
    storage, resources = context.storage, context.resources
    readers = [] if sizes.captioner else [f"world/{READER}"]
    needed = {model.removeprefix("world/") for model in (*models, *readers)}
    world.train_networks([task for task in misled_tasks() if task.name in needed])
    requested = [references.ModelRef(model) for model in (*models, *readers)]
    dissected = Exemplars(requested, sizes.validation, sizes.exemplars).run(storage, resources).models
    world.annotate(storage, sizes.validation, {model: dissected[model] for model in readers})
    encoder = EncoderRef(demo.DECODER)
    run_stage(Encodings(dissected, encoder), storage, resources)
    if readers:
        learned = {model: ARCHITECTURES[model.removeprefix("world/")].layers for model in demo.TRAIN}
        layers = tuple(pairs(learned | {model: dissected[model] for model in readers}))
        Training(TrainingJob(CAPTIONER, world.SOURCE, layers, encoder, demo.GROUP_TRAINING, demo.SIZES)).run(storage)
    described = {model: dissected[model] for model in models}
    run_descriptions(storage, described, Search(sizes.captioner or CAPTIONER), resources)
    return described


def _retrieval(
    storage: Storage, model: str, layers: Sequence[str], units: pl.DataFrame, sizes: Sizes, edit: Edit
) -> tuple[Retrieval, list[str]]:
    """How well the units found match the units that respond to the concepts, by the world's maps; and the mistakes."""
    truth = world.truth(storage, {model: layers}, sizes.test)[model]
    wanted = [NAMES.index(concept) for concept in sizes.concepts]
    true = np.isin(truth.concept, wanted) & (truth.iou > IOU_THRESHOLD)
    order = set(edit.order)
    unwanted = np.array([unit in order for unit in units.select("layer", "unit").iter_rows()])
    wrong = []
    for place in np.flatnonzero(unwanted != true):
        layer, unit, text = units.select("layer", "unit", "description").row(int(place))
        fires = f"fires at {NAMES[truth.concept[place]]} (IoU {truth.iou[place]:.2f})"
        wrong.append(f"{model} {layer} {unit}: “{text}”, but {fires}")
    return Retrieval(int(unwanted.sum()), int(true.sum()), int((unwanted & true).sum()), len(units)), wrong


def claims(networks: Mapping[str, Network]) -> list[Claim]:
    """Compares the claims of Section 7 with the results of several networks."""
    each = list(networks.values())
    whole = [network.edit.accuracy(TEST)[0] for network in each]
    lost = mean_interval([network.plain - accuracy for network, accuracy in zip(each, whole, strict=True)])
    retrieval = Retrieval(*map(sum, zip(*(network.retrieval for network in each), strict=True)))
    share = retrieval.true / retrieval.units
    best = {condition: mean_interval([n.gain(condition) for n in each]) for condition in (FOUND, EVERY, RANDOM)}
    beyond = mean_interval([n.gain(FOUND) - n.gain(EVERY) for n in each])
    beyond_random = mean_interval([n.gain(FOUND) - n.gain(RANDOM) for n in each])
    counts = ", ".join(str(network.best) for network in each)
    stops = ", ".join(str(network.edit.stop) for network in each)
    stopped = mean_interval([n.gain(FOUND, n.edit.stop) for n in each])
    errors = np.mean([n.gain(FOUND) / max(1e-9, 1 - accuracy) for n, accuracy in zip(each, whole, strict=True)])
    note = f"{len(each)} networks with weights, order and scenes of their own; 95 % intervals over them (Student's t)."
    return [
        Claim(
            "A network trained on images of which half show the name of their class does worse where names mislead.",
            "58.8 % on misleading images, 69.9 % on the same without text (§7, Figure 8)",
            f"{np.mean(whole):.1%} on misleading scenes, {np.mean([n.plain for n in each]):.1%} without words: "
            f"{_points(lost)} less",
            lost.low > 0,
            note,
        ),
        Claim(
            "Descriptions find the units that read text.",
            "300 of 1024 units are described by text, word or letter; nearly a third (§7)",
            f"{retrieval.found} of {retrieval.units} units; by concept maps {retrieval.true} fire at text. Precision "
            f"{shown(retrieval.precision, '.0%')}, recall {shown(retrieval.recall, '.0%')}",
            retrieval.found > 0 and retrieval.precision.low > share,
            "The paper has no truth to compare with; here those found must read text more often than units at large.",
        ),
        Claim(
            "Removing some of the units found improves accuracy on misleading images.",
            "+4.9 points with 13 units removed, 12 % of the errors (§7)",
            f"{_points(best[FOUND])} with {counts} units removed, {errors:.0%} of the errors",
            best[FOUND].low > 0,
            "Best number of units by the misleading images themselves, as in the paper.",
        ),
        Claim(
            "It improves more than removing as many of all units in the same order.",
            "less than 1 point by sorting all units (§7, Figure 8)",
            f"all units {_points(best[EVERY])}, random units {_points(best[RANDOM])}; found by description beyond all "
            f"units {_points(beyond)}, beyond random units {_points(beyond_random)}",
            beyond.low > 0 and beyond_random.low > 0,
            "Each order at its own best number of units.",
        ),
        Claim(
            "How many to remove can be told from validation images alone.",
            "8 units, the largest number before validation accuracy falls for good: +3.1 points (Appendix E)",
            f"{stops} units: {_points(stopped)}",
            stopped.low > 0,
        ),
    ]


def _points(interval: Interval) -> str:
    return f"{shown(interval, '+.1f', 100)} points"


def _table(networks: Mapping[str, Network]) -> pl.DataFrame:
    rows = []
    for model, network in networks.items():
        test = network.edit.accuracy(TEST)
        rows.append(
            {
                "network": model,
                "units found": network.retrieval.found,
                "should be found": network.retrieval.true,
                "validation": network.edit.accuracy(VALIDATION)[0],
                "nothing in the corner": network.plain,
                "misleading": test[0],
                "best": max(test),
                "best at": network.best,
                "by the rule": test[network.edit.stop],
                "rule's number": network.edit.stop,
                "all units, best": max(network.edit.accuracy(TEST, EVERY)),
            }
        )
    return pl.DataFrame(rows)
