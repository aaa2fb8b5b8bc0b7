"""How much units matter by what is said of them: descriptions ─► scores, orders ─► accuracy as units are ablated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa
from spacy.language import Language

from milan_ray.config import Fingerprint, Resources
from milan_ray.engine import references
from milan_ray.errors import MilanError
from milan_ray.models.ablation import UnitSet
from milan_ray.models.registry import ModelSpec
from milan_ray.models.weights import weights_digest
from milan_ray.progress import say
from milan_ray.report import figures
from milan_ray.schema import ABLATIONS, CRITERIA, DESCRIPTIONS, FIGURE, LAYER_PROPERTIES
from milan_ray.stages.exemplars import store_manifest
from milan_ray.storage import Storage
from milan_ray.studies.ablation.run import Accuracies, run_ablations
from milan_ray.studies.analysis import statistics as analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        matched: Criteria beside which as many other units of the same layers are ablated.
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


def run_analysis(
    storage: Storage,
    model: references.ModelRef,
    probe: references.ProbeRef,
    nlp: Language,
    language: str,
    config: AnalysisConfig,
    resources: Resources,
    name: str = "analysis",
) -> pl.DataFrame:
    """Ablates units in the orders that their descriptions give, doing only what is missing.

    Args:
        storage: The run directory, which holds descriptions of the model's layers.
        model: The classifier.
        probe: Images with classes, to count accuracy on.
        nlp: The spaCy pipeline that reads descriptions.
        language: What it is called: printed, and part of what decides the result.
        config: How.
        resources: What of the cluster to use; Ray must be connected.
        name: Name of the experiment in the tables.

    Returns:
        Rows of schema ABLATIONS, over all classes; those of single classes are in the table too.

    Raises:
        MilanError: A layer has no descriptions, or the images have no classes.
    """
    spec, layers = described_model(storage, model, config.labeler)
    fingerprint = analysis_fingerprint(storage, spec, layers, store_manifest(storage, probe)[1], language, config)
    keys = {"labeler": config.labeler, "model": spec.name}
    public = {"experiment": name, "model": spec.name}
    say(f"{name}: sentences are read by {language}")
    for each in analysis.missing_criteria(nlp, config.words):
        say(f"{name}: without {', '.join(each.criteria)}, because {each.reason}")
    if storage.why(ABLATIONS, fingerprint, **public) is None:
        say(f"{name} of {spec.name}: up to date")
    else:
        scores = analysis.unit_scores(read_descriptions(storage, layers, keys), nlp, config.words)
        _store_scores(storage, scores, fingerprint, public)
        properties = analysis.layer_properties(scores)
        _store_properties(storage, properties, fingerprint, public)
        orders = analysis.orders(scores, config.trials, config.seed, config.ties, config.matched)
        steps = [analysis.steps(order, config.fractions) for order in orders]
        sets, places = distinct_sets([analysis.units_of(scores, step) for of_order in steps for step in of_order])
        every = replace(model, layers=layers)
        found = run_ablations(storage, every, probe, sets, resources, fingerprint.hash)
        curves = [
            Curve(order.criterion, order.trial, config.split, config.fractions, tuple(map(len, of_order)))
            for order, of_order in zip(orders, steps, strict=True)
        ]
        table = ablation_rows(public, curves, found, places)
        drawn = figures.files(draw(pl.DataFrame(pl.from_arrow(table)), properties, language))
        for ending, picture in drawn.items():
            storage.put(figure_path(storage, public, ending), picture)
        storage.write(ABLATIONS, table, fingerprint, **public)  # last: it says that all is done
    storage.remove_work(fingerprint.hash)
    rows = pl.DataFrame(pl.from_arrow(storage.read(ABLATIONS, **public)))
    return rows.filter(pl.col("class") == "")


def analysis_fingerprint(
    storage: Storage, spec: ModelSpec, layers: Sequence[str], probe: str, language: str, config: AnalysisConfig
) -> Fingerprint:
    """What decides an analysis.

    Args:
        storage: The run directory.
        spec: The classifier.
        layers: Its layers, which are described.
        probe: Digest of the images.
        language: What the pipeline is called that reads descriptions.
        config: How.
    """
    return Fingerprint.of(
        {
            "kernel": KERNEL_VERSION,
            "descriptions": descriptions_of(storage, spec.name, layers, config.labeler),
            "weights": weights_digest(spec.load()),
            "probe": probe,
            "language": language,
            "analysis": config,
        }
    )


def figure_path(storage: Storage, public: dict[str, str], ending: str, stem: str = FIGURE) -> str:
    """Where a figure of an ablation experiment lies, below the storage's root."""
    return storage.path(ABLATIONS, **public).replace("data.parquet", f"{stem}.{ending}")


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
    public: dict[str, str], curves: Sequence[Curve], found: Accuracies, places: Sequence[int]
) -> pa.Table:
    """Rows of schema ABLATIONS: every step of every curve, over all images and by class.

    Args:
        public: Partition keys.
        curves: What was ablated.
        found: Accuracies of distinct sets.
        places: For each step of each curve, in order, the place of its set in ``found``.
    """
    shown = np.flatnonzero(found.images)
    names = ["", *(found.classes[number] for number in shown)]
    counts = np.concatenate([[found.images.sum()], found.images[shown]])
    steps = [(curve, step) for curve in curves for step in range(len(curve.ablated))]
    right = np.concatenate([found.correct.sum(1, keepdims=True), found.correct[:, shown]], axis=1)[list(places)]
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
    """Sets without repetition, and the place of each in that list."""
    places: dict[frozenset[tuple[str, int]], int] = {}
    kept: list[UnitSet] = []
    found = []
    for one in sets:
        key = frozenset((layer, unit) for layer, units in one.items() for unit in units)
        if key not in places:
            places[key] = len(kept)
            kept.append(one)
        found.append(places[key])
    return kept, found


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


