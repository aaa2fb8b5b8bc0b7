"""How much units matter, by their descriptions: descriptions ─► scores, orders ─► accuracy as units are ablated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import polars as pl
from spacy.language import Language

from milan_ray.config import Fingerprint, Resources
from milan_ray.engine import references
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.models.weights import weights_digest
from milan_ray.probe.manifest import digest
from milan_ray.progress import say
from milan_ray.report.figures import store_figure
from milan_ray.schema import ABLATIONS, CRITERIA, LAYER_PROPERTIES
from milan_ray.storage import Storage
from milan_ray.studies.ablation.curves import ablation_rows, step_sets
from milan_ray.studies.ablation.run import run_ablations
from milan_ray.studies.analysis import statistics as analysis
from milan_ray.studies.analysis.plot import plot_analysis
from milan_ray.studies.tables import (
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

KERNEL_VERSION = "analysis-2"


@dataclass(frozen=True)
class AnalysisConfig:
    """Settings of an analysis; the defaults are the reference's.

    Attributes:
        labeler: Labeler whose descriptions are read.
        words: Words that descriptions are compared with.
        fractions: Shares of all units that are ablated.
        trials: Random orders.
        seed: Seed of the random orders.
        ties: Orders per criterion with ties broken at random; 0 for one order, with ties in the order of the table, as
            in the reference.
        matched: Criteria that are compared with as many random units of the same layers.
        split: Name of the images in the tables.
        supported_by: Judge whose verdicts decide which descriptions are read: supported ones; None reads all.
    """

    labeler: str = "milan"
    words: tuple[str, ...] = analysis.WORDS
    fractions: tuple[float, ...] = analysis.FRACTIONS
    trials: int = 5
    seed: int = 0
    ties: int = 0
    matched: tuple[str, ...] = ()
    split: str = "validation"
    supported_by: str | None = None


@dataclass(frozen=True)
class Analysis(Stage):
    """Accuracy of a classifier as units are ablated, by order.

    Attributes:
        model: The classifier.
        probe: Images with classes, on which accuracy is counted.
        language: Name of the spaCy pipeline that reads descriptions: printed, and part of the fingerprint.
        config: Settings.
        name: Name of the experiment in the tables.
    """

    table = ABLATIONS

    model: references.ModelRef
    probe: references.ProbeRef
    language: str
    config: AnalysisConfig
    name: str = "analysis"

    def outputs(self, known: Known) -> Iterator[Output]:
        """The accuracies, determined by descriptions, weights and images.

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
                    "analysis": settings(self.config),
                    **supported_inputs(
                        known.storage, self.config.supported_by, self.config.labeler, {spec.name: layers}
                    ),
                }
            ),
        )

    def run(self, storage: Storage, nlp: Language, resources: Resources) -> pl.DataFrame:
        """Ablates units in the orders that follow from their descriptions, unless the result is up to date.

        Args:
            storage: The run directory, which holds descriptions of the model's layers.
            nlp: The spaCy pipeline that reads descriptions.
            resources: The part of the cluster to use; Ray must be connected.

        Returns:
            Rows of schema ABLATIONS over all classes; the table also has rows of single classes.

        Raises:
            MilanError: A layer has no descriptions, or the images have no classes.
        """
        (output,) = self.outputs(Known(storage))
        say(f"{self.name}: sentences are read by {self.language}")
        for reason, criteria in analysis.missing_criteria(nlp, self.config.words).items():
            say(f"{self.name}: without {', '.join(criteria)}, because {reason}")
        if self.why(storage, output) is None:
            say(f"{self.name} of {output.model}: up to date")
        else:
            _analyse(storage, self, output, nlp, resources)
        storage.remove_work(output.fingerprint.hash)
        return of_all_classes(read_frame(storage, ABLATIONS, **output.keys))


def _analyse(storage: Storage, study: Analysis, output: Output, nlp: Language, resources: Resources) -> None:
    """Makes all tables and the figure of an analysis."""
    config, fingerprint, keys = study.config, output.fingerprint, output.keys
    _, layers = described_model(storage, study.model, config.labeler)
    units = read_descriptions(storage, output.model, layers, config.labeler, config.supported_by)
    scores = analysis.unit_scores(units, nlp, config.words)
    properties = analysis.layer_properties(scores)
    by_criterion = scores.unpivot(
        analysis.criteria(scores), index=["layer", "unit", "description"], variable_name="criterion", value_name="score"
    )
    write_frame(storage, CRITERIA, by_criterion, fingerprint, **keys)
    write_frame(storage, LAYER_PROPERTIES, properties, fingerprint, **keys)
    orders = analysis.orders(scores, config.trials, config.seed, config.ties, config.matched)
    counts = analysis.step_counts(len(scores), config.fractions)
    sets = step_sets(scores, orders, counts)
    model = replace(study.model, layers=layers)
    accuracies = run_ablations(storage, model, study.probe, sets, resources, fingerprint.hash)
    curves = [(order.criterion, order.trial) for order in orders]
    steps = list(zip(config.fractions, counts, strict=True))
    ablations = ablation_rows(keys, config.split, curves, steps, accuracies)
    store_figure(storage, ABLATIONS, plot_analysis(frame_of(ablations), properties, study.language), **keys)
    storage.write(ABLATIONS, ablations, fingerprint, **keys)  # last: marks the analysis as complete


def stored_scores(storage: Storage, model: str, name: str = "analysis") -> pl.DataFrame:
    """The scores that an analysis stored: a row per unit, columns as those of :func:`analysis.unit_scores`."""
    rows = read_frame(storage, CRITERIA, experiment=name, model=model)
    return rows.pivot("criterion", index=["layer", "unit", "description"], values="score", maintain_order=True)


def summary(rows: pl.DataFrame) -> str:
    """Accuracy with no unit and with the largest share of units ablated, by condition, the lowest first.

    Adds the mean over all steps if it is outside the range in which 95 % of random orders are expected.
    """
    last = rows.filter(pl.col("fraction") == pl.col("fraction").max())
    means = last.group_by("condition").agg(pl.col("accuracy").mean()).sort("accuracy")
    start = rows.filter(pl.col("ablated") == 0)["accuracy"][0]
    lines = [f"accuracy on {rows['n'][0]:,} images: {start:.3f}; with {last['fraction'][0]:.0%} of units ablated by"]
    unusual = {
        name: f"  these units matter {'more' if height < low else 'less'}: {height:.3f} over all steps, random "
        f"[{low:.3f}, {high:.3f}]"
        for name, height, _, low, high in analysis.beside_random(rows).iter_rows()
        if low is not None and not low <= height <= high
    }
    lines += [f"  {name:24} {value:.3f}{unusual.get(name, '')}" for name, value in means.iter_rows()]
    return "\n".join(lines)


def examples(storage: Storage, model: str, count: int = 3, name: str = "analysis") -> str:
    """The units that each criterion ablates first, as lines of text."""
    first = analysis.first_ablated(stored_scores(storage, model, name), count)
    lines = ["ablated first by"]
    for (criterion,), rows in first.group_by(["criterion"], maintain_order=True):
        units = (f"{row['layer']} {row['unit']} “{row['description']}”" for row in rows.to_dicts())
        lines.append(f"  {criterion:24} {'; '.join(units)}")
    return "\n".join(lines)
