"""How much units matter by what is said of them: descriptions ─► scores, orders ─► accuracy as units are ablated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pyarrow as pa
from spacy.language import Language

from milan_ray.config import Fingerprint, Resources
from milan_ray.engine import references
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.errors import MilanError
from milan_ray.models.ablation import UnitSet
from milan_ray.models.registry import ModelSpec
from milan_ray.models.weights import weights_digest
from milan_ray.probe.manifest import digest
from milan_ray.progress import say
from milan_ray.report.figures import store_figure
from milan_ray.schema import ABLATIONS, CRITERIA, DESCRIPTIONS, LAYER_PROPERTIES
from milan_ray.storage import Storage
from milan_ray.studies.ablation.run import Accuracies, run_ablations
from milan_ray.studies.analysis import statistics as analysis
from milan_ray.studies.analysis.plot import plot_analysis

KERNEL_VERSION = "analysis-2"


@dataclass(frozen=True)
class AnalysisConfig:
    """How a network is analysed; the defaults are the reference's.

    Attributes:
        labeler: Whose descriptions.
        words: Words that descriptions are compared with.
        fractions: Shares of all units that are ablated.
        trials: Random orders.
        seed: Of the random orders.
        ties: Orders per criterion with ties broken at random; 0 for one, ties in the table's order as in the reference.
        matched: Criteria for which as many other units of the same layers are ablated too.
        split: What the images are called in the tables.
    """

    labeler: str = "milan"
    words: tuple[str, ...] = analysis.WORDS
    fractions: tuple[float, ...] = analysis.FRACTIONS
    trials: int = 5
    seed: int = 0
    ties: int = 0
    matched: tuple[str, ...] = ()
    split: str = "validation"


@dataclass(frozen=True)
class Analysis(Stage):
    """Accuracy of a classifier as units are ablated, by order; :meth:`run` makes it.

    Attributes:
        model: The classifier.
        probe: Images with classes, on which accuracy is counted.
        language: Name of the spaCy pipeline that reads descriptions: printed, and part of what decides the result.
        config: How to analyse.
        name: Name of the experiment in the tables.
    """

    table = ABLATIONS

    model: references.ModelRef
    probe: references.ProbeRef
    language: str
    config: AnalysisConfig
    name: str = "analysis"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The accuracies, which follow from descriptions, weights and images.

        Raises:
            MilanError: A layer has no descriptions.
        """
        spec, layers = described_model(known.storage, self.model, self.config.labeler)
        yield Output(
            {"experiment": self.name, "model": spec.name},
            Fingerprint.of(
                {
                    "kernel": KERNEL_VERSION,
                    "descriptions": descriptions_of(known, spec.name, layers, self.config.labeler),
                    "weights": weights_digest(spec.load()),
                    "probe": digest(references.probe(self.probe).manifest()),
                    "language": self.language,
                    "analysis": self.config,
                }
            ),
        )

    def run(self, storage: Storage, nlp: Language, resources: Resources) -> pl.DataFrame:
        """Ablates units in the orders that their descriptions give, doing only what is missing.

        Args:
            storage: The run directory, which holds descriptions of the model's layers.
            nlp: The spaCy pipeline that reads descriptions.
            resources: What of the cluster to use; Ray must be connected.

        Returns:
            Rows of schema ABLATIONS, over all classes; those of single classes are in the table too.

        Raises:
            MilanError: A layer has no descriptions, or the images have no classes.
        """
        (output,) = self.outputs(Known(storage))
        say(f"{self.name}: sentences are read by {self.language}")
        for missing in analysis.missing_criteria(nlp, self.config.words):
            say(f"{self.name}: without {', '.join(missing.criteria)}, because {missing.reason}")
        if self.why(storage, output) is None:
            say(f"{self.name} of {output.model}: up to date")
        else:
            _analyse(storage, self, output, nlp, resources)
        storage.remove_work(output.fingerprint.hash)
        rows = pl.DataFrame(pl.from_arrow(storage.read(ABLATIONS, **output.keys)))
        return rows.filter(pl.col("class") == "")


