"""All labelers on the same units: agreement with annotations, faithfulness, cost; as tables of scores and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from milan_ray.config import Fingerprint, config_hash
from milan_ray.engine import references
from milan_ray.engine.stage import Known, Output, Stage
from milan_ray.errors import MilanError, unknown_name
from milan_ray.names import checked_name
from milan_ray.progress import say
from milan_ray.report.figures import figure_path, store_figure
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, SCORES, UNIT_SCORES
from milan_ray.scoring.evaluation import Row, best_constant, evaluate_text, score_table, summary_lines
from milan_ray.scoring.search import scan_descriptions
from milan_ray.scoring.text import BertScore, minilm_directory
from milan_ray.storage import Storage
from milan_ray.studies.comparison.plot import plot_comparison
from milan_ray.studies.comparison.statistics import common_units, cost_rows, unit_score_rows, with_trivial_labels
from milan_ray.studies.judges.run import BY_KIND, HELD_OUT_SCENES, in_words, judge_labels, labels_of, of_the_world
from milan_ray.studies.tables import Unit, frame_of, read_annotations, read_frame

NAME = "comparison"
"""Default name of the comparison."""

AGREEMENT, COST = "annotations", "cost"
"""Suffixes of its tables' names."""

VERSION = 1


@dataclass(frozen=True)
class Comparison(Stage):
    """Labelers, and the units to compare them on.

    Attributes:
        name: Name that its tables begin with.
        units: The N units that all labelers have labelled.
        systems: Labeler → N labels, the main one first.
        annotations: Unit → its annotations.
        costs: Rows of the cost of labels.
        scored: Partitions of unit scores of these layers and labelers.
        bert_score: Folder of the language model of BERTScore; None leaves BERTScore out.
        scenes: Images by which the built-in world judges.
        config: Hash of everything that decides the result.
    """

    table = SCORES

    name: str
    units: list[Unit]
    systems: dict[str, list[str]]
    annotations: dict[Unit, list[str]]
    costs: list[Row]
    scored: list[dict[str, str]]
    bert_score: str | Path | None
    scenes: references.ProbeRef
    config: str

    @property
    def models(self) -> set[str]:
        """Names of the units' models."""
        return {model for model, _, _ in self.units}

    @property
    def last(self) -> dict[str, str]:
        """Partition of the table that is written last, which marks the comparison as complete."""
        return {"experiment": f"{self.name}: {COST}"}

    def outputs(self, known: Known) -> Iterator[Output]:
        """All tables together, under the name of the comparison."""
        yield Output({"experiment": self.name}, Fingerprint(self.config, {}, self.config))

    def why(self, storage: Storage, output: Output) -> str | None:
        """Why it has to be made, with what it compares; None when it is up to date."""
        if self.is_current(storage):
            return None
        made = storage.metadata(SCORES, **self.last) is not None
        reason = "labels, annotations or scores changed" if made else "missing"
        return f"{', '.join(self.systems)} on {len(self.units)} units: {reason}"

    def is_current(self, storage: Storage) -> bool:
        """Whether all tables and the figure exist and were made from the same inputs."""
        current = storage.is_current(SCORES, self.config, **self.last)
        return current and storage.exists(figure_path(storage, SCORES, **self.last))

    def stored(self, storage: Storage) -> pa.Table:
        """The rows of all its tables, which must be up to date."""
        partitions = [keys for keys in storage.partitions(SCORES) if keys["experiment"].startswith(f"{self.name}: ")]
        partitions = [keys for keys in partitions if storage.is_current(SCORES, self.config, **keys)]
        return pa.concat_tables(storage.read(SCORES, **keys).replace_schema_metadata() for keys in partitions)

    def run(self, storage: Storage) -> pa.Table:
        """Compares the labels of the same units. Ray must be connected if networks of the world are among them.

        Agreement is measured on the annotated units. The world judges the units of its networks.

        Args:
            storage: The run directory.

        Returns:
            The written rows of schema SCORES.
        """
        name, config = self.name, self.config
        if self.is_current(storage):
            say(f"{name}: up to date")
            return self.stored(storage)
        say(f"{name}: {', '.join(self.systems)} on {len(self.units)} units of {len(self.models)} models")
        counted = {labeler for labeler, *_ in self.costs}
        if uncounted := [labeler for labeler in self.systems if labeler not in counted]:
            say(
                f"no cost of {', '.join(uncounted)}: what they took is not recorded, or by an earlier version that "
                "counted a pass once for each of its layers; delete their labels and make them again for a figure"
            )
        tables = [*_agreement(self), *_judged(storage, self), *_unit_scores(storage, self)]
        tables.append(score_table(f"{name}: {COST}", self.costs))
        for table in tables[:-1]:
            storage.write(SCORES, table, config, experiment=table["experiment"][0].as_py())
        rows = pa.concat_tables(tables)
        figure = plot_comparison(frame_of(rows), f"{name}: {BY_KIND}")
        store_figure(storage, SCORES, figure, **self.last)
        storage.write(SCORES, tables[-1], config, **self.last)  # last: marks the comparison as complete
        return rows


