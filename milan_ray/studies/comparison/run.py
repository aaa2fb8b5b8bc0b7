"""All labelers on the same units: agreement with annotations, faithfulness, cost; as tables of scores and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa

from milan_ray.config import config_hash
from milan_ray.engine import references
from milan_ray.errors import MilanError, unknown_name
from milan_ray.names import checked_name
from milan_ray.progress import say
from milan_ray.schema import ANNOTATIONS, DESCRIPTIONS, SCORES, UNIT_SCORES
from milan_ray.scoring.evaluation import Row, best_constant, evaluate_text, score_table
from milan_ray.scoring.search import scan_descriptions
from milan_ray.scoring.text import BertScore, minilm_directory, normalize
from milan_ray.storage import Storage
from milan_ray.studies.comparison.statistics import (
    FIGURE,
    Unit,
    common_units,
    cost_rows,
    plot_comparison,
    unit_score_rows,
    with_trivial_labels,
)
from milan_ray.studies.judges.run import BY_KIND, HELD_OUT_SCENES, in_words, judge_labels, of_the_world

NAME = "comparison"
"""Name of the comparison where nobody gives another."""

AGREEMENT, COST = "annotations", "cost"
"""What its tables are called, behind its name."""

VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        name: What its tables begin with.
        units: The N units that all labelers have labelled.
        systems: Labeler → N labels, the main one first.
        said: Unit → what people say of it.
        costs: Rows of what labels cost.
        scored: Partitions of unit scores that speak of these layers and labelers.
        config: Hash of all that decides the result.
    """

    name: str
    units: list[Unit]
    systems: dict[str, list[str]]
    said: dict[Unit, list[str]]
    costs: list[Row]
    scored: list[dict[str, str]]
    config: str

    @property
    def models(self) -> set[str]:
        """Names of the units' models."""
        return {model for model, _, _ in self.units}

    def figure(self, storage: Storage) -> str:
        """Where its figure lies, below the storage's root."""
        return storage.path(SCORES, experiment=f"{self.name}: {COST}").replace("data.parquet", FIGURE)

    def why(self, storage: Storage) -> str | None:
        """Why it would be made; None when it is up to date."""
        keys = {"experiment": f"{self.name}: {COST}"}
        if storage.is_current(SCORES, self.config, **keys) and storage.exists(self.figure(storage)):
            return None
        return "missing" if storage.metadata(SCORES, **keys) is None else "labels, annotations or scores changed"

    def stored(self, storage: Storage) -> pa.Table:
        """What was found when it was made last; it must be up to date."""
        found = [keys for keys in storage.partitions(SCORES) if keys["experiment"].startswith(f"{self.name}: ")]
        found = [keys for keys in found if storage.is_current(SCORES, self.config, **keys)]
        return pa.concat_tables(storage.read(SCORES, **keys).replace_schema_metadata() for keys in found)


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
    """Finds what :func:`run_comparison` compares; arguments and errors as there."""
    checked_name("a comparison", name, slashes=True)
    frame = scan_descriptions(storage, models, None, labelers).select(
        "labeler", "model", "layer", "unit", "description"
    )
    descriptions = _in_order(frame.collect(), labelers)
    units, systems = common_units(descriptions)
    layers = sorted({(model, layer) for model, layer, _ in units})
    said = _annotations(storage, source, layers)
    costs = cost_rows(storage, list(systems), layers)
    scored = [keys for keys in storage.partitions(UNIT_SCORES) if keys["labeler"] in systems]
    scored = [keys for keys in scored if (keys["model"], keys["layer"]) in layers]
    config = config_hash(
        {
            "scores": [storage.config_of(UNIT_SCORES, **keys) for keys in scored],
            "comparison": VERSION,
            "descriptions": [
                storage.config_of(DESCRIPTIONS, labeler=labeler, model=model, layer=layer)
                for labeler in systems
                for model, layer in layers
            ],
            "annotations": [(unit, texts) for unit, texts in sorted(said.items())],
            "bertscore": _language_model(bert_score),
            "scenes": scenes.sources,
            "costs": [(labeler, metric, score.value) for labeler, metric, score, _, _ in costs],
        }
    )
    return Comparison(name, units, systems, said, costs, scored, config)