def _analyse(storage: Storage, study: Analysis, output: Output, nlp: Language, resources: Resources) -> None:
    """Makes all tables and the figure of an analysis."""
    config, fingerprint, public = study.config, output.fingerprint, output.keys
    _, layers = described_model(storage, study.model, config.labeler)
    units = read_descriptions(storage, output.model, layers, config.labeler)
    scores = analysis.unit_scores(units, nlp, config.words)
    properties = analysis.layer_properties(scores)
    rows = scores.unpivot(
        analysis.criteria(scores), index=["layer", "unit", "description"], variable_name="criterion", value_name="score"
    )
    for table, frame in ((CRITERIA, rows), (LAYER_PROPERTIES, properties)):
        columns = {name: frame[name].to_list() for name in frame.columns}
        keys = {key: [value] * len(frame) for key, value in public.items()}
        storage.write(table, table.table({**keys, **columns}), fingerprint, **public)
    orders = analysis.orders(scores, config.trials, config.seed, config.ties, config.matched)
    steps = [analysis.steps(order, config.fractions) for order in orders]
    sets, places = distinct_sets([analysis.units_of(scores, step) for of_order in steps for step in of_order])
    model = replace(study.model, layers=layers)
    accuracies = run_ablations(storage, model, study.probe, sets, resources, fingerprint.hash)
    curves = [
        Curve(order.criterion, order.trial, config.split, config.fractions, tuple(map(len, of_order)))
        for order, of_order in zip(orders, steps, strict=True)
    ]
    ablations = ablation_rows(public, curves, accuracies, places)
    figure = plot_analysis(pl.DataFrame(pl.from_arrow(ablations)), properties, study.language)
    store_figure(storage, ABLATIONS, figure, **public)
    storage.write(ABLATIONS, ablations, fingerprint, **public)  # last: it says that all is done


@dataclass(frozen=True)
class Curve:
    """Units of one order, switched off step by step.

    Attributes:
        condition: By what they were ordered.
        trial: Which of several such orders.
        split: On which images accuracy was counted.
        fractions: Share of all units, per step.
        ablated: Units switched off, per step.
    """

    condition: str
    trial: int
    split: str
    fractions: Sequence[float]
    ablated: Sequence[int]


def ablation_rows(
    public: Mapping[str, str], curves: Sequence[Curve], accuracies: Accuracies, places: Sequence[int]
) -> pa.Table:
    """Rows of schema ABLATIONS: every step of every curve, over all images and by class.

    Args:
        public: Partition keys.
        curves: What was ablated.
        accuracies: Accuracies of distinct sets.
        places: For each step of each curve, in order, the place of its set in ``accuracies``.
    """
    shown = np.flatnonzero(accuracies.images)
    names = ["", *(accuracies.classes[number] for number in shown)]
    counts = np.concatenate([[accuracies.images.sum()], accuracies.images[shown]])
    steps = [(curve, step) for curve in curves for step in range(len(curve.ablated))]
    correct = accuracies.correct
    right = np.concatenate([correct.sum(1, keepdims=True), correct[:, shown]], axis=1)[list(places)]
    rows = len(steps) * len(names)

    def column(values: list[object]) -> list[object]:
        return [value for value in values for _ in names]

    return ABLATIONS.table(
        {
            **{key: [value] * rows for key, value in public.items()},
            "condition": column([curve.condition for curve, _ in steps]),
            "trial": column([curve.trial for curve, _ in steps]),
            "split": column([curve.split for curve, _ in steps]),
            "fraction": column([float(curve.fractions[step]) for curve, step in steps]),
            "ablated": column([curve.ablated[step] for curve, step in steps]),
            "class": names * len(steps),
            "accuracy": (right / counts).ravel(),
            "n": np.tile(counts, len(steps)),
        }
    )