def find_comparison(
    storage: Storage,
    *,
    models: Sequence[str] | None = None,
    labelers: Sequence[str] | None = None,
    source: str | None = None,
    bert_score: str | Path | None = None,
    name: str = NAME,
    scenes: references.ProbeRef = HELD_OUT_SCENES,
) -> Comparison:
    """Finds the units that all labelers have labelled, and everything that is compared on them.

    Args:
        storage: The run directory.
        models: Names or patterns of models; None for all.
        labelers: Names or patterns of labelers, the main one first; None for all, MILAN first.
        source: Source of the annotations; None uses the only source.
        bert_score: Folder of the language model of BERTScore; None leaves BERTScore out.
        name: Name of the comparison, which its tables begin with.
        scenes: Images by which the built-in world judges.

    Raises:
        MilanError: There are no descriptions, no unit that all labelers have labelled, or several sources.
    """
    checked_name("a comparison", name, slashes=True)
    columns = ("labeler", "model", "layer", "unit", "description")
    descriptions = scan_descriptions(storage, models, None, labelers).select(columns).collect()
    units, systems = common_units(_in_order(descriptions, labelers))
    layers = sorted({(model, layer) for model, layer, _ in units})
    annotations = _annotations(storage, source, layers)
    costs = cost_rows(storage, list(systems), layers)
    scored = [
        keys
        for keys in storage.partitions(UNIT_SCORES)
        if keys["labeler"] in systems and (keys["model"], keys["layer"]) in layers
    ]
    config = config_hash(
        {
            "scores": [storage.config_of(UNIT_SCORES, **keys) for keys in scored],
            "comparison": VERSION,
            "descriptions": [
                storage.config_of(DESCRIPTIONS, labeler=labeler, model=model, layer=layer)
                for labeler in systems
                for model, layer in layers
            ],
            "annotations": [(unit, texts) for unit, texts in sorted(annotations.items())],
            "bertscore": _language_model(bert_score),
            "scenes": scenes.sources,
            "costs": [(labeler, metric, score.value) for labeler, metric, score, _, _ in costs],
        }
    )
    return Comparison(name, units, systems, annotations, costs, scored, bert_score, scenes, config)


def _agreement(comparison: Comparison) -> list[pa.Table]:
    """Agreement with the annotations, if there are any."""
    annotated = np.array([unit in comparison.annotations for unit in comparison.units])
    if not annotated.any():
        say("nobody has annotated these units: no agreement is measured")
        return []
    references = [comparison.annotations[unit] for unit in comparison.units if unit in comparison.annotations]
    # The constant is chosen on the units that it is measured on, so it is the strongest possible constant.
    systems = with_trivial_labels(labels_of(comparison.systems, annotated), best_constant(references))
    bert = BertScore(comparison.bert_score) if comparison.bert_score else None
    return [evaluate_text(f"{comparison.name}: {AGREEMENT}", systems, references, bert)]


def _judged(storage: Storage, comparison: Comparison) -> list[pa.Table]:
    """The world's judgement of the units of its networks, if there are any."""
    in_world = {model: of_the_world(storage, model) for model in comparison.models}
    judged = np.array([in_world[model] for model, _, _ in comparison.units])
    if not judged.any():
        return []
    labels = labels_of(comparison.systems, judged)
    words = {labeler: [in_words(labeler, text) for text in texts] for labeler, texts in labels.items()}
    constant = best_constant(list(comparison.annotations.values())) if comparison.annotations else None
    units = [unit for unit in comparison.units if in_world[unit[0]]]
    return judge_labels(storage, comparison.name, units, with_trivial_labels(words, constant), comparison.scenes)


def _unit_scores(storage: Storage, comparison: Comparison) -> list[pa.Table]:
    """A table for each model that scored the labels of single units."""
    tables = []
    for predictor in sorted({keys["predictor"] for keys in comparison.scored}):
        partitions = (keys for keys in comparison.scored if keys["predictor"] == predictor)
        scores = pl.concat(read_frame(storage, UNIT_SCORES, **keys) for keys in partitions)
        if rows := unit_score_rows(scores, comparison.units, comparison.systems):
            tables.append(score_table(f"{comparison.name}: scores by {predictor}", rows))
    return tables


def _language_model(folder: str | Path | None) -> bool | str:
    """Identifies the language model of BERTScore: True for the default model, False for none, else its name."""
    if folder is None or str(folder) == str(minilm_directory()):
        return folder is not None
    return Path(folder).name


def _in_order(descriptions: pl.DataFrame, labelers: Sequence[str] | None) -> pl.DataFrame:
    """Sorts labelers as requested, or MILAN first; trivial baselines are compared with the first."""
    first = list(labelers or ("milan",))
    place = pl.col("labeler").replace_strict(first, range(len(first)), default=len(first), return_dtype=pl.Int64)
    return descriptions.sort(place, "labeler", maintain_order=True)


def _annotations(storage: Storage, source: str | None, layers: Sequence[tuple[str, str]]) -> dict[Unit, list[str]]:
    """Unit → its annotations, except those without words."""
    sources = sorted({keys["source"] for keys in storage.partitions(ANNOTATIONS)})
    if source is not None and source not in sources:
        raise unknown_name("source of annotations", source, sources)
    if source is None and len(sources) > 1:
        raise MilanError(f"there are annotations of {', '.join(sources)}: say which count with --annotations.")
    if not sources:
        return {}
    source = source or sources[0]
    annotated = {(keys["model"], keys["layer"]) for keys in storage.partitions(ANNOTATIONS, source=source)}
    return read_annotations(storage, source, (layer for layer in layers if layer in annotated))


def summary(scores: pa.Table) -> str:
    """The comparison on one screen: a line per measure, each labeler alongside trivial baselines."""
    frame = frame_of(scores).filter(~pl.col("system").str.contains(" − |, shuffled$"))
    hidden = ("bleu", "rouge-1-f", "rouge-2-f", "auroc-all-present", "causal-share")
    return summary_lines(frame.filter(~pl.col("metric").is_in(hidden)))