def run_comparison(
    storage: Storage,
    *,
    models: Sequence[str] | None = None,
    labelers: Sequence[str] | None = None,
    source: str | None = None,
    bert_score: str | Path | None = None,
    name: str = NAME,
    scenes: references.ProbeRef = HELD_OUT_SCENES,
) -> pa.Table:
    """Compares what labelers say of the same units; Ray must be connected where these are the built-in world's.

    The units are those that all labelers have labelled. Agreement counts those of them that are annotated; judged by
    the world are those of its networks.

    Args:
        storage: The run directory.
        models: Names or patterns; None for all.
        labelers: The same, of labelers, the main one first; None for all, MILAN first.
        source: Whose annotations; None takes the one source there is.
        bert_score: Folder of the language model of BERTScore; None leaves BERTScore out.
        name: Name of the comparison, which its tables begin with.
        scenes: What the built-in world judges by.

    Returns:
        Rows of schema SCORES, which now also are in the run directory.

    Raises:
        MilanError: There are no descriptions, no unit that all labelers have labelled, or several sources.
    """
    found = find_comparison(
        storage, models=models, labelers=labelers, source=source, bert_score=bert_score, name=name, scenes=scenes
    )
    units, systems, said = found.units, found.systems, found.said
    if found.why(storage) is None:
        say(f"{name}: up to date")
        return found.stored(storage)
    say(f"{name}: {', '.join(systems)} on {len(units)} units of {len(found.models)} models")
    counted = {labeler for labeler, *_ in found.costs}
    if uncounted := [labeler for labeler in systems if labeler not in counted]:
        say(
            f"no cost of {', '.join(uncounted)}: what they took is not recorded, or by an earlier version that counted "
            "a pass once for each of its layers; delete their labels and make them again for a figure"
        )
    tables = []
    if annotated := [unit for unit in units if unit in said]:
        tables.append(_agreement(f"{name}: {AGREEMENT}", annotated, units, systems, said, bert_score))
    else:
        say("nobody has annotated these units: no agreement is measured")
    in_world = {model: of_the_world(storage, model) for model in found.models}
    if any(in_world.values()):
        words = {labeler: [in_words(labeler, label) for label in labels] for labeler, labels in systems.items()}
        judged = [place for place, (model, _, _) in enumerate(units) if in_world[model]]
        some = {labeler: [labels[place] for place in judged] for labeler, labels in words.items()}
        constant = best_constant(list(said.values())) if said else None
        tables += judge_labels(storage, name, [units[n] for n in judged], with_trivial_labels(some, constant), scenes)
    for predictor in sorted({keys["predictor"] for keys in found.scored}):
        mine = [storage.read(UNIT_SCORES, **keys) for keys in found.scored if keys["predictor"] == predictor]
        unit_scores = pl.DataFrame(pl.from_arrow(pa.concat_tables(table.replace_schema_metadata() for table in mine)))
        if rows := unit_score_rows(unit_scores, units, systems):
            tables.append(score_table(f"{name}: scores by {predictor}", rows))
    tables.append(score_table(f"{name}: {COST}", found.costs))
    for table in tables[:-1]:
        storage.write(SCORES, table, found.config, experiment=table["experiment"][0].as_py())
    everything = pa.concat_tables(tables)
    figure = found.figure(storage)
    for kind, picture in plot_comparison(pl.DataFrame(pl.from_arrow(everything)), f"{name}: {BY_KIND}").items():
        storage.put(figure.replace(".svg", f".{kind}"), picture)
    storage.write(SCORES, tables[-1], found.config, experiment=f"{name}: {COST}")  # last: it says that all is done
    return everything


def _language_model(folder: str | Path | None) -> bool | str:
    """What tells language models of BERTScore apart: whether there is the usual one, or the name of another."""
    if folder is None or str(folder) == str(minilm_directory()):
        return folder is not None
    return Path(folder).name


def _in_order(descriptions: pl.DataFrame, labelers: Sequence[str] | None) -> pl.DataFrame:
    """MILAN's first, or as they were asked for: the first is what the trivial rows are compared with."""
    known = list(labelers or ("milan",))
    place = pl.col("labeler").replace_strict(known, range(len(known)), default=len(known), return_dtype=pl.Int64)
    return descriptions.sort(place, "labeler", maintain_order=True)


def _annotations(storage: Storage, source: str | None, layers: Sequence[tuple[str, str]]) -> dict[Unit, list[str]]:
    """What people say of units, where it has words."""
    known = sorted({keys["source"] for keys in storage.partitions(ANNOTATIONS)})
    if source is not None and source not in known:
        raise unknown_name("source of annotations", source, known)
    if source is None and len(known) > 1:
        raise MilanError(f"there are annotations of {', '.join(known)}: say which count with --annotations.")
    found: dict[Unit, list[str]] = {}
    for keys in storage.partitions(ANNOTATIONS, source=source or known[0]) if known else []:
        if (keys["model"], keys["layer"]) in layers:
            for row in storage.read(ANNOTATIONS, ["unit", "text"], **keys).to_pylist():
                if normalize(row["text"]):
                    found.setdefault((keys["model"], keys["layer"], row["unit"]), []).append(row["text"])
    return found


def _agreement(
    experiment: str,
    annotated: Sequence[Unit],
    units: Sequence[Unit],
    systems: dict[str, list[str]],
    said: dict[Unit, list[str]],
    bert_score: str | Path | None,
) -> pa.Table:
    place = {unit: number for number, unit in enumerate(units)}
    chosen = [place[unit] for unit in annotated]
    labels = {labeler: [of[number] for number in chosen] for labeler, of in systems.items()}
    references = [said[unit] for unit in annotated]
    # Chosen on the very units that it is measured on, the constant is as hard to beat as a constant can be.
    everything = with_trivial_labels(labels, best_constant(references))
    return evaluate_text(experiment, everything, references, BertScore(bert_score) if bert_score else None)


def summary(scores: pa.Table) -> str:
    """The comparison on one screen: a line per measure, each labeler beside what costs nothing."""
    frame = pl.DataFrame(pl.from_arrow(scores)).filter(~pl.col("system").str.contains(" − |, shuffled$"))
    skip = {"bleu", "rouge-1-f", "rouge-2-f", "auroc-all-present", "causal-share"}
    lines = []
    for experiment in dict.fromkeys(frame["experiment"]):
        rows = frame.filter(pl.col("experiment") == experiment)
        for metric in dict.fromkeys(rows["metric"]):
            if metric not in skip:
                found = rows.filter(pl.col("metric") == metric).iter_rows(named=True)
                shown = (f"{row['system']} {row['value']:.3g}" if row["n"] else str(row["note"]) for row in found)
                lines.append(f"  {experiment}, {metric}: " + " · ".join(shown))
    return "\n".join(lines)
