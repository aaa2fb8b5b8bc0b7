"""Section 7 on the built-in world: networks that read class names in a corner, found out and mended by descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from milan_ray.config import ExemplarConfig
from milan_ray.engine import references
from milan_ray.engine.stage import run_stage
from milan_ray.labelers.milan import MILAN
from milan_ray.report.figures import figure_path, store_figure
from milan_ray.schema import ABLATIONS
from milan_ray.scoring.bootstrap import Interval
from milan_ray.showcase import demo
from milan_ray.showcase.paper.claims import Claim, Section
from milan_ray.showcase.paper.experiment_context import ExperimentContext
from milan_ray.showcase.paper.plot import plot_networks
from milan_ray.stages import world
from milan_ray.stages.captioners import EncoderRef
from milan_ray.stages.descriptions import Search, run_descriptions
from milan_ray.stages.encodings import Encodings
from milan_ray.stages.exemplars import Exemplars
from milan_ray.stages.training import Training, TrainingJob
from milan_ray.storage import Storage
from milan_ray.studies.ablation.run import run_ablations
from milan_ray.studies.analysis.run import read_descriptions
from milan_ray.studies.analysis.statistics import RANDOM
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
from milan_ray.world.lexicon import NAMES, names_of
from milan_ray.world.networks import ARCHITECTURES
from milan_ray.world.training import MISLED, misled_names, misled_tasks

NAME = "editing"

CAPTIONER = "world-text"
"""A captioner that learned, beside what the demo's did, from the units of a network that reads."""

READER = "cnn-text"
"""That network; the edited ones are of an architecture that the captioner never saw."""

EDITED, COLOURED = "resnet-text", "resnet-colour"

INTERPRETABLE = 0.04
"""IoU with a concept above which a unit counts as firing at it, as in network dissection (Bau et al. 2017)."""


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        networks: Networks that are edited.
        validation: Scenes like those of training.
        test: The held-out scenes with misleading words.
        plain: The same without words.
        editing: How to edit.
        exemplars: How to dissect.
        captioner: Captioner that describes; None trains :data:`CAPTIONER`.
        concepts: What units should be found that fire at it, in the world's concept maps.
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
"""The reference's other version, of which the paper says nothing."""

_FEW = ("milan_ray.world.small_probes",)
SMALL = Sizes(
    1,
    references.ProbeRef(("few/spurious-text-validation",), plugins=_FEW),
    references.ProbeRef(("few/spurious-text-test",), plugins=_FEW),
    references.ProbeRef(("few/heldout",), plugins=_FEW),
    EditingConfig(words=("e",), most=2, trials=1),
    ExemplarConfig(k=3, batch_size=48),
    demo.DECODER,
)
"""Any description has an e: there is something to remove, whatever the captioner says."""


@dataclass(frozen=True)
class Network:
    """What came of a network.

    Attributes:
        edit: Its editing.
        plain: Accuracy on scenes without words, of the whole network.
        retrieval: How well the units found are those that fire at text.
    """

    edit: Edit
    plain: float
    retrieval: Retrieval

    def curves(self, split: str, condition: str) -> list[list[float]]:
        """Accuracy without the first 0, 1, 2, … units, of each order of a condition."""
        trials = self.edit.rows.filter(pl.col("condition") == condition)["trial"].unique()
        return [self.edit.accuracy(split, condition, trial) for trial in trials]

    def gain(self, condition: str, count: int | None = None) -> float:
        """Accuracy on misleading scenes gained by removing so many units; None for the number that gains most."""
        curves = np.array(self.curves(TEST, condition))
        best = curves.max(1) if count is None else curves[:, min(count, curves.shape[1] - 1)]
        return float((best - curves[:, 0]).mean())

    @property
    def best(self) -> int:
        """Units found whose removal gains most on misleading scenes."""
        return int(np.argmax(self.edit.accuracy(TEST)))