def descriptions_of(storage: Storage, model: str, layers: Sequence[str], labeler: str) -> dict[str, str]:
    """Layer → configuration hash of its descriptions."""
    return {layer: storage.config_of(DESCRIPTIONS, labeler=labeler, model=model, layer=layer) for layer in layers}


def read_descriptions(storage: Storage, layers: Sequence[str], keys: dict[str, str]) -> pl.DataFrame:
    """Columns layer, unit, description of some layers, in their order and by number of the unit."""
    columns = ["layer", "unit", "description"]
    return pl.concat(
        pl.DataFrame(pl.from_arrow(storage.read(DESCRIPTIONS, columns, layer=layer, **keys))).sort("unit")
        for layer in layers
    )


def _store_scores(storage: Storage, scores: pl.DataFrame, fingerprint: Fingerprint, public: dict[str, str]) -> None:
    rows = scores.unpivot(
        analysis.criteria(scores), index=["layer", "unit", "description"], variable_name="criterion", value_name="score"
    )
    columns = {name: rows[name].to_list() for name in ("layer", "unit", "criterion", "score", "description")}
    table = CRITERIA.table({**{key: [value] * len(rows) for key, value in public.items()}, **columns})
    storage.write(CRITERIA, table, fingerprint, **public)


def _store_properties(
    storage: Storage, properties: pl.DataFrame, fingerprint: Fingerprint, public: dict[str, str]
) -> None:
    columns = {name: properties[name].to_list() for name in properties.columns}
    table = LAYER_PROPERTIES.table({**{key: [value] * len(properties) for key, value in public.items()}, **columns})
    storage.write(LAYER_PROPERTIES, table, fingerprint, **public)


def stored_scores(storage: Storage, model: str, name: str = "analysis") -> pl.DataFrame:
    """The scores that an analysis stored: a row per unit, columns as those of :func:`analysis.unit_scores`."""
    rows = pl.DataFrame(pl.from_arrow(storage.read(CRITERIA, experiment=name, model=model)))
    return rows.pivot("criterion", index=["layer", "unit", "description"], values="score", maintain_order=True)


SYNTACTIC = ("verbs", "adpositions", "adjectives", "nouns")
STRUCTURAL = ("max-word-difference", "parse-depth", "description-length")


def draw(rows: pl.DataFrame, properties: pl.DataFrame, language: str) -> Figure:
    """The paper's Figure 4: accuracy over the share ablated, by kinds of words and structure; properties by layer."""
    rows = rows.filter(pl.col("class") == "")
    there = list(dict.fromkeys(rows["condition"]))
    same = [name for name in there if name.endswith(analysis.SAME_LAYERS)]
    words = [name for name in there if name not in (*SYNTACTIC, *STRUCTURAL, *same, analysis.RANDOM)]
    groups = [("words of a kind", (*SYNTACTIC, *same)), ("structure", STRUCTURAL), ("likeness to a word", tuple(words))]
    groups = [(title, names) for title, names in groups if set(names) & set(there)]
    figure = figures.new_figure(4 * (len(groups) + 1), 3.6)
    panels = figure.subplots(1, len(groups) + 1)
    random = rows.filter(pl.col("condition") == analysis.RANDOM)
    for axes, (title, names) in zip(panels, groups, strict=False):
        if len(random):
            spread = random.group_by("fraction", maintain_order=True).agg(
                pl.col("accuracy").mean().alias("mean"),
                pl.col("accuracy").min().alias("low"),
                pl.col("accuracy").max().alias("high"),
            )
            axes.plot(100 * spread["fraction"], spread["mean"], "--", color="0.4", label="random, mean and range")
            axes.fill_between(100 * spread["fraction"], spread["low"], spread["high"], color="0.4", alpha=0.2)
        for name in names:
            of_it = rows.filter(pl.col("condition") == name)
            line = of_it.group_by("fraction", maintain_order=True).agg(pl.col("accuracy").mean())
            if len(line):
                axes.plot(100 * line["fraction"], line["accuracy"], marker=".", label=name.removeprefix("similar to "))
        axes.set_xlabel("% units ablated")
        axes.set_ylabel("accuracy")
        axes.set_title(title, fontsize="medium")
        axes.legend(fontsize="x-small")
    last = panels[-1]
    layers = list(dict.fromkeys(properties["layer"]))
    for name in dict.fromkeys(properties["property"]):
        line = properties.filter(pl.col("property") == name)
        last.plot(range(len(layers)), line["share"], marker="o", label=name)
        last.fill_between(range(len(layers)), line["low"], line["high"], alpha=0.1)
    last.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
    last.set_ylabel("share of units")
    last.set_ylim(0, 1)
    last.set_title("descriptions by layer", fontsize="medium")
    last.legend(fontsize="x-small")
    figure.suptitle(f"{rows['model'][0]} on {rows['n'][0]:,} images; sentences read by {language}", fontsize="small")
    return figure


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