def distinct_sets(sets: Sequence[UnitSet]) -> tuple[list[UnitSet], list[int]]:
    """Sets without repetition, and for each set given its place among them."""
    keys = [frozenset((layer, unit) for layer, units in of_layers.items() for unit in units) for of_layers in sets]
    distinct = dict(zip(reversed(keys), reversed(sets), strict=True))  # of equal sets the first
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return [distinct[key] for key in places], [places[key] for key in keys]


def described_model(storage: Storage, ref: references.ModelRef, labeler: str) -> tuple[ModelSpec, tuple[str, ...]]:
    """A model, and the layers asked for, all of which must be described.

    Raises:
        MilanError: One is not.
    """
    spec = references.model(ref)
    layers = ref.layers or spec.layers
    there = {keys["layer"] for keys in storage.partitions(DESCRIPTIONS, labeler=labeler, model=spec.name)}
    if absent := [layer for layer in layers if layer not in there]:
        raise MilanError(
            f"{storage.root} holds no descriptions of {spec.name} {', '.join(absent)} by {labeler}: run "
            f"`python -m jobs.describe --model {spec.name} …` first, or choose --layers."
        )
    return spec, tuple(layers)


def descriptions_of(known: Known, model: str, layers: Sequence[str], labeler: str) -> dict[str, str]:
    """Layer → configuration hash of its descriptions."""
    return {layer: known.config(DESCRIPTIONS, labeler=labeler, model=model, layer=layer) for layer in layers}


def read_descriptions(storage: Storage, model: str, layers: Sequence[str], labeler: str) -> pl.DataFrame:
    """Columns layer, unit, description of some layers, in their order and by number of the unit."""
    columns = ["layer", "unit", "description"]
    tables = (storage.read(DESCRIPTIONS, columns, labeler=labeler, model=model, layer=layer) for layer in layers)
    return pl.concat(pl.DataFrame(pl.from_arrow(table)).sort("unit") for table in tables)


def stored_scores(storage: Storage, model: str, name: str = "analysis") -> pl.DataFrame:
    """The scores that an analysis stored: a row per unit, columns as those of :func:`analysis.unit_scores`."""
    rows = pl.DataFrame(pl.from_arrow(storage.read(CRITERIA, experiment=name, model=model)))
    return rows.pivot("criterion", index=["layer", "unit", "description"], values="score", maintain_order=True)


def summary(rows: pl.DataFrame) -> str:
    """Accuracy without any and with the largest share of units ablated, by condition, the worst first.

    Behind it the mean over all steps, where it lies outside the range in which 95 % of random orders are expected.
    """
    last = rows.filter(pl.col("fraction") == pl.col("fraction").max())
    means = last.group_by("condition").agg(pl.col("accuracy").mean(), pl.len().alias("trials")).sort("accuracy")
    start = rows.filter(pl.col("ablated") == 0)["accuracy"][0]
    lines = [f"accuracy on {rows['n'][0]:,} images: {start:.3f}; with {last['fraction'][0]:.0%} of units ablated by"]
    unusual = {}
    for name, height, _, low, high in analysis.beside_random(rows).iter_rows():
        if low is not None and not low <= height <= high:
            matter = "more" if height < low else "less"
            unusual[name] = (
                f"  these units matter {matter}: {height:.3f} over all steps, random [{low:.3f}, {high:.3f}]"
            )
    lines += [f"  {name:24} {value:.3f}{unusual.get(name, '')}" for name, value, _ in means.iter_rows()]
    return "\n".join(lines)


def examples(storage: Storage, model: str, count: int = 3, name: str = "analysis") -> str:
    """The units that each criterion ablated first, for people."""
    first = analysis.first_ablated(stored_scores(storage, model, name), count)
    lines = ["ablated first by"]
    for (criterion,), rows in first.group_by(["criterion"], maintain_order=True):
        shown = "; ".join(
            f"{layer} {unit} “{text}”" for layer, unit, text in rows.select("layer", "unit", "description").iter_rows()
        )
        lines.append(f"  {criterion:24} {shown}")
    return "\n".join(lines)