def run(context: ExperimentContext) -> Section:
    """Trains networks on scenes that half show their class's name, edits them by descriptions, and says what came."""
    storage, sizes = context.storage, SMALL if context.small else FULL
    name = f"{NAME} (small)" if context.small else NAME
    models = [f"world/{own}" for own in misled_names(EDITED)[: sizes.networks]]
    networks, failures, examples = edit_networks(context, name, models, sizes)
    if not networks:
        text = f"Units that read text are found by {', '.join(sizes.editing.words)} in their descriptions."
        claim = Claim(text, "300 of 1024 units (§7)", "none found", False, "the captioner names none of them")
        return Section(NAME, _TITLE, (claim,), failures=failures, examples=examples)
    tables = [("Accuracy with all units, and without those found by their descriptions", _table(networks))]
    if not context.small:
        coloured = edit_networks(context, f"{NAME} of colours", [f"world/{COLOURED}"], COLOUR)[0]
        tables.append(("The same with a patch in the class's colour, and words of colours", _table(coloured)))
    images = figure_path(storage, ABLATIONS, stem=IMAGES, experiment=name, model=next(iter(networks)))
    every = {"experiment": name, "model": "all networks"}
    store_figure(storage, ABLATIONS, plot_networks(list(networks.values())), **every)
    figures = (images, figure_path(storage, ABLATIONS, **every))
    return Section(NAME, _TITLE, tuple(claims(networks)), figures, tuple(tables), failures[:12], examples)


def edit_networks(
    context: ExperimentContext, name: str, models: Sequence[str], sizes: Sizes
) -> tuple[dict[str, Network], tuple[str, ...], tuple[str, ...]]:
    """Edits networks; returns what came of each, where descriptions were wrong, and some descriptions at random."""
    storage, described = context.storage, describe(context, models, sizes)
    failures: list[str] = []
    examples: list[str] = []
    networks: dict[str, Network] = {}
    for model in models:
        units = read_descriptions(storage, model, described[model], MILAN)
        examples += [f"{model} {layer} {unit}: “{text}”" for layer, unit, text in units.sample(4, seed=0).iter_rows()]
        if not len(mentioning(units["description"].to_list(), sizes.editing.words)):
            failures.append(f"{model}: no description contains {' or '.join(sizes.editing.words)}")
            continue
        ref = references.ModelRef(model)
        study = Editing(ref, sizes.validation, sizes.test, sizes.editing, name)
        edit = study.run(storage, context.resources)
        retrieval, wrong = _retrieval(storage, model, described[model], sizes, edit)
        failures += wrong
        whole = run_ablations(storage, ref, sizes.plain, [{}], context.resources)
        storage.remove_work(whole.work)
        networks[model] = Network(edit, float(whole.accuracy[0]), retrieval)
    return networks, tuple(failures), tuple(examples)


_TITLE = "Editing: networks without the units that read text (paper, Section 7 and Appendix E)"


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
        layers = tuple(
            (model, layer)
            for model, of_model in (learned | {model: dissected[model] for model in readers}).items()
            for layer in of_model
        )
        Training(TrainingJob(CAPTIONER, world.SOURCE, layers, encoder, demo.GROUP_TRAINING, demo.SIZES)).run(storage)
    described = {model: dissected[model] for model in models}
    run_descriptions(storage, described, Search(sizes.captioner or CAPTIONER), resources)
    return described


def _retrieval(
    storage: Storage, model: str, layers: Sequence[str], sizes: Sizes, edit: Edit
) -> tuple[Retrieval, list[str]]:
    """How well the units found are those that fire at the concepts, by the world's maps; where they are not."""
    truth = world.truth(storage, {model: layers}, sizes.test)[model]
    units = read_descriptions(storage, model, layers, MILAN)
    wanted = [NAMES.index(concept) for concept in sizes.concepts]
    true = np.isin(truth.concept, wanted) & (truth.iou > INTERPRETABLE)
    order = set(edit.order)
    found = np.array([unit in order for unit in units.select("layer", "unit").iter_rows()])
    wrong = []
    for place in np.flatnonzero(found != true):
        layer, unit, text = units.select("layer", "unit", "description").row(int(place))
        fires = f"fires at {NAMES[truth.concept[place]]} (IoU {truth.iou[place]:.2f})"
        wrong.append(f"{model} {layer} {unit}: “{text}”, but {fires}")
    return Retrieval(int(found.sum()), int(true.sum()), int((found & true).sum()), len(units)), wrong


def claims(networks: Mapping[str, Network]) -> list[Claim]:
    """What the paper says of editing, beside what was found on several networks."""
    each = list(networks.values())
    whole = [network.edit.accuracy(TEST)[0] for network in each]
    lost = mean_interval([network.plain - accuracy for network, accuracy in zip(each, whole, strict=True)])
    retrieval = sum((network.retrieval for network in each[1:]), each[0].retrieval)
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
            f"{_share(retrieval.precision)}, recall {_share(retrieval.recall)}",
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


def _points(found: Interval) -> str:
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}] points"


def _share(found: Interval) -> str:
    return f"{found.value:.0%} [{found.low:.0%}, {found.high:.0%}]"


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
